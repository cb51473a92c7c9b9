// The sections that are tables, and who took part.

const ends = (run, name) => evaluationsOf(run).map((line) => line.mean?.[name]).filter((value) => value !== undefined && value !== null);
const arrow = (values, unit) => values.length > 1 ? `${format(values[0], unit)} → ${format(values[values.length - 1], unit)}` : format(values[0], unit);
const short = (commit) => (commit ? commit.replace(/^([0-9a-f]{12})[0-9a-f]+/, "$1") : "not known");

/** Loss and score of the server's own held-out set, first and last. */
function serverFacts(run) {
  const found = (name) => evaluationsOf(run).map((line) => line.server?.[name]).filter(isNumber);
  return [["held-out loss", "held_out_loss", ""], ...SCORES.map(([score, title]) => [title.toLowerCase(), score, "%"])]
    .filter(([, name]) => found(name).length).map(([text, name, unit]) => `${text} ${arrow(found(name), unit)}`).join(", ") || "–";
}

const FACTS = [
  ["Method", (run) => run.method],
  ["Model", (run) => run.model],
  ["Clients", (run) => `${DOC.clients.filter((client) => run.lines.some((line) => line.clients?.[client])).length} of rank ${unique(roundsOf(run).flatMap((line) => Object.values(line.clients).map((client) => client.rank))).filter(isNumber).sort((a, b) => b - a).join(", ") || "–"}`],
  ["Rounds", (run) => {
    const rounds = roundsOf(run), failed = rounds.filter((line) => !line.successful).length;
    return `${rounds.length} of ${format(run.config["run.rounds"], "0")}${failed ? `, ${failed} failed` : ""}`;
  }],
  ["Held-out loss", (run) => arrow(ends(run, "held_out_loss"))],
  ...SCORES.map(([score, title]) => [title, (run) => arrow(ends(run, score), "%")]),
  ...(DOC.runs.some((run) => evaluationsOf(run).some((line) => line.server)) ? [["Server's held-out set", serverFacts]] : []),
  ["Traffic", (run) => format([...trafficOf(run, DOC.clients).values()].pop(), "B")],
  ["Exact rounds", (run) => { const proofs = roundsOf(run).map((line) => line.update?.certificate).filter(Boolean); return `${proofs.filter((proof) => proof.exact).length} of ${proofs.length}`; }],
  ["Quarantined replies", (run) => String(roundsOf(run).reduce((sum, line) => sum + Object.keys(line.quarantined ?? {}).length, 0))],
  ["Seed", (run) => format(run.config["run.seed"], "0")],
  ["Started", (run) => run.started.replace("T", " ").replace("+00:00", " UTC")],
  ["Commit", (run) => short(run.facts?.commit)],
  ["Machine", (run) => [run.facts?.device, run.facts?.platform].filter(Boolean).join(", ")],
  ["Versions", (run) => Object.entries({ python: run.facts?.python, ...run.facts?.versions }).map(([name, version]) => `${name} ${version}`).join(", ")],
];

function drawFacts(body) {
  const runs = chosenRuns();
  const rows = FACTS.map(([name, read]) => html("tr", {}, html("th", { scope: "row" }, name), runs.map((run) => html("td", { class: "text" }, read(run)))));
  const head = runs.length > 1 ? html("thead", {}, html("tr", {}, html("th", {}, "Run"), runs.map((run) => html("th", { scope: "col" }, run.label, " ", swatch(runStyle(run)))))) : null;
  body.append(html("div", { class: "scroll", tabindex: "0" }, html("table", { class: "facts" }, head, html("tbody", {}, rows))));
}

function drawComparison(body) {
  for (const run of chosenRuns().filter((one) => one.comparison)) {
    const names = Object.keys(run.comparison).filter((name) => !DOC.clients.includes(name) || state.clients.has(name));
    const groups = unique(names.flatMap((name) => Object.keys(run.comparison[name]))).sort();
    const average = (name) => { const found = groups.map((group) => run.comparison[name][group]).filter(isNumber); return found.reduce((sum, value) => sum + value, 0) / found.length; };
    const unit = run.score ? "%" : "";
    const rows = groups.map((group) => [group, ...names.map((name) => run.comparison[name][group])]);
    const node = table([column("examples"), ...names.map((name) => column(DOC.clients.includes(name) ? `${name} alone` : name, unit))],
      [...rows, ["average", ...names.map(average)]], { title: several() ? run.label : null, total: rows.length });
    if (run.score) node.classList.add("tinted");
    if (run.score) for (const cell of node.querySelectorAll("tbody tr:not(.total) td data")) tint(cell);
    body.append(node);
  }
}

function tint(cell) {
  const amount = Math.round(34 * Number(cell.value));
  cell.parentNode.style.background = `color-mix(in srgb, var(--heat) ${amount}%, transparent)`;
}

function drawParts(body) {
  for (const run of chosenRuns()) {
    const rounds = roundsOf(run), clients = chosenClients().filter((client) => rounds.some((line) => partOf(line, client).what !== "not sampled"));
    const found = rounds.flatMap((line) => clients.map((client) => ({ line, client, ...partOf(line, client) })));
    const draw = (width) => rounds.length && clients.length ? drawPresence(width, rounds, clients) : null;
    const data = () => table([column("client"), ...rounds.map((line) => column(`round ${line.round}`))], clients.map((client) => [client, ...rounds.map((line) => partOf(line, client).what)]));
    figure(body, { id: `plot-part-${runIndex(run)}`, title: several() ? run.label : "Clients by round", draw, data });
    drawReasons(body, found.filter((one) => one.reason !== undefined));
  }
}

/** Every reason once, with the clients and rounds that had it. */
function drawReasons(body, found) {
  const groups = new Map();
  for (const one of found) {
    const title = `${one.what}: ${one.reason}`, clients = groups.get(title) ?? new Map();
    groups.set(title, clients.set(one.client, [...(clients.get(one.client) ?? []), one.line.round]));
  }
  const who = (clients) => [...clients].map(([client, rounds]) => `${client} in round ${rounds.join(", ")}`).join("; ");
  const items = [...groups].map(([title, clients]) => html("li", {}, title, html("span", { class: "meaning" }, ` (${who(clients)})`)));
  if (items.length) body.append(html("ul", { class: "reasons" }, items));
}

const SIGNS = {
  "took part": (size) => svg("rect", { x: -size, y: -size, width: 2 * size, height: 2 * size, rx: 2, class: "fill c0" }),
  quarantined: (size) => svg("path", { d: `M${-size} ${-size}L${size} ${size}M${-size} ${size}L${size} ${-size}`, class: "line c1", "stroke-width": 2.6 }),
  refused: (size) => svg("path", { d: `M0 ${-size}L${size} ${size}H${-size}z`, class: "line c1", "stroke-width": 1.8 }),
  "not sampled": () => svg("circle", { r: 1.5, class: "fill c6" }),
};

/** Client by round: a sign a cell, by shape as well as by colour; a failed round is named on the axis. */
function drawPresence(width, rounds, clients) {
  const left = Math.max(...clients.map(widthOf), 40) + 12, tall = 24, bottom = clients.length * tall;
  const size = Math.min(56, (width - left - 4) / rounds.length), half = Math.max(1.5, Math.min(7, size * 0.38));
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + (rounds.every((line) => line.successful) ? 22 : 38)}`, role: "img", "aria-label": "who took part in which round" });
  clients.forEach((client, r) => {
    root.append(svg("text", { x: left - 10, y: r * tall + 16, "text-anchor": "end" }, client));
    rounds.forEach((line, c) => {
      const { what, reason } = partOf(line, client), place = `translate(${left + (c + 0.5) * size} ${r * tall + 12})`;
      const tip = `${client}, round ${line.round}\n${what}${reason === undefined ? "" : `: ${reason}`}`;
      root.append(svg("g", { transform: place, class: "mark", "data-series": client, "data-part": what }, SIGNS[what](half), svg("rect", { x: -size / 2, y: -tall / 2, width: size, height: tall, class: "touch", tip })));
    });
  });
  const write = (text, c, y) => root.append(svg("text", { x: left + (c + 0.5) * size, y, "text-anchor": "middle" }, text));
  every(rounds.map((line) => line.round), size, (text, c) => write(text, c, bottom + 16));
  rounds.forEach((line, c) => line.successful || write(size > 36 ? "failed" : "†", c, bottom + 32));
  const shown = Object.keys(SIGNS).filter((what) => rounds.some((line) => clients.some((client) => partOf(line, client).what === what)));
  const items = shown.map((what) => html("li", {}, svg("svg", { class: "swatch", viewBox: "-12 -7 24 14", "aria-hidden": "true" }, SIGNS[what](5)), what));
  if (rounds.some((line) => !line.successful)) items.push(html("li", {}, size > 36 ? "failed: the model stayed as it was" : "† failed: the model stayed as it was"));
  return [root, html("ul", { class: "legend" }, items)];
}

function drawCertificates(body) {
  const head = [column("round", "0"), column("verdict"), column("relative error"), column("rank of the sum", "0"), column("norm of the change"), column("rank of the model", "0"), column("download cut"), column("reason")];
  for (const run of chosenRuns()) {
    const rows = roundsOf(run).map((line) => {
      const { certificate: proof = {}, ...update } = line.update ?? {};
      if (!line.successful) return remarked(line.round, "failed: too few sound replies, the model stayed as it was");
      return [line.round, proof.exact ? "exact" : "not exact", proof.relative_error, proof.rank, update.norm, update.merged_rank, update.download_error, proof.reason ?? ""];
    });
    body.append(table(head, rows, { title: several() ? run.label : null }));
  }
}

function drawConfig(body) {
  const runs = chosenRuns(), words = (state.words ?? "").toLowerCase();
  const keys = unique(runs.flatMap((run) => Object.keys(run.config))).filter((name) => `${name} ${DOC.meanings[name] ?? ""} ${runs.map((run) => JSON.stringify(run.config[name])).join(" ")}`.toLowerCase().includes(words));
  const differ = (name) => new Set(runs.map((run) => JSON.stringify(run.config[name]))).size > 1;
  const value = (found) => found === null || found === undefined ? "not set" : typeof found === "boolean" || isNumber(found) ? String(found) : Array.isArray(found) ? JSON.stringify(found) : found || "“”";
  const shown = state.differences ? keys.filter(differ) : keys;
  const rows = shown.map((name) => [html("code", {}, name), ...runs.map((run) => html("span", {}, value(run.config[name]))), html("span", { class: "meaning" }, DOC.meanings[name] ?? "")]);
  const node = table([column("setting"), ...runs.map((run) => column(several() ? run.label : "value")), column("meaning")], rows);
  for (const cell of node.querySelectorAll("td")) cell.className = "text";
  shown.length ? body.append(node) : none(body, "No setting fits.");
}
