// The sections in the order of the page: each is {id, title, wanted, about, controls, draw}.

const column = (text, unit = "") => ({ text, unit });

/** A table: `head` are columns with their unit, the first cell of a row is its heading; every number keeps its full value. */
function table(head, rows, { title, total = -1 } = {}) {
  const numeric = head.map((_, i) => i > 0 && rows.some((row) => isNumber(row[i])));
  const side = (value, i) => (numeric[i] ? "num" : typeof value === "string" && value.length > 24 ? "text" : "");
  const cell = (value, i) => isNumber(value)
    ? html("td", { class: "num" }, html("data", { value: String(value) }, format(value, head[i].unit, true)))
    : html("td", { class: side(value, i) }, value instanceof Node ? value : format(value, head[i].unit));
  const line = (row, r) => html("tr", { class: r === total ? "total" : "" },
    html("th", { scope: "row" }, row[0] instanceof Node ? row[0] : format(row[0], head[0].unit)),
    row.remark ? html("td", { colspan: head.length - 1, class: "meaning" }, row.remark) : row.slice(1).map((value, i) => cell(value, i + 1)));
  return html("div", { class: "tabled" }, title ? html("h3", {}, title) : null, html("div", { class: "scroll", tabindex: "0" }, html("table", {},
    html("thead", {}, html("tr", {}, head.map((one, i) => html("th", { scope: "col", class: numeric[i] ? "num" : "" }, one.text)))),
    html("tbody", {}, rows.map(line)))));
}

/** A row of which only the heading and one remark across the others is left. */
const remarked = (heading, remark) => Object.assign([heading], { remark });

/** A plot with its title, and its numbers as a table under it; `draw(width)` gives its nodes, or null where it has no marks. */
function figure(body, { id, title, note, draw, data }) {
  const plot = html("div", { class: "plot" });
  const node = html("figure", { id }, html("figcaption", {}, title, note ? html("span", {}, note) : null), plot);
  body.append(node);
  const drawn = draw(Math.max(260, plot.clientWidth));
  if (!drawn) return void plot.append(html("p", { class: "none" }, "No numbers for this choice."));
  plot.append(...drawn);
  const details = html("details", { open: state.open.has(id), ontoggle: () => state.open[details.open ? "add" : "delete"](id) },
    html("summary", {}, "Numbers"), data());
  node.append(details);
}

function linesTable(series, x, unit) {
  const named = series.filter((one) => one.points.length);
  const places = unique(named.flatMap((one) => one.points.map((point) => point[0]))).sort((a, b) => a - b);
  const maps = named.map((one) => new Map(one.points));
  return table([column(x.label, x.unit ?? "0"), ...named.map((one) => column(one.name, unit))],
    places.map((place) => [place, ...maps.map((map) => map.get(place))]));
}

function linesFigure(body, { x, y, series, ...rest }) {
  const data = () => linesTable(series, x, y.unit);
  figure(body, { ...rest, data: rest.data ?? data, draw: (width) => drawLines(width, { x, y, series, label: rest.title }) });
}

const ROUND = { label: "round", kind: "round" };
const grid = (body) => body.appendChild(html("div", { class: "grid-of" }));
const none = (body, ...words) => body.append(html("p", { class: "none" }, ...words));

const METRICS = [
  ["held_out_loss", "Held-out loss", "nats per token, after the round", "", evaluationsOf],
  ...SCORES.map(([score, title, meaning]) => [score, title, `${meaning || "of the held-out examples"}, after the round`, "%", evaluationsOf]),
  ["train_loss", "Training loss", "mean of the round's local steps", "", roundsOf],
  ["loss_before", "Probe loss of what clients received", "before their local steps", "", roundsOf],
  ["loss_after", "Probe loss of what clients replied", "after their local steps", "", roundsOf],
];

function drawLearning(body) {
  const place = grid(body);
  for (const [name, title, note, unit, lines] of METRICS)
    linesFigure(place, { id: `plot-${name}`, title, note, x: ROUND, y: { unit, kind: "zero" }, series: metricSeries(lines, name) });
}

const OUTCOMES = { ...Object.fromEntries(SCORES.map(([score, title]) => [score, [title, "%"]])), held_out_loss: ["Held-out loss", ""], probe_loss: ["Probe loss", ""] };

function drawTraffic(body) {
  const name = state.outcome ?? Object.keys(OUTCOMES)[0], [title, unit] = OUTCOMES[name];
  const found = chosenRuns().flatMap((run) => {
    const traffic = trafficOf(run);
    return outcomes(run, name).filter(([round]) => traffic.has(round)).map(([round, value]) => ({ run, round, value, sent: traffic.get(round) }));
  });
  const better = (a, b) => (isScore(name) ? a >= b : a <= b);
  const beaten = (one) => found.some((other) => other.sent <= one.sent && better(other.value, one.value) && (other.sent < one.sent || other.value !== one.value));
  const front = found.filter((one) => !beaten(one)).sort((a, b) => a.sent - b.sent);
  const point = ({ round, value, sent }) => [sent, value, `round ${round}, ${format(sent, "B")}`];
  const series = chosenRuns().map((run) => ({ name: run.label, style: runStyle(run), points: found.filter((one) => one.run === run).map(point) }));
  if (several()) series.unshift({ name: "front", style: { color: "ink", dash: "", width: 7 }, faint: true, points: front.map(point) });
  linesFigure(body, {
    id: "plot-traffic", title: `${title} against bytes`, note: several() ? "shaded: the points that no other beats in both" : null,
    x: { label: "bytes up and down until then, chosen clients", kind: "amount", unit: "B" }, y: { unit, kind: "zero" }, series,
    data: () => table([column("run"), column("round", "0"), column("bytes", "B"), column(title.toLowerCase(), unit), column("beaten in both")],
      found.map((one) => [one.run.label, one.round, one.sent, one.value, beaten(one)])),
  });
}

const HOW_TO_MEASURE = () => ["No round here was measured. Set ", html("code", {}, "aggregation.noise = true"), " in the run's configuration and every round's line has the figures of this section."];
const measuredRuns = () => chosenRuns().filter((run) => noiseLine(run));
const ofRun = (run, line) => DOC.kind === "noise" ? "" : `${several() ? `${run.label}, ` : ""}round ${line.round}`;
const provenance = (run, line) => [ofRun(run, line), line.noise.method && `replies of ${line.noise.method}’s clients`, line.noise.init && `A initialised ${line.noise.init}`].filter(Boolean).join(", ");

/** Errors up to this are float32 rounding: in a plot beside real ones they would be the scale. */
const ROUNDING = 1e-6;
const isError = (name) => name.endsWith("error");

const ERRORS = [["relative_error", "relative error", "%"], ["cosine", "cosine", ""], ["gain", "gain", ""], ["spectral_error", "spectral error", "%"], ["client_error", "client error", "%"]];

function drawMethods(body) {
  for (const run of measuredRuns()) {
    const line = noiseLine(run), methods = line.noise.methods ?? {};
    const received = (found) => found.bytes_down && Object.keys(found.bytes_down).filter((client) => state.clients.has(client)).reduce((sum, client) => sum + found.bytes_down[client], 0);
    const rows = chosenMethods().filter((method) => methods[method]).map((method) => {
      const found = methods[method], why = found.not_applicable;
      return why !== undefined ? remarked(method, `not applicable: ${why}`) : [method, ...ERRORS.map(([name]) => found[name]), received(found)];
    });
    const head = [column("method"), ...ERRORS.map(([, text, unit]) => column(text, unit)), column("bytes down", "B")];
    body.append(table(head, rows, { title: provenance(run, line) }));
  }
}

function drawNoiseByRound(body) {
  const [name, text, unit] = ERRORS.find(([one]) => one === (state.error ?? "relative_error"));
  const inits = unique(chosenRuns().flatMap(noisesOf).map((line) => line.noise.init).filter(Boolean));
  const rest = { id: "plot-noise", title: `Noise of each method: ${text}`, note: inits.length ? `against the exact sum of the same replies; A initialised ${inits.join(", ")}` : "against the exact sum of the same replies" };
  if (DOC.kind === "noise" || noisesOf(chosenRuns()[0] ?? { lines: [] }).length + several() < 2) {
    const methods = measuredRuns().flatMap((run) => Object.entries(noiseLine(run).noise.methods ?? {}));
    const items = methods.filter(([method]) => state.methods.has(method)).map(([method, found]) => ({ name: method, style: methodStyle(method), value: found[name] }));
    return figure(body, { ...rest, draw: (width) => drawBars(width, { items, unit, label: rest.title }), data: () => table([column("method"), column(text, unit)], items.map((item) => [item.name, item.value])) });
  }
  const mixed = chosenRuns().filter((run) => noisesOf(run).length).length > 1;
  const every = chosenRuns().flatMap((run) => chosenMethods().map((method) => ({
    name: mixed ? `${method}, ${run.label}` : method,
    style: mixed ? { ...runStyle(run), color: methodStyle(method).color } : methodStyle(method),
    points: noisesOf(run).map((line) => [line.round, line.noise.methods?.[method]?.[name]]).filter((point) => point[1] !== undefined),
  })).filter((one) => one.points.length));
  const exact = isError(name) ? every.filter((one) => one.points.every((point) => isNumber(point[1]) && point[1] <= ROUNDING)) : [];
  const series = exact.length < every.length ? every.filter((one) => !exact.includes(one)) : every;
  if (series !== every && exact.length) rest.note += `; exact to rounding, so not drawn: ${exact.map((one) => one.name).join("; ")}`;
  const values = series.flatMap((one) => one.points.map((point) => point[1])).filter(isNumber);
  const wide = Math.min(...values) > 0 && Math.max(...values) > 50 * Math.min(...values);
  const data = () => linesTable(every, ROUND, unit);
  linesFigure(body, { ...rest, x: ROUND, y: { unit, kind: wide ? "log" : "zero" }, series, data });
}

const MODULE_FIGURES = { norm: ["Norm of the change", ""], spectral_norm: ["Spectral norm of the change", ""], effective_rank: ["Effective rank of the change", ""], entropy: ["Entropy of the change’s spectrum", ""] };
const real = (method) => Number(measuredRuns().some((run) => (noiseLine(run).noise.methods?.[method]?.relative_error ?? 0) > ROUNDING));
const heatOptions = () => [
  ...chosenMethods().sort((a, b) => real(b) - real(a)).map((method) => [`error:${method}`, `relative error of ${method}`]),
  ...Object.entries(MODULE_FIGURES).map(([name, [title]]) => [name, title.toLowerCase()]),
].filter(([name]) => chosenRuns().some((run) => noisesOf(run).some((line) => Object.keys(heatValues(line.noise, name)).length)));

/** Module -> value of what the heat map shows. */
function heatValues(noise, what) {
  if (what?.startsWith("error:")) return noise.methods?.[what.slice(6)]?.modules ?? {};
  return Object.fromEntries(Object.entries(noise.modules ?? {}).filter(([, found]) => found[what] !== undefined).map(([module, found]) => [module, found[what]]));
}

function drawHeatMaps(body) {
  const what = state.heat, error = what?.startsWith("error:");
  const title = error ? `Relative error of ${what.slice(6)} by layer and module` : `${MODULE_FIGURES[what]?.[0]} by layer and module`;
  const runs = measuredRuns().map((run) => [run, noiseLine(run), heatValues(noiseLine(run).noise, what)]).filter(([, , values]) => Object.keys(values).length);
  const all = runs.flatMap(([, , values]) => Object.values(values)).filter(isNumber);
  const high = Math.max(...all), low = error ? 0 : Math.min(...all), unit = error ? "%" : "";
  for (const [run, line, values] of runs) {
    const names = Object.keys(values), types = unique(names.map((name) => DOC.modules[name].type));
    const layers = unique(names.map((name) => DOC.modules[name].layer)).sort((a, b) => (a ?? Infinity) - (b ?? Infinity));
    const found = new Map(names.map((name) => [`${DOC.modules[name].type} ${DOC.modules[name].layer}`, name]));
    const cell = (type, layer) => {
      const name = found.get(`${type} ${layer === "–" ? null : layer}`);
      return name === undefined ? null : { value: values[name], tip: `${name}\n${format(values[name], unit)}` };
    };
    const draw = (width) => drawHeat(width, { rows: types, columns: layers.map((layer) => layer ?? "–"), cell, low, high, unit, label: title, axisLabel: "layer" });
    const data = () => table([column("module"), column("type"), column("layer", "0"), column("value", unit)], names.map((name) => [name, DOC.modules[name].type, DOC.modules[name].layer, values[name]]));
    figure(body, { id: `plot-heat-${runIndex(run)}`, title, note: provenance(run, line), draw, data });
  }
  if (!runs.length) none(body, "No module has this figure in the chosen round.");
}

function drawNoise(body) {
  if (!chosenRuns().some((run) => noisesOf(run).length)) return none(body, ...HOW_TO_MEASURE());
  drawMethods(body);
  drawNoiseByRound(body);
  drawHeatMaps(body);
}

function drawEnergy(body) {
  if (!chosenRuns().some((run) => noisesOf(run).length)) return none(body, ...HOW_TO_MEASURE());
  const module = state.module ?? "";
  const curve = (noise) => Object.entries((module ? noise.modules?.[module]?.energy : noise.energy) ?? {}).map(([rank, energy]) => [Number(rank), energy]).sort((a, b) => a[0] - b[0]);
  const series = chosenRuns().flatMap((run) => noisesOf(run).map((line) => ({
    name: [several() ? run.label : "", DOC.kind === "noise" ? "energy" : `round ${line.round}`].filter(Boolean).join(", "),
    style: runStyle(run), points: curve(line.noise), faint: line !== noiseLine(run),
  }))).filter((one) => !(one.faint && several()));
  const effective = measuredRuns().map((run) => noiseLine(run).noise.modules?.[module]?.effective_rank).filter(isNumber);
  const entropies = module ? [] : measuredRuns().map((run) => noiseLine(run).noise.entropy).filter(Boolean);
  const told = [
    ...(effective.length ? [`effective rank ${effective.map((v) => format(v)).join(", ")}`] : []),
    ...entropies.map((e) => `mean entropy ${format(e.exact)} nats, ${format(e.clients)} of single clients, gap ${format(e.gap)}`),
  ];
  const note = ["part of the change’s squared singular values within its first r directions", ...told].join("; ");
  linesFigure(body, { id: "plot-energy", title: module ? `Energy against rank: ${module}` : "Energy against rank, all modules", note, x: { label: "rank r", kind: "rank" }, y: { unit: "%", kind: "zero" }, series });
}

function drawShare(body) {
  const place = grid(body), measured = (run) => noisesOf(run).length;
  const titled = (run, text) => (several() ? `${text}, ${run.label}` : text);
  for (const run of chosenRuns()) {
    const weights = clientSeries(run, (line, client) => valueOf(line, client, "weight"));
    if (DOC.kind === "runs") linesFigure(place, { id: `plot-weight-${runIndex(run)}`, title: titled(run, "Weight"), note: "p in the sum of the round’s replies", x: ROUND, y: { unit: "%", kind: "zero" }, series: weights });
    if (measured(run)) drawShares(place, run, titled(run, "Share in the change"));
  }
  if (!chosenRuns().some(measured)) none(place, ...HOW_TO_MEASURE());
}

function drawShares(place, run, title) {
  const series = clientSeries(run, (line, client) => line.noise?.share?.[client]);
  const rest = { id: `plot-share-${runIndex(run)}`, title, note: "signed; the shares of all clients sum to one" };
  if (noisesOf(run).length > 1) return linesFigure(place, { ...rest, x: ROUND, y: { unit: "%", kind: "zero" }, series });
  const items = series.map((one) => ({ ...one, value: one.points[0][1] }));
  figure(place, { ...rest, draw: (width) => drawBars(width, { items, unit: "%", label: title }), data: () => table([column("client"), column("share", "%")], items.map((item) => [item.name, item.value])) });
}
