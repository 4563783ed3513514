// Helpers that every part uses. Text goes in as text nodes and attributes only: nothing here parses HTML.
const D = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const MOST_PICKED = 8;

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (key === "value" || key === "checked" || key === "disabled" || key === "selected") node[key] = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(4)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : String(child));
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const bdi = (text) => el("bdi", { dir: "auto", title: text }, text);
// A task's name may break after a slash.
const taskName = (text) => el("bdi", { dir: "auto", title: text }, text.split("/").flatMap((piece, k) => (k ? ["/", el("wbr"), piece] : [piece])));
const isolate = (text) => `\u2068${text}\u2069`;
const short = (text, most) => {
  const letters = Array.from(text.replace(/\s+/g, " "));
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
};

// Numbers. A dash stands for "not known", which is not the same as zero.
const DASH = "–";
const count = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many || `${one}s`}`;
function points(value, metric, digits) {
  if (value === null || value === undefined) return DASH;
  if (digits !== undefined) return value.toFixed(digits);
  return metric.unit === "%" ? value.toFixed(1) : value.toFixed(3);
}
function large(value, suffixes) {
  if (value === null || value === undefined) return DASH;
  if (value === 0) return "0";
  const power = Math.max(0, Math.min(suffixes.length - 1, Math.floor(Math.log10(Math.abs(value)) / 3)));
  const scaled = value / 1000 ** power;
  return `${scaled >= 100 ? scaled.toFixed(0) : scaled.toPrecision(3).replace(/\.0+$/, "")}${suffixes[power]}`;
}
const params = (v) => large(v, ["", " K", " M", " B"]);
const flops = (v) => large(v, ["", " K", " M", " G", " T"]);
const speed = (v) => (v === null || v === undefined ? DASH : v >= 100 ? Math.round(v).toLocaleString("en") : v.toPrecision(2));
const bytes = (v) => (v >= 1e9 ? `${(v / 1e9).toFixed(1)} GB` : v >= 1e6 ? `${(v / 1e6).toFixed(1)} MB` : `${(v / 1e3).toFixed(1)} kB`);
const plural = (metric) => (metric.unit === "%" ? `${metric.title}, %` : metric.unit ? `${metric.title}, ${metric.unit}` : metric.title);

const encoderName = (number) => D.encoders[number].label;

// What the reader chose. Parts listen to the names of what they depend on.
const state = { board: 0, picked: [], theme: null, printing: false };
const listeners = [];
const on = (names, act) => listeners.push([new Set(names), act]);
function changed(name) {
  for (const [names, act] of listeners) if (names.has(name)) act();
}
const board = () => D.boards[state.board];
const headline = (b) => b.metrics[0];
const rowOf = (b, encoder) => b.encoder.indexOf(encoder);
const colorOf = (encoder) => {
  const at = state.picked.indexOf(encoder);
  return at < 0 ? null : `var(--c${at})`;
};
function pick(encoder, wanted) {
  const at = state.picked.indexOf(encoder);
  if (wanted && at < 0) {
    const free = state.picked.indexOf(null);
    if (free >= 0) state.picked[free] = encoder;
    else if (state.picked.length < MOST_PICKED) state.picked.push(encoder);
  } else if (!wanted && at >= 0) state.picked[at] = null; // the others keep their colours
  changed("picked");
}
const picked = () => state.picked.filter((e) => e !== null);
function pickBest() {
  state.picked = board().encoder.slice(0, board().encoder.length <= MOST_PICKED ? MOST_PICKED : 5);
}

// Titles of boards: the task, and only those of protocol, view and key that tell it from other boards of that task.
const NAMES = D.boards.map((b) => {
  const alike = D.boards.filter((other) => other.task.name === b.task.name);
  const facts = [(o) => D.protocols[o.protocol].id, (o) => o.view];
  const rest = facts.filter((fact) => new Set(alike.map(fact)).size > 1).map((fact) => fact(b));
  const twins = alike.filter((other) => facts.every((fact) => fact(other) === fact(b)));
  if (twins.length > 1) rest.push(b.key.slice(0, 6));
  return { task: b.task.name, rest: rest.join(" · ") };
});
const TITLES = NAMES.map(({ task, rest }) => (rest ? `${task} · ${rest}` : task));

// One tooltip for the whole page.
const tip = el("div", { class: "tip", role: "status", hidden: true });
function showTip(at, name, lines) {
  tip.replaceChildren(el("b", {}, bdi(name)), ...lines.map((line) => el("div", {}, line)));
  tip.hidden = false;
  placeTip(at);
}
function placeTip(at) {
  const box = at.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const x = Math.max(8, Math.min(window.innerWidth - width - 8, box.left + box.width / 2 - width / 2));
  const y = box.top - height - 10 < 8 ? box.bottom + 10 : box.top - height - 10;
  tip.style.left = `${x}px`;
  tip.style.top = `${y}px`;
}
const hideTip = () => { tip.hidden = true; };

// Small controls.
function segments(legend, options, chosen, act) {
  const name = `s${segments.next = (segments.next || 0) + 1}`;
  return el("fieldset", { class: "segments" }, el("legend", {}, legend), options.map(([value, text]) =>
    el("label", {}, el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => act(value) }),
      el("span", {}, text))));
}
function dropdown(label, options, chosen, act) {
  const select = el("select", { "aria-label": label, onchange: () => act(select.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
  return select;
}
function definitions(pairs) {
  return el("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) =>
    [el("dt", {}, bdi(name)), el("dd", {}, value instanceof Node ? value : bdi(plain(value)))]));
}
function plain(value) {
  if (typeof value === "string") return value;
  if (Array.isArray(value) && value.every((v) => typeof v !== "object" || v === null)) return value.join(", ");
  return JSON.stringify(value);
}
const mono = (text) => el("code", {}, text);
const part = (id, title, lead, controls, ...content) =>
  el("section", { class: "part", id, "aria-labelledby": `${id}-title` },
    el("header", {}, el("div", { class: "grow" }, el("h2", { id: `${id}-title` }, title), lead ? el("p", { class: "dim small" }, lead) : null),
      controls ? el("div", { class: "controls" }, controls) : null), content);
function pager(total, page, size, act, unit) {
  const pages = Math.max(1, Math.ceil(total / size));
  const first = total ? page * size + 1 : 0;
  if (state.printing || pages === 1) return null;
  return el("div", { class: "pager" }, el("span", { class: "grow" }, `${first} to ${Math.min(total, (page + 1) * size)} of ${count(total, unit)}`),
    el("button", { class: "button", type: "button", disabled: page === 0, onclick: () => act(page - 1) }, "Previous"),
    el("button", { class: "button", type: "button", disabled: page >= pages - 1, onclick: () => act(page + 1) }, "Next"));
}
