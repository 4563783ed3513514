// Which plots the current board has, and what they are made of.
const cost = { axis: "flops" };
const COSTS = {
  flops: { title: "FLOPs an image", short: "FLOPs", show: flops, less: true, of: (b, r) => b.flops[r] },
  params: { title: "Parameters", short: "Parameters", show: params, less: true, of: (b, r) => D.encoders[b.encoder[r]].params },
  speed: { title: "Images a second", short: "Images/s", show: speed, less: false, of: (b, r) => b.speed[r] },
};

function nameList(numbers) {
  const shown = numbers.slice(0, 4).flatMap((e, k) => [k ? ", " : "", bdi(encoderName(e))]);
  return numbers.length > 4 ? [...shown, ` and ${numbers.length - 4} more`] : shown;
}

function costFigure() {
  const b = board();
  const usable = Object.keys(COSTS).filter((key) => b.encoder.some((_, r) => COSTS[key].of(b, r) !== null));
  if (!usable.includes(cost.axis)) cost.axis = usable[0] || "params";
  const metric = headline(b);
  const node = figure("Accuracy against cost", usable.length > 1 ? segments("Cost", usable.map((k) => [k, COSTS[k].short]), cost.axis, (v) => { cost.axis = v; node.redraw(); }) : null,
    (width, caption) => {
      const x = COSTS[cost.axis];
      const items = b.encoder.map((e, r) => ({ name: encoderName(e), color: colorOf(e), x: x.of(b, r), y: metric.value[r], low: metric.low[r], high: metric.high[r], text: metricText(metric, r), e }));
      const missing = items.filter((i) => i.x === null).map((i) => i.e);
      caption(["The dashed line joins encoders that nothing cheaper beats.", ...(missing.length ? [` ${x.short} not known: `, ...nameList(missing), "."] : []),
        ...(cost.axis === "speed" ? [" Speed is of the pass that made the tokens, on each record's own device."] : [])]);
      return scatter(items, x, { title: plural(metric), higher: metric.higher }, width);
    }, ["picked"], "", true);
  return node;
}

function legend() {
  const list = picked();
  if (!list.length) return el("p", { class: "dim small" }, "Select encoders in the table to compare them here.");
  return el("ul", { class: "chips", "aria-label": "Selected encoders" }, list.map((e) => el("li", { class: "chip" },
    el("span", { class: "dot", style: { background: colorOf(e) } }), bdi(encoderName(e)),
    el("button", { type: "button", "aria-label": `Remove ${isolate(encoderName(e))} from the plots`, onclick: () => pick(e, false) }, "×"))));
}

function layerFigure() {
  const b = board();
  if (!Object.values(b.detail).some((d) => d.layers.length > 1)) return null;
  return figure("By layer", null, (width, caption) => {
    const series = [];
    const missing = [];
    for (const e of picked()) {
      const r = rowOf(b, e);
      if (r < 0) continue;
      const curve = b.detail[r]?.layers || [];
      if (!curve.length) missing.push(e);
      else series.push({ name: encoderName(e), color: colorOf(e), points: curve.map(([layer, score]) => ({ x: layer, y: score, text: [`layer ${layer} of ${D.encoders[e].layers}`, `held-out score ${tidy(score)}`] })) });
    }
    caption(["Best head of each layer, scored on the held-out part of train.", ...(missing.length ? [" No single-layer heads for ", ...nameList(missing), "."] : [])]);
    return lines(series, { title: "Layer" }, { title: "Held-out score" }, width);
  }, ["picked"]);
}

function resolutionFigure() {
  const b = board();
  const views = D.boards.filter((other) => other.family === b.family);
  if (views.length < 2) return null;
  const metric = headline(b);
  return figure("By resolution", null, (width, caption) => {
    caption(`The same task and protocol at ${count(views.length, "view")}: ${views.map((v) => v.view).join("; ")}. Each view is ranked on its own.`);
    const series = picked().map((e) => ({ name: encoderName(e), color: colorOf(e), points: views.flatMap((v) => {
      const r = rowOf(v, e);
      if (r < 0) return [];
      const m = headline(v);
      return [{ x: v.tokens[r], y: m.value[r], low: m.low[r], high: m.high[r], text: [`view ${isolate(v.view)}, ${Math.round(v.tokens[r])} tokens`, metricText(m, r)] }];
    }).sort((p, q) => p.x - q.x) })).filter((s) => s.points.length);
    return lines(series, { title: "Tokens an image, log scale", log: true }, { title: plural(metric) }, width);
  }, ["picked"]);
}

function labelFigure() {
  const b = board();
  const shares = D.boards.filter((other) => other.labelFamily === b.labelFamily);
  if (shares.length < 2) return null;
  const metric = headline(b);
  return figure("By share of the labels", null, (width, caption) => {
    caption("The same task, view and protocol, trained on a share of the training images; means over the seeds, each with a split of its own. Each share is ranked on its own.");
    const series = picked().map((e) => ({ name: encoderName(e), color: colorOf(e), points: shares.flatMap((s) => {
      const r = rowOf(s, e);
      if (r < 0) return [];
      const m = headline(s);
      const images = Math.max(2, Math.round(s.labels * s.task.n_train));
      const sd = s.seedSd[r] === null ? "" : `, standard deviation ${tidy(s.seedSd[r])} over ${count(s.seeds[r], "seed")}`;
      return [{ x: images, y: m.value[r], low: m.low[r], high: m.high[r], text: [`${count(images, "image")} of ${s.task.n_train}`, `${metricText(m, r)}${sd}`] }];
    }).sort((p, q) => p.x - q.x) })).filter((s) => s.points.length);
    return lines(series, { title: "Training images, log scale", log: true }, { title: plural(metric) }, width);
  }, ["picked"]);
}

// Groups of text lines that have a place on an axis: "height 8-12 px", "turn <2 deg", "length >=21", "contrast 36".
const GROUPS = {
  height: { title: "By height of a character", axis: "Height in pixels, log scale", unit: "px", log: true },
  turn: { title: "By turn", axis: "Turn in degrees", unit: "degrees" },
  length: { title: "By length", axis: "Characters, log scale", unit: "characters", log: true },
  contrast: { title: "By contrast", axis: "Difference of brightness, of 255", unit: "of 255" },
};
const group = { kind: "height", metric: null };
function groupPlace(name) {
  const m = /^(height|turn|length|contrast) (<|>=)?(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?(?: .*)?$/.exec(name);
  if (!m) return null;
  const [low, high] = [Number(m[3]), Number(m[4] || m[3])];
  // A group with one open end stands a little beyond its edge, any other in its middle.
  const x = m[2] === "<" ? low * 0.75 : m[2] === ">=" ? low * 1.25 : m[1] === "height" || m[1] === "length" ? Math.sqrt(low * high) : (low + high) / 2;
  return { kind: m[1], x };
}

function groupFigure() {
  const b = board();
  const places = b.classes.map(groupPlace);
  const metrics = [...new Set(Object.values(b.detail).flatMap((d) => Object.keys(d.classes)))];
  const kinds = Object.keys(GROUPS).filter((k) => places.filter((p) => p && p.kind === k).length > 1);
  if (!kinds.length || !metrics.length) return null;
  if (!kinds.includes(group.kind)) group.kind = kinds[0];
  if (!metrics.includes(group.metric)) group.metric = [headline(b).name, "recall"].find((m) => metrics.includes(m)) || metrics[0];
  const names = Object.fromEntries(b.metrics.map((m) => [m.name, m]));
  const title = (m) => (names[m] ? plural(names[m]) : m);
  const node = figure("Against the lines' height, turn, length and contrast", [
    kinds.length > 1 ? segments("Group", kinds.map((k) => [k, GROUPS[k].title.replace("By ", "")]), group.kind, (v) => { group.kind = v; node.redraw(); }) : null,
    metrics.length > 1 ? dropdown("Metric of the curves", metrics.map((m) => [m, title(m)]), group.metric, (v) => { group.metric = v; node.redraw(); }) : null,
  ], (width, caption) => {
    const g = GROUPS[group.kind];
    const missing = [];
    const series = [];
    for (const e of picked()) {
      const r = rowOf(b, e);
      if (r < 0) continue;
      const values = b.detail[r]?.classes[group.metric];
      if (!values) { missing.push(e); continue; }
      const spans = b.detail[r].spans[group.metric] || [];
      const points = values.flatMap((v, c) => {
        if (v === null || !places[c] || places[c].kind !== group.kind) return [];
        const [low, high] = spans[c] || [null, null];
        const between = low === null ? "" : ` (${tidy(Number(low.toFixed(1)))} to ${tidy(Number(high.toFixed(1)))})`;
        return [{ x: places[c].x, y: v, low, high, text: [b.classes[c], `${title(group.metric)}: ${v.toFixed(1)}${between}`] }];
      }).sort((p, q) => p.x - q.x);
      if (points.length) series.push({ name: encoderName(e), color: colorOf(e), points });
    }
    const some = series.some((s) => s.points.some((p) => p.low !== null));
    caption([`Lines of the test images, grouped by ${g.title.replace("By ", "")}.`, some ? " Bars are 95 % intervals over test images." : "",
      ...(missing.length ? [" Not in this page: ", ...nameList(missing), "."] : [])]);
    return lines(series, { title: g.axis, log: g.log }, { title: title(group.metric) }, width);
  }, ["picked"], "", true);
  return node;
}

function plotsPart() {
  const slot = el("div", {});
  const draw = () => slot.replaceChildren(legend());
  draw();
  plotsPart.draw = draw;
  const rest = [profilePart(), groupFigure(), layerFigure(), resolutionFigure(), labelFigure()].filter(Boolean);
  const halves = rest.filter((node) => !node.classList.contains("full"));
  if (halves.length === 1) halves[0].classList.add("full");
  return part("plots", "Compare", slot, null, el("div", { class: "charts" }, costFigure(), rest));
}
on(["picked"], () => plotsPart.draw?.());
