// What the numbers mean: the task, the protocol with every field, and the key inside which ranks exist.
function protocolCard(protocol) {
  return el("div", {}, el("h3", {}, "Protocol ", bdi(protocol.id)),
    definitions([["hash", mono(protocol.hash)], ["version", protocol.version], ...Object.entries(protocol.settings)]));
}

// Numbers of papers: beside the board, never in it, because their protocols are their own.
function printedPart() {
  const b = board();
  if (!b.printed.length) return null;
  const metric = headline(b);
  const few = b.printed.length <= 12;
  const body = () => el("div", { class: "scroll" }, el("table", { class: "printed" },
    el("thead", {}, el("tr", {}, ["Printed as", plural(metric), "Source"].map((text, k) => el("th", { scope: "col", class: k === 1 ? "num" : "who" }, text)))),
    el("tbody", {}, b.printed.map(([label, value, source, note]) => el("tr", {}, el("td", { class: "who" }, bdi(label), note ? el("small", {}, bdi(note)) : null),
      el("td", { class: "num" }, String(value)), el("td", { class: "dim small" }, bdi(source)))))));
  return part("printed", "Printed elsewhere", "Numbers that papers and repositories print for this task and metric. Their protocols differ from this board's: they have no rank.", null,
    few ? el("div", { class: "card" }, body()) : el("details", { class: "card" }, el("summary", {}, `${count(b.printed.length, "printed number")}, best first`), body()));
}

function cardsPart() {
  const b = board();
  const { task } = b;
  const options = Object.entries(task.options).map(([k, v]) => `${k} = ${plain(v)}`).join(", ");
  const others = D.protocols.filter((_, k) => k !== b.protocol);
  return part("protocol", "What these numbers mean", "Encoders share a board, and have ranks, only where every field of its key agrees.", null,
    el("div", { class: "cards" },
      el("div", { class: "card pad" }, protocolCard(D.protocols[b.protocol])),
      el("div", { class: "card pad" }, el("h3", {}, "Task ", bdi(task.name)), definitions([["kind", task.kind], ["dataset", task.dataset], ["options", options],
        ["train", `${task.train_split}, ${count(task.n_train, "image")}`], ["test", `${task.test_split}, ${count(task.n_test, "image")}`],
        ["train fingerprint", mono(task.train_fingerprint)], ["test fingerprint", mono(task.test_fingerprint)], ["classes", b.classes.length || null], ["license", task.license],
        ["intervals", b.interval ? `${b.interval.kind}, ${100 * b.interval.level} %, ${b.interval.resamples.toLocaleString("en")} resamples of ${b.interval.groups ? `${b.interval.groups} groups` : "images"}` : null],
        ["rank ranges", b.method === "paired" ? "bootstrap over the same images for all encoders" : "draws from each encoder's interval"]])),
      el("div", { class: "card pad" }, el("h3", {}, "Board ", mono(b.key)), definitions(Object.entries(b.comparability)))),
    others.length ? el("details", { class: "card", style: { "margin-top": "16px" } }, el("summary", {}, `The other ${count(others.length, "protocol")} of this page`),
      el("div", { class: "pad cards" }, others.map(protocolCard))) : null);
}
