// Drawing. Every string from the data becomes a text node or a plain attribute: nothing is ever parsed as HTML.

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "tip") node.tip = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined));
  return node;
}
const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const isNumber = (value) => typeof value === "number";
const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** A value for reading: three digits that count, and a unit ("%": a fraction in percent, "B": bytes, "0": a count).
    `full` keeps the zeros at the end, for the columns of a table. */
function format(value, unit = "", full = false) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (!isNumber(value)) return Array.isArray(value) ? value.map((entry) => format(entry, "0")).join(", ") : String(value);
  if (unit === "%" && (value === 0 || Math.abs(value) >= 1e-4)) return `${digits(100 * value, 1, full)}\u202f%`;
  if (unit === "B") return bytes(value);
  if (unit === "0") return String(value).replace("-", "−");
  const size = Math.abs(value);
  if (value === 0 || (size >= 1e-3 && size < 1e5)) return digits(value, size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3, full);
  const [mantissa, exponent] = value.toExponential(1).split("e");
  const power = exponent.replace("+", "").replace("-", "⁻").replace(/\d/g, (digit) => SUPERSCRIPTS[digit]);
  return `${mantissa} × 10${power}`.replace("-", "−");
}
const digits = (value, decimals, full = false) =>
  (full && value !== 0 ? value.toFixed(decimals) : String(Number(value.toFixed(decimals)))).replace("-", "−");
function bytes(value) {
  const at = value < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(value) / 3));
  return `${digits(value / 1000 ** at, value / 1000 ** at >= 100 ? 0 : 1)} ${["B", "kB", "MB", "GB", "TB"][at]}`;
}

/** Okabe and Ito's colours; dash and marker change along, so that none of the three is needed to tell lines apart. */
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "12 3", "1 2", "9 3 2 3 2 3"];
const MARKERS = [
  "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0", "M-3.2-3.2h6.4v6.4h-6.4z", "M0-4.2L4 3.2H-4z", "M0-4.6L4.6 0L0 4.6L-4.6 0z",
  "M0 4.2L4-3.2H-4z", "M-1.3-4.3h2.6v3h3v2.6h-3v3h-2.6v-3h-3v-2.6h3z", "M0-4.5L4.3-1.4L2.6 3.7H-2.6L-4.3-1.4z", "M-4.4-2h8.8v4h-8.8z",
];
const look = (index) => ({
  color: `c${index % 8}`, dash: DASHES[index % 8], marker: MARKERS[(index + Math.floor(index / 8)) % 8],
});
const INK = { color: "ink", dash: "", marker: MARKERS[0], width: 2.6 };

/** A short piece of a series' line with its marker, 22 wide. */
const sample = (style) => [
  svg("path", { d: "M0 0H22", class: `line ${style.color}`, "stroke-dasharray": style.dash, "stroke-width": style.width ?? 1.6 }),
  svg("path", { d: style.marker, class: `dot ${style.color}`, transform: "translate(11 0)" }),
];
const swatch = (style) => svg("svg", { class: "swatch", viewBox: "-1 -6 24 12", "aria-hidden": "true" }, sample(style));

const pen = document.createElement("canvas").getContext("2d");
function widthOf(text) {
  pen.font = "12px system-ui, sans-serif";
  return pen.measureText(text).width;
}

/** About `count` round numbers from at most `low` to at least `high`. */
function ticks(low, high, count = 4) {
  const rough = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: Math.max(last, first + 1) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function axis(values, kind) {
  const low = Math.min(...values), high = Math.max(...values);
  if (kind === "round") {
    const step = Math.max(1, Math.ceil((high - low) / 8));
    const marks = Array.from({ length: Math.floor((high - low) / step) + 1 }, (_, i) => high - i * step);
    return { low, high: high === low ? low + 1 : high, marks, map: (v) => v };
  }
  if (kind === "rank") return { low: Math.log2(low), high: Math.log2(high) || 1, marks: [...new Set(values)].sort((a, b) => a - b), map: Math.log2 };
  if (kind === "log") {
    const first = Math.floor(Math.log10(low)), last = Math.max(first + 1, Math.ceil(Math.log10(high)));
    const marks = Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
    return { low: first, high: last, marks, map: Math.log10 };
  }
  const marks = ticks(Math.min(low, 0), Math.max(high, 0));
  if (kind === "amount") return { low: 0, high, marks: marks.filter((mark) => mark <= high), map: (v) => v };
  return { low: marks[0], high: marks[marks.length - 1], marks, map: (v) => v };
}

/** Places of labels as near to `wanted` as they can be, `step` apart, within 0..height. */
function spread(wanted, step, height) {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
  const places = [...wanted];
  order.forEach((i, n) => (places[i] = Math.max(wanted[i], n ? places[order[n - 1]] + step : step / 2)));
  [...order].reverse().forEach((i, n) => {
    const under = n ? places[order[order.length - n]] - step : height;
    places[i] = Math.min(places[i], under);
  });
  return places;
}

/** Lines: series are {name, style, points: [[x, y, what]], faint}; a point without a number breaks the line. */
function drawLines(width, { x, y, series, label }) {
  const shown = series.map((one) => ({ ...one, points: one.points.filter((p) => isNumber(p[0]) && isNumber(p[1])) })).filter((one) => one.points.length);
  if (!shown.length) return null;
  const flat = shown.flatMap((one) => one.points);
  const across = axis(flat.map((p) => p[0]), x.kind), up = axis(flat.map((p) => p[1]), y.kind);
  const named = shown.filter((one) => !one.faint);
  const height = 220, room = 16, left = Math.max(...up.marks.map((v) => widthOf(format(v, y.unit)))) + 10;
  const wide = Math.max(0, ...named.map((one) => widthOf(one.name))) + 42;
  const direct = named.length * room <= height && wide < 0.42 * width;
  const right = width - (direct ? wide : 10), bottom = height + 8;
  const px = (v) => left + 6 + ((across.map(v) - across.low) / (across.high - across.low)) * (right - left - 12);
  const py = (v) => bottom - ((up.map(v) - up.low) / (up.high - up.low)) * height;
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 36}`, role: "img", "aria-label": label });
  for (const mark of up.marks) {
    root.append(svg("path", { d: `M${left} ${py(mark)}H${right}`, class: mark === 0 ? "zero" : "grid" }));
    root.append(svg("text", { x: left - 6, y: py(mark) + 4, "text-anchor": "end" }, format(mark, y.unit)));
  }
  const taken = [];
  for (const mark of across.marks) {
    const text = format(mark, x.unit ?? "0"), reach = widthOf(text) / 2 + 4;
    if (taken.some(([at, other]) => Math.abs(at - px(mark)) < reach + other)) continue;
    taken.push([px(mark), reach]);
    root.append(svg("text", { x: px(mark), y: bottom + 16, "text-anchor": "middle" }, text));
  }
  root.append(svg("text", { x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle", class: "quiet" }, x.label));
  const ends = spread(named.map((one) => py(one.points[one.points.length - 1][1])), room, bottom);
  for (const one of shown) root.append(drawSeries(one, px, py, x, y));
  named.forEach((one, i) => direct && root.append(endLabel(one, px, py, right, ends[i])));
  return direct ? [root] : [root, legend(named)];
}

function drawSeries(one, px, py, x, y) {
  const path = one.points.map((p, i) => `${i ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join("");
  const { color, dash, marker, width } = one.style;
  const group = svg("g", { class: `mark ${one.faint ? "faint" : ""}`, "data-series": one.name });
  group.append(svg("path", { d: path, class: `line ${color}`, "stroke-dasharray": dash, "stroke-width": width ?? 1.6 }));
  for (const [at, value, what] of one.faint ? [] : one.points) {
    const place = `translate(${px(at).toFixed(1)} ${py(value).toFixed(1)})`;
    const tip = `${one.name}\n${what ?? `${x.label} ${format(at, x.unit ?? "0")}`}: ${format(value, y.unit)}`;
    if (one.points.length <= 60) group.append(svg("path", { d: marker, class: `dot ${color}`, transform: place }));
    group.append(svg("circle", { r: 10, class: "touch", transform: place, tip }));
  }
  return group;
}

function endLabel(one, px, py, right, at) {
  const [x, y] = one.points[one.points.length - 1];
  return svg("g", {},
    svg("path", { d: `M${px(x) + 5} ${py(y)}L${right + 6} ${at}`, class: "leader" }),
    svg("g", { transform: `translate(${right + 8} ${at})` }, sample(one.style)),
    svg("text", { x: right + 34, y: at + 4 }, one.name));
}

const legend = (series) => html("ul", { class: "legend" }, series.map((one) => html("li", {}, swatch(one.style), one.name)));

/** Bars from zero, one a row: items are {name, style, value}. */
function drawBars(width, { items, unit, label }) {
  const shown = items.filter((item) => isNumber(item.value));
  if (!shown.length) return null;
  const scale = axis(shown.map((item) => item.value)), row = 26;
  const left = Math.max(...shown.map((item) => widthOf(item.name))) + 12, right = width - 64;
  const px = (v) => left + ((v - scale.low) / (scale.high - scale.low)) * (right - left);
  const root = svg("svg", { viewBox: `0 0 ${width} ${row * shown.length + 8}`, role: "img", "aria-label": label });
  shown.forEach(({ name, style, value }, i) => {
    const y = i * row + 4, tip = `${name}: ${format(value, unit)}`;
    root.append(svg("text", { x: left - 8, y: y + 14, "text-anchor": "end" }, name));
    const from = Math.min(px(0), px(value)), size = Math.max(1, Math.abs(px(value) - px(0)));
    root.append(svg("rect", { x: from, y, width: size, height: 18, class: `mark fill ${style.color}`, "data-series": name, tip }));
    root.append(svg("text", { x: Math.max(px(0), px(value)) + 6, y: y + 14 }, format(value, unit)));
  });
  root.append(svg("path", { d: `M${px(0)} 0V${row * shown.length + 4}`, class: "zero" }));
  return [root];
}

/** A matrix of cells: `cell(row, column)` is {value, tip}, or nothing for a gap; `low`..`high` bound the colours. */
function drawHeat(width, { rows, columns, cell, low, high, unit, label, axisLabel }) {
  const left = Math.max(...rows.map((row) => widthOf(row))) + 10, tall = 24;
  const size = Math.min(44, (width - left - 4) / columns.length), bottom = rows.length * tall;
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 38}`, role: "img", "aria-label": label });
  const cells = rows.flatMap((row) => columns.map((column) => cell(row, column))).filter(Boolean);
  const written = cells.every(({ value }) => widthOf(format(value, unit)) < size - 4);
  rows.forEach((row, r) => {
    root.append(svg("text", { x: left - 8, y: r * tall + 16, "text-anchor": "end" }, row));
    columns.forEach((column, c) => {
      const x = left + c * size, y = r * tall;
      const found = cell(row, column);
      if (!found) return;
      const place = { x: x + 0.5, y: y + 1, width: Math.max(1, size - 1), height: tall - 2, tip: found.tip };
      if (!isNumber(found.value)) {
        const cross = `M${x + 2} ${y + 3}L${x + size - 2} ${y + tall - 3}M${x + 2} ${y + tall - 3}L${x + size - 2} ${y + 3}`;
        return root.append(svg("path", { d: cross, class: "undefined" }), svg("rect", { ...place, class: "touch" }));
      }
      const depth = high > low ? (found.value - low) / (high - low) : 1;
      root.append(svg("rect", { ...place, class: "cell mark", "fill-opacity": (0.08 + 0.92 * depth).toFixed(3) }));
      if (written) root.append(svg("text", { x: x + size / 2, y: y + 16, "text-anchor": "middle", class: depth > 0.6 ? "on" : "off" }, format(found.value, unit)));
    });
  });
  every(columns, size, (column, c) => root.append(svg("text", { x: left + (c + 0.5) * size, y: bottom + 15, "text-anchor": "middle" }, column)));
  root.append(svg("text", { x: left + (columns.length * size) / 2, y: bottom + 32, "text-anchor": "middle", class: "quiet" }, axisLabel));
  return [root, key(low, high, unit, cells.some(({ value }) => !isNumber(value)))];
}

/** Calls `write(text, index)` for every n-th of the values, so that their texts fit columns `size` wide. */
function every(values, size, write) {
  const stride = Math.ceil((Math.max(...values.map((value) => widthOf(String(value)))) + 6) / size);
  values.forEach((value, i) => i % stride === 0 && write(String(value), i));
}

function key(low, high, unit, gaps) {
  const steps = Array.from({ length: 12 }, (_, i) =>
    svg("rect", { x: i * 10, y: 0, width: 10, height: 10, class: "cell", "fill-opacity": 0.08 + (0.92 * i) / 11 }));
  const ramp = svg("svg", { viewBox: "0 0 120 10", class: "ramp", "aria-hidden": "true" }, steps);
  return html("p", { class: "key" }, gaps ? "crossed: undefined\u2003" : null, format(low, unit), ramp, format(high, unit));
}
