// What is chosen, and the series of the chosen: the only place that reads the runs' lines.

const DOC = JSON.parse(document.getElementById("data").textContent);
const unique = (values) => [...new Set(values)];
const RUN_METHODS = unique(DOC.runs.map((run) => run.method).filter(Boolean));
const state = {
  runs: new Set(DOC.runs.map((run) => run.label)),
  ways: new Set(RUN_METHODS),
  clients: new Set(DOC.clients),
  methods: new Set(DOC.methods),
  view: DOC.runs.length > 1 ? "mean" : "each",
  open: new Set(),
};

const runIndex = (run) => DOC.runs.indexOf(run);
const runStyle = (run) => look(runIndex(run));
const clientStyle = (client) => look(DOC.clients.indexOf(client));
const JUDGED = DOC.methods.filter((method) => DOC.runs.some((run) => run.lines.some((line) => line.noise?.methods?.[method] && line.noise.methods[method].not_applicable === undefined)));
const methodStyle = (method) => look(Math.max(0, JUDGED.indexOf(method)));
const chosenRuns = () => DOC.runs.filter((run) => state.runs.has(run.label) && (!run.method || state.ways.has(run.method)));
const chosenClients = () => DOC.clients.filter((client) => state.clients.has(client));
const chosenMethods = () => DOC.methods.filter((method) => state.methods.has(method));
const several = () => chosenRuns().length > 1;

/** The scores of the runs, [name, title, meaning]: a run of plain text has none. */
const SCORES = [...new Map(DOC.runs.filter((run) => run.score).map((run) => [run.score, [run.score, run.score_title, run.score_meaning ?? ""]])).values()];
const isScore = (name) => SCORES.some(([score]) => score === name);

const roundsOf = (run) => run.lines.filter((line) => line.kind === "round");
const evaluationsOf = (run) => run.lines.filter((line) => line.kind === "evaluation");
const noisesOf = (run) => roundsOf(run).filter((line) => line.noise);
const valueOf = (line, client, name) => line.clients?.[client]?.[name];

/** The mean of a metric over the chosen clients, by examples; the line's own figure where all of them are chosen. */
function meanOf(line, name) {
  const own = line.kind === "evaluation" ? line.mean?.[name] : name === "loss_before" ? line.received_loss : undefined;
  const names = Object.keys(line.clients ?? {});
  if (own !== undefined && names.every((client) => state.clients.has(client))) return own;
  const weight = line.kind === "evaluation" ? "examples" : "num_examples";
  let total = 0, sum = 0;
  for (const client of names.filter((one) => state.clients.has(one))) {
    const value = valueOf(line, client, name), part = valueOf(line, client, weight);
    if (!isNumber(value) || !isNumber(part)) continue;
    total += part;
    sum += part * value;
  }
  return total ? sum / total : undefined;
}

/** One series per chosen client and run, or per run, of a metric of these lines. */
function metricSeries(lines, name) {
  const present = (points) => points.filter((point) => point[1] !== undefined);
  return chosenRuns().flatMap((run) => {
    const mean = { name: several() ? run.label : "mean", style: several() ? runStyle(run) : INK, points: present(lines(run).map((line) => [line.round, meanOf(line, name)])) };
    const own = { name: several() ? `${run.label} server` : "server", style: { ...mean.style, dash: "2 3" }, points: present(lines(run).map((line) => [line.round, line.server?.[name]])) };
    const server = own.points.length ? [own] : [];
    if (state.view === "mean") return [mean, ...server];
    const each = chosenClients().map((client) => ({
      name: several() ? `${run.label} ${client}` : client,
      style: several() ? { ...clientStyle(client), color: runStyle(run).color } : clientStyle(client),
      points: present(lines(run).map((line) => [line.round, valueOf(line, client, name)])),
    })).filter((one) => one.points.length);
    return each.length > 1 && !several() ? [...each, mean, ...server] : [...each, ...server];
  });
}

/** A line per chosen client of a run, of what `read(line, client)` finds in its rounds. */
function clientSeries(run, read) {
  const points = (client) => roundsOf(run).map((line) => [line.round, read(line, client)]).filter((point) => point[1] !== undefined);
  return chosenClients().map((client) => ({ name: client, style: clientStyle(client), points: points(client) })).filter((one) => one.points.length);
}

/** Round -> bytes that the chosen clients had sent and received by its end. */
function trafficOf(run, clients = chosenClients()) {
  const total = new Map([[0, 0]]);
  let sum = 0;
  for (const line of roundsOf(run)) {
    for (const client of clients) sum += (valueOf(line, client, "bytes_up") ?? 0) + (valueOf(line, client, "bytes_down") ?? 0);
    total.set(line.round, sum);
  }
  return total;
}

/** Outcome by round: [round, mean over the chosen clients]; probe_loss is also what the next round's clients received. */
function outcomes(run, name) {
  const found = new Map();
  if (name === "probe_loss") for (const line of roundsOf(run)) found.set(line.round - 1, meanOf(line, "loss_before"));
  for (const line of evaluationsOf(run)) found.set(line.round, meanOf(line, name));
  return [...found].filter(([, value]) => isNumber(value)).sort((a, b) => a[0] - b[0]);
}

/** The round's line with noise: the chosen round's, or the run's last. */
function noiseLine(run) {
  const lines = noisesOf(run);
  return state.round === "last" || state.round === undefined ? lines[lines.length - 1] : lines.find((line) => line.round === Number(state.round));
}

/** A client in a round: took part, quarantined, refused, or not sampled, and the reason where there is one. */
function partOf(line, client) {
  for (const what of ["quarantined", "refused"]) if (line[what]?.[client] !== undefined) return { what, reason: line[what][client] };
  return { what: line.clients?.[client] ? "took part" : "not sampled" };
}
