// What detectors get wrong: precision against recall, the price of each kind of mistake, and which class is taken for which.
const wrong = { iou: "50", who: null };
const MISTAKES = {
  classification: ["Wrong class", "on an object of another class"], localisation: ["Badly placed", "right class, IoU 0.1 to 0.5"],
  both: ["Both", "wrong class and badly placed"], duplicate: ["Duplicate", "a surer detection has the object"],
  background: ["Background", "on no object"], missed: ["Missed", "objects that nothing points at"],
};
const analysed = (b) => b.encoder.filter((e) => b.detail[rowOf(b, e)]?.analysis);

function precisionPlot(b, width) {
  const chosen = picked().filter((e) => analysed(b).includes(e));
  if (!chosen.length) return null;
  const height = Math.max(240, Math.min(340, Math.round(width * 0.5)));
  const box = { left: 42, right: width - 14, top: 12, bottom: height - 38 };
  const root = frame(width, height, "Precision against recall");
  const x = (v) => box.left + (box.right - box.left) * v / 100;
  const curves = chosen.map((e) => [e, b.detail[rowOf(b, e)].analysis.curves[wrong.iou]]);
  const top = Math.max(10, Math.ceil(Math.max(...curves.flatMap(([, c]) => c)) / 10) * 10);
  const y = (v) => box.bottom - (box.bottom - box.top) * v / top;
  yAxis(root, y, ticks(0, top, 5), box, (v) => `${v}`);
  for (const v of [0, 20, 40, 60, 80, 100]) root.append(svg("text", { x: x(v), y: box.bottom + 16, "text-anchor": "middle" }, String(v)));
  root.append(svg("text", { class: "axis", x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, "Recall, %"));
  for (const [e, curve] of curves) {
    const line = svg("path", { d: curve.map((v, k) => `${k ? "L" : "M"}${x(k).toFixed(1)} ${y(v).toFixed(1)}`).join(""), fill: "none", stroke: "currentColor", "stroke-width": 2 });
    const area = mean(curve);
    const node = svg("g", { role: "img", "aria-label": `${isolate(encoderName(e))}: mean precision ${area.toFixed(1)} %` }, svg("title", {}, `${encoderName(e)}: AP${wrong.iou} ${area.toFixed(1)}`), line);
    node.style.color = colorOf(e);
    root.append(node);
  }
  return root;
}

function mistakeTable(b) {
  const chosen = picked().filter((e) => analysed(b).includes(e));
  if (!chosen.length) return el("p", { class: "empty" }, "Select encoders in the table to see their mistakes.");
  const facts = chosen.map((e) => b.detail[rowOf(b, e)].analysis);
  const most = Math.max(...facts.flatMap((a) => Object.values(a.errors).map(([, price]) => price)), 1);
  const body = Object.entries(MISTAKES).map(([kind, [name, said]]) => el("tr", {}, el("th", { scope: "row", title: said }, name),
    facts.map((a) => el("td", { class: "cell", title: count(a.errors[kind][0], kind === "missed" ? "object" : "detection"), style: { background: `rgba(var(--heat), ${(0.04 + 0.46 * Math.max(0, a.errors[kind][1]) / most).toFixed(3)})` } }, a.errors[kind][1].toFixed(1)))));
  return el("div", { class: "scroll" }, el("table", { class: "heat" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Mistake"), chosen.map((e) => el("th", { scope: "col" }, bdi(encoderName(e)))))), el("tbody", {}, body)));
}

function confusionPlot(b, width) {
  const a = b.detail[rowOf(b, wrong.who)]?.analysis;
  if (!a) return null;
  const names = [...b.classes, "nothing"];
  if (a.confusion.pairs) {
    return el("table", { class: "heat" }, el("thead", {}, el("tr", {}, ["Is", "Said to be", "Times"].map((t) => el("th", { scope: "col" }, t)))),
      el("tbody", {}, a.confusion.pairs.map(([t, s, n]) => el("tr", {}, el("th", { scope: "row" }, bdi(names[t])), el("td", {}, bdi(names[s])), el("td", { class: "cell" }, String(n))))));
  }
  const matrix = a.confusion.matrix;
  const left = 108, top = 96;
  const size = Math.max(9, Math.min(26, Math.floor((width - left - 8) / names.length)));
  const root = frame(left + size * names.length + 8, top + size * names.length + 8, "Confusion matrix: rows are the truth, columns what was said");
  root.style.maxWidth = `${left + size * names.length + 8}px`;
  matrix.forEach((row, t) => {
    const total = row.reduce((sum, n) => sum + n, 0);
    const is = t === names.length - 1 ? "background" : names[t];
    root.append(svg("text", { x: left - 6, y: top + size * (t + 0.5) + 4, "text-anchor": "end" }, svg("title", {}, is), short(is, 15)));
    const over = svg("text", { transform: `translate(${left + size * (t + 0.5) + 4} ${top - 6}) rotate(-60)` }, svg("title", {}, names[t]), short(names[t], 15));
    root.append(over);
    row.forEach((n, s) => {
      const share = total ? n / total : 0;
      root.append(svg("rect", { x: left + size * s, y: top + size * t, width: size - 1, height: size - 1, fill: `rgba(var(--heat), ${(0.05 + 0.9 * share).toFixed(3)})` },
        svg("title", {}, `${is} said to be ${names[s]}: ${n} of ${total}`)));
    });
  });
  return root;
}

function detectionPart() {
  const b = board();
  const known = analysed(b);
  if (!known.length) return null;
  if (!known.includes(wrong.who)) [wrong.who] = known;
  const curve = figure("Precision against recall", segments("IoU", [["50", "IoU 0.5"], ["75", "IoU 0.75"]], wrong.iou, (v) => { wrong.iou = v; curve.redraw(); }),
    (width) => precisionPlot(b, width), ["picked"], "Mean over the classes; the area under a curve is AP50 or AP75.");
  const price = figure("What mistakes cost", null, () => mistakeTable(b), ["picked"], "Points of AP50 that mending all mistakes of one kind would win, and nothing else changed.");
  const matrix = figure("Which class is taken for which", dropdown("Encoder", known.map((e) => [e, encoderName(e)]), wrong.who, (v) => { wrong.who = Number(v); matrix.redraw(); }),
    (width) => confusionPlot(b, width), [], "Rows are the truth, columns what was said, colours are shares of a row. Of each image as many boxes count as it has objects, the surest ones.", true);
  return part("mistakes", "Mistakes", "Of the selected encoders.", null, el("div", { class: "charts" }, curve, price, matrix));
}
