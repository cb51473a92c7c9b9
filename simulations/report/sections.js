// The sections in the order of the page: each is {id, title, wanted, about, controls, draw}.

const column = (text, unit = "") => ({ text, unit });

/** A table: `head` are columns with their unit, the first cell of a row is its heading; every number keeps its full value. */
function table(head, rows, { caption, total = -1, quiet = [] } = {}) {
  const cell = (value, unit, i) => isNumber(value)
    ? html("td", { class: "num" }, html("data", { value: String(value) }, format(value, unit)))
    : html("td", { class: typeof value === "string" && value.length > 12 ? `text ${quiet.includes(i) ? "meaning" : ""}` : "num" }, value instanceof Node ? value : format(value, unit));
  const numeric = head.map((_, i) => i > 0 && rows.some((row) => isNumber(row[i])));
  return html("div", { class: "scroll", tabindex: "0" }, html("table", {},
    caption ? html("caption", {}, caption) : null,
    html("thead", {}, html("tr", {}, head.map((one, i) => html("th", { scope: "col", class: numeric[i] ? "num" : "" }, one.text)))),
    html("tbody", {}, rows.map((row, r) => html("tr", { class: r === total ? "total" : "" },
      html("th", { scope: "row" }, row[0] instanceof Node ? row[0] : format(row[0], head[0].unit)),
      row.slice(1).map((value, i) => cell(value, head[i + 1].unit, i + 1)))))));
}

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

function linesFigure(body, { x, y, series, ...rest }) {
  const data = () => {
    const named = series.filter((one) => one.points.length);
    const places = unique(named.flatMap((one) => one.points.map((point) => point[0]))).sort((a, b) => a - b);
    const maps = named.map((one) => new Map(one.points));
    return table([column(x.label, x.unit ?? "0"), ...named.map((one) => column(one.name, y.unit))],
      places.map((place) => [place, ...maps.map((map) => map.get(place))]));
  };
  figure(body, { ...rest, data: rest.data ?? data, draw: (width) => drawLines(width, { x, y, series, label: rest.title }) });
}

const ROUND = { label: "round", kind: "round" };
const grid = (body) => body.appendChild(html("div", { class: "grid-of" }));
const none = (body, ...words) => body.append(html("p", { class: "none" }, ...words));

const METRICS = [
  ["held_out_loss", "Held-out loss", "nats per token, after the round", "", evaluationsOf],
  ["exact_match", "Exact match", "held-out answers that are right, after the round", "%", evaluationsOf],
  ["train_loss", "Training loss", "mean of the round's local steps", "", roundsOf],
  ["loss_before", "Probe loss of what clients received", "before their local steps", "", roundsOf],
  ["loss_after", "Probe loss of what clients replied", "after their local steps", "", roundsOf],
];

function drawLearning(body) {
  const place = grid(body);
  for (const [name, title, note, unit, lines] of METRICS)
    linesFigure(place, { id: `plot-${name}`, title, note, x: ROUND, y: { unit, kind: "zero" }, series: metricSeries(lines, name) });
}

const OUTCOMES = { exact_match: ["Exact match", "%"], held_out_loss: ["Held-out loss", ""], probe_loss: ["Probe loss", ""] };

function drawTraffic(body) {
  const name = state.outcome ?? "exact_match", [title, unit] = OUTCOMES[name];
  const series = chosenRuns().map((run) => {
    const traffic = trafficOf(run);
    const points = outcomes(run, name).map(([round, value]) => [traffic.get(round), value, round]).filter((point) => point[0] !== undefined)
      .map(([sent, value, round]) => [sent, value, `round ${round}, ${format(sent, "B")}`]);
    return { name: run.label, style: runStyle(run), points };
  });
  linesFigure(body, {
    id: "plot-traffic", title: `${title} against bytes`, x: { label: "bytes up and down until then, all chosen clients", kind: "zero", unit: "B" }, y: { unit, kind: "zero" }, series,
    data: () => table([column("run"), column("round", "0"), column("bytes", "B"), column(title.toLowerCase(), unit)],
      chosenRuns().flatMap((run) => outcomes(run, name).map(([round, value]) => [run.label, round, trafficOf(run).get(round), value]))),
  });
}

const HOW_TO_MEASURE = () => ["No round here was measured. Set ", html("code", {}, "aggregation.noise = true"), " in the run's configuration and every round's line has the figures of this section."];
const measuredRuns = () => chosenRuns().filter((run) => noiseLine(run));
const ofRun = (run, line) => DOC.kind === "noise" ? "" : `${several() ? `${run.label}, ` : ""}round ${line.round}`;
const provenance = (run, line) => [ofRun(run, line), line.noise.method && `replies of ${line.noise.method}’s clients`, line.noise.init && `A initialised ${line.noise.init}`].filter(Boolean).join(", ");

const ERRORS = [["relative_error", "relative error", "%"], ["cosine", "cosine", ""], ["gain", "gain", ""], ["spectral_error", "spectral error", "%"], ["client_error", "client error", "%"]];

function drawMethods(body) {
  for (const run of measuredRuns()) {
    const line = noiseLine(run), methods = line.noise.methods ?? {};
    const received = (found) => found.bytes_down && Object.keys(found.bytes_down).filter((client) => state.clients.has(client)).reduce((sum, client) => sum + found.bytes_down[client], 0);
    const rows = chosenMethods().filter((method) => methods[method]).map((method) => {
      const found = methods[method], why = found.not_applicable;
      return why !== undefined ? [method, null, null, null, null, null, null, `not applicable: ${why}`] : [method, ...ERRORS.map(([name]) => found[name]), received(found), ""];
    });
    const remarks = rows.some((row) => row[7]);
    const head = [column("method"), ...ERRORS.map(([, text, unit]) => column(text, unit)), column("bytes down", "B"), column("")];
    body.append(table(remarks ? head : head.slice(0, -1), remarks ? rows : rows.map((row) => row.slice(0, -1)), { caption: provenance(run, line) }));
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
  const series = chosenRuns().flatMap((run) => chosenMethods().map((method) => ({
    name: several() ? `${method}, ${run.label}` : method,
    style: several() ? { ...runStyle(run), color: methodStyle(method).color } : methodStyle(method),
    points: noisesOf(run).map((line) => [line.round, line.noise.methods?.[method]?.[name]]).filter((point) => point[1] !== undefined),
  })).filter((one) => one.points.length));
  const values = series.flatMap((one) => one.points.map((point) => point[1])).filter(isNumber);
  const wide = Math.min(...values) > 0 && Math.max(...values) > 50 * Math.min(...values);
  linesFigure(body, { ...rest, x: ROUND, y: { unit, kind: wide ? "log" : "zero" }, series });
}

const MODULE_FIGURES = { norm: ["Norm of the change", ""], spectral_norm: ["Spectral norm of the change", ""], effective_rank: ["Effective rank of the change", ""], entropy: ["Entropy of the change’s spectrum", ""] };
const heatOptions = () => [
  ...chosenMethods().map((method) => [`error:${method}`, `relative error of ${method}`]),
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
  })));
  const effective = measuredRuns().map((run) => noiseLine(run).noise.modules?.[module]?.effective_rank).filter(isNumber);
  const note = `part of the change’s squared singular values within its first r directions${effective.length ? `; effective rank ${effective.map((v) => format(v)).join(", ")}` : ""}`;
  linesFigure(body, { id: "plot-energy", title: module ? `Energy against rank: ${module}` : "Energy against rank, all modules", note, x: { label: "rank r", kind: "rank" }, y: { unit: "%", kind: "zero" }, series });
}

function drawShare(body) {
  const place = grid(body), runs = chosenRuns().filter((run) => noisesOf(run).length);
  const series = (run, read) => chosenClients().map((client) => ({ name: client, style: clientStyle(client), points: roundsOf(run).map((line) => [line.round, read(line, client)]).filter((point) => point[1] !== undefined) })).filter((one) => one.points.length);
  const title = (run, text) => several() ? `${text}, ${run.label}` : text;
  if (!runs.length) none(place, ...HOW_TO_MEASURE());
  for (const run of runs) {
    const all = series(run, (line, client) => line.noise?.share?.[client]), rest = { id: `plot-share-${runIndex(run)}`, title: title(run, "Share in the change"), note: "signed; the shares of all clients sum to one" };
    if (noisesOf(run).length > 1) { linesFigure(place, { ...rest, x: ROUND, y: { unit: "%", kind: "zero" }, series: all }); continue; }
    const items = all.map((one) => ({ ...one, value: one.points[0][1] }));
    figure(place, { ...rest, draw: (width) => drawBars(width, { items, unit: "%", label: rest.title }), data: () => table([column("client"), column("share", "%")], items.map((item) => [item.name, item.value])) });
  }
  if (DOC.kind === "runs") for (const run of chosenRuns())
    linesFigure(place, { id: `plot-weight-${runIndex(run)}`, title: title(run, "Weight"), note: "p in the sum of the round’s replies", x: ROUND, y: { unit: "%", kind: "zero" }, series: series(run, (line, client) => valueOf(line, client, "weight")) });
}
