// Drawing: scales, axes, and three kinds of plot. All are SVG, drawn for the width they get.
function ticks(low, high, most) {
  const span = high - low || 1;
  const raw = span / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) out.push(Number(v.toPrecision(12)));
  return out;
}
function padded(values, share) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || Math.abs(high) || 1) * share;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

// A figure redraws itself when its width or something it depends on changes.
const figures = [];
function figure(title, controls, draw, names, caption, full) {
  const slot = el("div", {});
  const note = el("figcaption", {}, caption || "");
  const node = el("figure", { class: full ? "card pad full" : "card pad" }, el("header", {}, el("h3", {}, title), controls), slot, note);
  const redraw = () => {
    if (!node.isConnected) return;
    hideTip();
    const width = Math.max(280, Math.round(slot.clientWidth || 520));
    const content = draw(width, (text) => note.replaceChildren(...[text].flat()));
    slot.replaceChildren(content || el("p", { class: "empty" }, "Nothing to draw yet: select encoders in the table."));
  };
  figures.push({ node, redraw, names: new Set(names) });
  node.redraw = redraw;
  return node;
}
function redrawFigures(name) {
  for (let k = figures.length - 1; k >= 0; k -= 1) {
    if (!figures[k].node.isConnected) figures.splice(k, 1);
    else if (!name || figures[k].names.has(name)) figures[k].redraw();
  }
}
on(["picked"], () => redrawFigures("picked"));

function frame(width, height, label) {
  return svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label });
}
function yAxis(root, y, values, box, show) {
  for (const v of values) {
    root.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(v), y2: y(v) }),
      svg("text", { x: box.left - 8, y: y(v) + 4, "text-anchor": "end" }, show(v)));
  }
}
const tidy = (v) => (Math.abs(v) >= 1000 ? v.toLocaleString("en") : String(Number(v.toPrecision(6))));

// Points take one stop of the tab key together; arrows go from one to the next.
function rove(marks) {
  marks.forEach((mark, k) => {
    mark.setAttribute("tabindex", k === 0 ? "0" : "-1");
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = marks[(k + step + marks.length) % marks.length];
      mark.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
}
function mark(x, y, name, lines, color, extra) {
  const node = svg("g", { class: color ? "mark" : "mark quiet", role: "img", "aria-label": `${isolate(name)}: ${lines.join(", ")}` }, extra || null,
    svg("circle", { cx: x, cy: y, r: color ? 5.5 : 4 }));
  if (color) node.style.color = color;
  const show = () => showTip(node.querySelector("circle"), name, lines);
  for (const kind of ["mouseenter", "focus", "click"]) node.addEventListener(kind, show);
  for (const kind of ["mouseleave", "blur"]) node.addEventListener(kind, hideTip);
  return node;
}
// Names stand where they cover neither a point nor another name; one that finds no room is left to the tooltip.
function tags(root, items, box) {
  const taken = items.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]);
  const free = (r) => r[0] >= box.left - 2 && r[2] <= box.right + 4 && r[1] >= box.top - 12 && r[3] <= box.bottom + 4 &&
    taken.every((t) => r[2] <= t[0] || r[0] >= t[2] || r[3] <= t[1] || r[1] >= t[3]);
  for (const { x, y, name, keep } of items) {
    if (!keep) continue;
    const text = short(name, 24);
    const w = Array.from(text).length * 6.6 + 2;
    const spots = [[x + 10, y - 7, "start"], [x - 10 - w, y - 7, "end"], [x - w / 2, y - 24, "middle"], [x - w / 2, y + 9, "middle"], [x + 8, y - 22, "start"], [x + 8, y + 8, "start"], [x - 8 - w, y - 22, "end"], [x - 8 - w, y + 8, "end"]];
    const spot = spots.find(([left, top]) => free([left, top, left + w, top + 15]));
    if (!spot) continue;
    const [left, top, anchor] = spot;
    taken.push([left, top, left + w, top + 15]);
    // The anchor is mirrored for right-to-left text: an isolate keeps the line's own direction left-to-right.
    const at = anchor === "start" ? left : anchor === "end" ? left + w : left + w / 2;
    root.append(svg("text", { class: "tag", x: at, y: top + 12, "text-anchor": anchor }, isolate(text)));
  }
}

function scatter(items, x, y, width) {
  const height = Math.max(260, Math.min(430, Math.round(width * 0.46)));
  const box = { left: 46, right: width - 16, top: 16, bottom: height - 42 };
  const known = items.filter((i) => i.x !== null && i.y !== null);
  if (!known.length) return null;
  const positive = known.map((i) => i.x).filter((v) => v > 0);
  const zeros = known.some((i) => i.x === 0);
  const start = box.left + (zeros && positive.length ? 46 : 14);
  const logs = positive.map(Math.log10);
  let [low, high] = logs.length ? [Math.min(...logs), Math.max(...logs)] : [0, 1];
  const middle = (low + high) / 2;
  if (high - low < 0.3) [low, high] = [middle - 0.15, middle + 0.15];
  const px = (v) => (v === 0 ? box.left + 14 : start + ((box.right - 14 - start) * (Math.log10(v) - low)) / (high - low));
  // Intervals of many quiet points would be a thicket: only the selected ones keep theirs.
  const spread = (i) => i.low !== null && i.high !== null && (i.color || known.length <= 60);
  const range = padded(known.flatMap((i) => (spread(i) ? [i.y, i.low, i.high] : [i.y])), 0.08);
  const py = (v) => box.bottom - ((v - range[0]) / (range[1] - range[0])) * (box.bottom - box.top);
  const root = frame(width, height, `${y.title} against ${x.title}`);
  yAxis(root, py, ticks(range[0], range[1], 5), box, tidy);
  const steps = [];
  for (let e = Math.floor(low) - 1; e <= Math.ceil(high); e += 1) for (const m of high - low > 2.5 ? [1] : high - low > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7]) steps.push(m * 10 ** e);
  const room = Math.max(2, Math.floor((box.right - start) / 62));
  const inside = steps.filter((v) => px(v) >= start - 1 && px(v) <= box.right);
  const every = Math.ceil(inside.length / room);
  for (const v of [...(zeros ? [0] : []), ...inside.filter((_, k) => k % every === 0)]) {
    root.append(svg("line", { class: "axis", x1: px(v), x2: px(v), y1: box.bottom, y2: box.bottom + 4 }), svg("text", { x: px(v), y: box.bottom + 18, "text-anchor": "middle" }, x.show(v)));
  }
  root.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { x: box.right, y: height - 6, "text-anchor": "end" }, x.less ? `← cheaper · ${x.title}, log scale` : `${x.title}, log scale · cheaper →`),
    svg("text", { x: 2, y: 8 }, y.title));
  const better = (a, c) => (y.higher ? a > c : a < c);
  const byCost = [...known].sort((a, c) => (x.less ? a.x - c.x : c.x - a.x) || (y.higher ? c.y - a.y : a.y - c.y));
  const front = byCost.filter((item, k) => byCost.slice(0, k).every((o) => better(item.y, o.y)));
  if (front.length > 1) {
    const path = front.map((i, k) => (k ? `H${px(i.x).toFixed(1)}V${py(i.y).toFixed(1)}` : `M${px(i.x).toFixed(1)},${py(i.y).toFixed(1)}`)).join("");
    root.append(svg("path", { class: "front", d: path }));
  }
  const quietFirst = [...known].sort((a, c) => Boolean(a.color) - Boolean(c.color));
  const marks = new Map(quietFirst.map((i) => {
    const whisker = spread(i) ? svg("line", { x1: px(i.x), x2: px(i.x), y1: py(i.low), y2: py(i.high) }) : null;
    return [i, mark(px(i.x), py(i.y), i.name, [i.text, `${x.title}: ${x.show(i.x)}`], i.color, whisker)];
  }));
  root.append(...marks.values());
  rove([...known].sort((a, c) => a.x - c.x).map((i) => marks.get(i)));
  tags(root, known.map((i) => ({ x: px(i.x), y: py(i.y), name: i.name, keep: i.color || known.length <= 10 })), box);
  return root;
}

// series: [{name, color, points: [{x, y, low, high, text}]}]; x positions are the places of ``marks`` or numbers.
function lines(series, x, y, width) {
  const height = Math.max(230, Math.min(320, Math.round(width * 0.55)));
  const box = { left: 46, right: width - 14, top: 16, bottom: height - 42 };
  const all = series.flatMap((s) => s.points);
  if (!all.length) return null;
  const xs = all.map((p) => p.x);
  const to = x.log ? Math.log2 : (v) => v;
  const [low, high] = [to(Math.min(...xs)), to(Math.max(...xs))];
  const px = (v) => box.left + 12 + ((box.right - box.left - 24) * (high === low ? 0.5 : (to(v) - low) / (high - low)));
  const range = padded(all.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]), 0.08);
  const py = (v) => box.bottom - ((v - range[0]) / (range[1] - range[0])) * (box.bottom - box.top);
  const root = frame(width, height, `${y.title} by ${x.title}`);
  yAxis(root, py, ticks(range[0], range[1], 5), box, tidy);
  const distinct = [...new Set(xs)].sort((a, b) => a - b);
  const wide = x.log ? 58 : 26;
  let last = -Infinity;
  for (const v of distinct) {
    if (px(v) - last < wide) continue;
    last = px(v);
    root.append(svg("text", { x: px(v), y: box.bottom + 18, "text-anchor": "middle" }, tidy(v)));
  }
  root.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { x: box.right, y: height - 6, "text-anchor": "end" }, x.title), svg("text", { x: 2, y: 8 }, y.title));
  const marks = [];
  for (const s of series) {
    const path = svg("path", { class: "line", d: s.points.map((p, k) => `${k ? "L" : "M"}${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`).join("") });
    path.style.color = s.color;
    root.append(path);
    for (const p of s.points) {
      const whisker = p.low === undefined || p.low === null ? null : svg("line", { x1: px(p.x), x2: px(p.x), y1: py(p.low), y2: py(p.high) });
      const node = mark(px(p.x), py(p.y), s.name, p.text, s.color, whisker);
      node.querySelector("circle").setAttribute("r", "3.5");
      marks.push(node);
    }
  }
  root.append(...marks);
  rove(marks);
  return root;
}

function parallel(axes, width) {
  const height = 300;
  const inner = Math.max(width, axes.length * 92);
  const box = { left: 54, right: inner - 54, top: 22, bottom: height - 58 };
  const root = frame(inner, height, "Profile over tasks");
  const x = (k) => box.left + ((box.right - box.left) * k) / (axes.length - 1);
  const scales = axes.map((axis) => {
    const values = D.encoders.map((_, e) => axis.of(e)).filter((v) => v !== null);
    const [low, high] = axis.range || (values.length ? [Math.min(...values), Math.max(...values)] : [0, 1]);
    const place = (v) => (high === low ? 0.5 : (v - low) / (high - low));
    return { low, high, y: (v) => box.bottom - (box.bottom - box.top) * (axis.flip ? 1 - place(v) : place(v)) };
  });
  axes.forEach((axis, k) => {
    const [top, bottom] = axis.flip ? [scales[k].low, scales[k].high] : [scales[k].high, scales[k].low];
    const anchor = k === 0 ? "start" : k === axes.length - 1 ? "end" : "middle";
    const at = k === 0 ? x(k) - 46 : k === axes.length - 1 ? x(k) + 46 : x(k);
    const letters = Math.max(10, Math.floor(((box.right - box.left) / (axes.length - 1) - 14) / 6.6));
    root.append(svg("line", { class: "level", x1: x(k), x2: x(k), y1: box.top, y2: box.bottom }),
      svg("text", { x: x(k), y: box.top - 10, "text-anchor": "middle" }, axis.show(top)),
      svg("text", { x: x(k), y: box.bottom + 20, "text-anchor": "middle" }, axis.show(bottom)),
      svg("text", { class: "tag", x: at, y: box.bottom + 39, "text-anchor": anchor }, isolate(short(axis.title, letters)), svg("title", {}, axis.title)),
      svg("text", { x: at, y: box.bottom + 54, "text-anchor": anchor }, short(axis.under, letters)));
  });
  const path = (e) => {
    let pen = "M";
    return axes.map((axis, k) => {
      const v = axis.of(e);
      if (v === null) { pen = "M"; return ""; }
      const piece = `${pen}${x(k).toFixed(1)},${scales[k].y(v).toFixed(1)}`;
      pen = "L";
      return piece;
    }).join("");
  };
  const quiet = D.encoders.map((_, e) => e).filter((e) => !state.picked.includes(e));
  for (const e of quiet) root.append(svg("path", { class: "ghost", d: path(e) }));
  const marks = [];
  for (const e of picked()) {
    const line = svg("path", { class: "line", d: path(e) });
    line.style.color = colorOf(e);
    root.append(line);
    axes.forEach((axis, k) => {
      const v = axis.of(e);
      if (v !== null) marks.push(mark(x(k), scales[k].y(v), encoderName(e), [`${axis.title} (${axis.under}): ${axis.show(v)}`], colorOf(e)));
    });
  }
  root.append(...marks);
  rove(marks);
  return inner > width ? el("div", { class: "scroll" }, fill(root, { style: { width: `${inner}px` } }, [])) : root;
}
