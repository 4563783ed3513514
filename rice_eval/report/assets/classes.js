// Per-class values of the selected encoders.
const heat = { metric: null, order: "given", all: false };

function classesPart() {
  const b = board();
  if (!b.classes.length) return null;
  const metrics = [...new Set(Object.values(b.detail).flatMap((d) => Object.keys(d.classes)))];
  if (!metrics.length) return null;
  // The values that the headline is the mean of come first: IoU under mIoU.
  if (!metrics.includes(heat.metric)) heat.metric = metrics.find((m) => headline(b).name.includes(m)) || metrics[0];
  const slot = el("div", {});
  const draw = () => slot.replaceChildren(...classTable(b));
  draw();
  classesPart.draw = draw;
  return part("classes", "By class", null, [
    metrics.length > 1 ? dropdown("Metric", metrics.map((m) => [m, m]), heat.metric, (v) => { heat.metric = v; draw(); }) : null,
    dropdown("Order of classes", [["given", "Order of the dataset"], ["hard", "Hardest first"], ["spread", "Largest spread first"], ["name", "By name"]], heat.order, (v) => { heat.order = v; draw(); }),
  ], slot);
}
on(["picked", "print"], () => classesPart.draw?.());

function classTable(b) {
  const MOST = 40;
  const chosen = picked().map((e) => [e, rowOf(b, e)]).filter(([, r]) => r >= 0);
  const shown = chosen.filter(([, r]) => b.detail[r]?.classes[heat.metric]);
  const left = chosen.filter(([, r]) => !b.detail[r]?.classes[heat.metric]).map(([e]) => e);
  if (!shown.length) return [el("p", { class: "card empty" }, "Select encoders in the table to see their classes.")];
  const value = (r, c) => b.detail[r].classes[heat.metric][c];
  const known = (c) => shown.map(([, r]) => value(r, c)).filter((v) => v !== null);
  const spread = (c) => (known(c).length ? Math.max(...known(c)) - Math.min(...known(c)) : -1);
  const order = b.classes.map((_, c) => c);
  const level = (c) => mean(known(c)) ?? Infinity;
  if (heat.order === "hard") order.sort((x, y) => level(x) - level(y) || x - y);
  if (heat.order === "spread") order.sort((x, y) => spread(y) - spread(x) || x - y);
  if (heat.order === "name") order.sort((x, y) => b.classes[x].localeCompare(b.classes[y]) || x - y);
  const rows = heat.all || state.printing ? order : order.slice(0, MOST);
  const every = shown.flatMap(([, r]) => b.detail[r].classes[heat.metric]).filter((v) => v !== null);
  const [low, high] = [Math.min(...every, 0), Math.max(...every)];
  const higher = (b.metrics.find((m) => m.name === heat.metric) || { higher: true }).higher;
  const body = rows.map((c) => {
    const values = known(c);
    const best = values.length > 1 ? (higher ? Math.max(...values) : Math.min(...values)) : null;
    return el("tr", {}, el("th", { scope: "row" }, bdi(b.classes[c])), shown.map(([, r]) => {
      const v = value(r, c);
      return v === null ? el("td", { class: "cell dim", title: "this class never occurs" }, DASH)
        : el("td", { class: v === best ? "cell best" : "cell", style: { background: `rgba(var(--heat), ${(0.04 + 0.46 * ((v - low) / (high - low || 1)) ** 1.3).toFixed(3)})` } }, v.toFixed(1));
    }));
  });
  const button = rows.length < order.length ? el("div", { class: "pager" }, el("span", { class: "grow" }, `${rows.length} of ${order.length} classes`),
    el("button", { class: "button", type: "button", onclick: () => { heat.all = true; classesPart.draw(); } }, "Show all classes")) : null;
  return [el("div", { class: "card" }, el("div", { class: "scroll" }, el("table", { class: "heat" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Class"), shown.map(([e]) => el("th", { scope: "col" }, bdi(encoderName(e)))))), el("tbody", {}, body))), button),
  el("p", { class: "note" }, "Selected encoders, best value of each class in bold; a dash is a class that never occurs.",
    left.length ? [" Not in this page: ", ...nameList(left), "."] : null)];
}
