// The page: its sections, the filter, the theme, the tip.

const PROBLEM = "What the replies’ exact sum would lose under other methods, each computed from the same replies in the same round.";
const ANY_NOISE = () => DOC.runs.some((run) => noisesOf(run).length);
const WHOLE = DOC.kind === "runs";
const rounds = () => unique(DOC.runs.flatMap((run) => noisesOf(run).map((line) => line.round))).sort((a, b) => a - b);
const roundOptions = () => [["last", "last"], ...rounds().map((round) => [String(round), String(round)])];
const moduleOptions = () => [["", "all, pooled"], ...Object.keys(DOC.modules).map((name) => [name, name])];
const errorOptions = () => ERRORS.map(([name, text]) => [name, text]);

const SECTIONS = [
  { id: "facts", draw: drawFacts, wanted: WHOLE },
  { id: "comparison", title: "What federation is worth", about: `${unique(DOC.runs.filter((run) => run.comparison).map((run) => run.score_title ?? "Held-out loss")).join(" or ")} on everybody’s held-out examples: the base model, each client trained alone, and the global model.`, draw: drawComparison, wanted: DOC.runs.some((run) => run.comparison) },
  { id: "learning", title: "Losses and accuracy", draw: drawLearning, wanted: WHOLE },
  { id: "traffic", title: "Accuracy against traffic", about: "Bytes of the rounds’ training messages; evaluations are not counted.", draw: drawTraffic, wanted: WHOLE, controls: [["outcome", "outcome", () => Object.entries(OUTCOMES).map(([name, [text]]) => [name, text.toLowerCase()])]] },
  { id: "noise", title: "Noise", about: PROBLEM, draw: drawNoise, wanted: true, controls: ANY_NOISE() ? [["round", "round", roundOptions], ["error", "by round", errorOptions], ["heat", "heat map", heatOptions]] : [] },
  { id: "energy", title: "Energy against rank", draw: drawEnergy, wanted: true, controls: ANY_NOISE() ? [["module", "module", moduleOptions]] : [] },
  { id: "participation", title: "Participation and quarantine", draw: drawParts, wanted: WHOLE },
  { id: "share", title: "Shares of the clients", draw: drawShare, wanted: true },
  { id: "certificates", title: "Certificates", about: "Each round’s change, measured against the exact weighted sum of its replies.", draw: drawCertificates, wanted: WHOLE },
  { id: "config", title: "Configuration", draw: drawConfig, wanted: WHOLE },
].filter((section) => section.wanted);

function render() {
  for (const section of SECTIONS) {
    for (const [name, , options] of section.controls ?? []) fill(section.selects[name], name, options());
    section.body.replaceChildren();
    section.draw(section.body);
  }
  const parts = [[chosenRuns(), DOC.runs, "runs"], [chosenClients(), DOC.clients, "clients"], [chosenMethods(), DOC.methods, "methods"]];
  const counts = parts.filter(([, all]) => all.length > 1).map(([some, all, what]) => some.length === all.length ? `all ${all.length} ${what}` : `${some.length} of ${all.length} ${what}`);
  document.getElementById("filter-state").textContent = `Filter: ${counts.join(", ") || "nothing to choose"}`;
}

/** The options of a select; what was chosen stays, or the first takes its place. */
function fill(select, name, options) {
  const values = options.map(([value]) => value);
  if (!values.includes(state[name])) state[name] = values[0];
  if (JSON.stringify(values) !== select.dataset.values) {
    select.replaceChildren(...options.map(([value, text]) => html("option", { value }, text)));
    select.dataset.values = JSON.stringify(values);
  }
  select.value = state[name] ?? "";
  select.parentNode.hidden = values.length < 2;
}

function construct() {
  const main = document.getElementById("main");
  const links = SECTIONS.filter((section) => section.title).map((section) => html("a", { href: `#${section.id}` }, section.title));
  main.replaceChildren(html("h1", {}, DOC.title), html("nav", { "aria-label": "sections" }, links));
  for (const section of SECTIONS) {
    section.selects = {};
    const controls = html("div", { class: "controls" }, (section.controls ?? []).map(([name, text]) => {
      section.selects[name] = html("select", { id: `choose-${name}`, onchange: (event) => { state[name] = event.target.value; render(); } });
      return html("label", {}, text, section.selects[name]);
    }), section.id === "config" ? configControls() : null);
    section.body = html("div", { class: "body" });
    main.append(html("section", { id: section.id }, section.title ? html("h2", {}, section.title) : null, section.about ? html("p", {}, section.about) : null, controls.children.length ? controls : null, section.body));
  }
}

function configControls() {
  const words = html("input", { type: "search", id: "config-words", placeholder: "find a setting", "aria-label": "find a setting", oninput: (event) => { state.words = event.target.value; render(); } });
  const differences = html("label", {}, html("input", { type: "checkbox", id: "config-differences", onchange: (event) => { state.differences = event.target.checked; render(); } }), "only what differs");
  return DOC.runs.length > 1 ? [words, differences] : [words];
}

function constructFilter() {
  const form = document.getElementById("filter-form");
  form.addEventListener("submit", (event) => event.preventDefault());
  const groups = [
    ["runs", "Runs", DOC.runs.map((run) => run.label), (label) => look(DOC.runs.findIndex((run) => run.label === label))],
    ["ways", "Runs by method", RUN_METHODS], ["clients", "Clients", DOC.clients, clientStyle], ["methods", "Noise of", DOC.methods, methodStyle],
  ].filter(([name, , values]) => values.length > 1 || (name === "clients" && values.length));
  for (const [name, title, values, style] of groups) form.append(choices(name, title, values, style));
  if (WHOLE && DOC.clients.length > 1) form.append(html("fieldset", {}, html("legend", {}, "Lines"), html("div", { class: "choices" },
    [["each", "each client"], ["mean", "mean of the clients"]].map(([value, text]) => html("label", {},
      html("input", { type: "radio", name: "view", value, checked: state.view === value, onchange: () => { state.view = value; render(); } }), text)))));
}

function choices(name, title, values, style) {
  const boxes = values.map((value) => html("input", { type: "checkbox", name, value, checked: true, onchange: () => set() }));
  const set = () => { state[name] = new Set(boxes.filter((box) => box.checked).map((box) => box.value)); render(); };
  const button = (text, checked) => html("button", { type: "button", onclick: () => { boxes.forEach((box) => (box.checked = checked)); set(); } }, text);
  return html("fieldset", {}, html("legend", {}, title, values.length > 3 ? [button("all", true), button("none", false)] : null),
    html("div", { class: "choices" }, boxes.map((box, i) => html("label", {}, box, style ? swatch(style(values[i])) : null, values[i]))));
}

function constructTheme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => (button.textContent = dark() ? "Light" : "Dark");
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
}

function constructTip() {
  const tip = document.getElementById("tip");
  document.addEventListener("pointerover", (event) => {
    tip.hidden = !event.target.tip;
    if (tip.hidden) return;
    tip.textContent = event.target.tip;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(event.clientX + 12, innerWidth - box.width - 6))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
}

construct();
constructFilter();
constructTheme();
constructTip();
let drawnWidth = 0;
new ResizeObserver(([entry]) => {
  if (Math.abs(entry.contentRect.width - drawnWidth) < 1) return;
  drawnWidth = entry.contentRect.width;
  render();
}).observe(document.getElementById("main"));
