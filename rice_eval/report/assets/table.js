// The leaderboard of the current board: sorted by a click on a column, filtered by words and family, paged.
const TABLE_ROWS = 25;
const table = { sort: "rank", falling: false, words: "", family: "", page: 0, open: new Set() };

function columns(b) {
  const facts = (name) => (r) => D.encoders[b.encoder[r]][name];
  const metrics = b.metrics.map((metric, k) => ({
    key: `m${k}`, title: k === 0 ? plural(metric) : metric.title, value: (r) => metric.value[r], falling: metric.higher,
    class: k === 0 ? "num score" : k < 3 ? "num mid" : "num wide", metric,
  }));
  const columns = [
    { key: "rank", title: "Rank", value: (r) => b.rank[r], class: "rank" },
    { key: "name", title: "Encoder", value: (r) => encoderName(b.encoder[r]).toLowerCase(), class: "who" },
    metrics[0],
    ...metrics.slice(1, 4),
    { key: "params", title: "Parameters", value: facts("params"), show: params, class: "num mid" },
    { key: "flops", title: "FLOPs", value: (r) => b.flops[r], show: flops, class: "num wide" },
    { key: "speed", title: "Images/s", value: (r) => b.speed[r], show: speed, class: "num wide", falling: true },
    { key: "tokens", title: "Tokens", value: (r) => b.tokens[r], show: (v) => Math.round(v).toLocaleString("en"), class: "num wide" },
  ];
  // A column that says the same nothing of every encoder is no column.
  return columns.filter((c) => !["flops", "speed"].includes(c.key) || b.encoder.some((_, r) => c.value(r) !== null));
}

function order(b, all) {
  const column = all.find((c) => c.key === table.sort) || all[0];
  const sign = table.falling ? -1 : 1;
  const words = table.words.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = b.encoder.map((_, r) => r).filter((r) => {
    const e = D.encoders[b.encoder[r]];
    if (table.family && e.family !== table.family) return false;
    const text = `${encoderName(b.encoder[r])} ${e.family} ${e.arch}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  return rows.sort((x, y) => {
    const [a, c] = [column.value(x), column.value(y)];
    if (a === null || c === null) return (a === null) - (c === null) || x - y; // what is not known comes last both ways
    return (a < c ? -1 : a > c ? 1 : 0) * sign || x - y;
  });
}

function intervalBar(b, r, scale) {
  const metric = headline(b);
  const x = (v) => (100 * (v - scale[0])) / (scale[1] - scale[0] || 1);
  const [low, high] = [metric.low[r], metric.high[r]];
  const known = low !== null && high !== null;
  const at = (v) => `${x(v).toFixed(2)}%`;
  const picture = svg("svg", { role: "img", "aria-label": known ? `interval ${points(low, metric)} to ${points(high, metric)}` : "no interval" },
    svg("line", { class: "track", x1: "0", x2: "100%", y1: 9, y2: 9 }),
    known ? svg("line", { class: "range", x1: at(low), x2: at(high), y1: 9, y2: 9 }) : null,
    metric.value[r] === null ? null : svg("circle", { class: "point", cx: at(metric.value[r]), cy: 9, r: 3.5 }));
  const tint = colorOf(b.encoder[r]);
  if (tint) picture.querySelector(".point")?.style.setProperty("fill", tint);
  return picture;
}

function cell(b, column, r) {
  if (column.key === "rank") {
    const open = b.rankLow[r] !== b.rankHigh[r];
    return el("td", { class: column.class }, b.rank[r], open ? el("small", { title: "95 % interval of the rank" }, `${b.rankLow[r]}–${b.rankHigh[r]}`) : null);
  }
  if (column.key === "name") {
    const e = D.encoders[b.encoder[r]];
    const warnings = b.warnings[r];
    return el("td", { class: column.class },
      el("button", { type: "button", "aria-expanded": String(table.open.has(b.encoder[r])), onclick: () => toggle(b.encoder[r]) }, bdi(encoderName(b.encoder[r]))),
      el("small", {}, bdi(e.family), b.seeds[r] > 1 ? ` · ${b.seeds[r]} seeds` : "",
        warnings ? el("span", { class: "flag" }, ` · ${count(warnings.length, "warning")}`) : null));
  }
  const value = column.value(r);
  if (column.metric) {
    const { metric } = column;
    const known = metric.low[r] !== null && metric.high[r] !== null;
    return el("td", { class: column.class, title: known ? `${points(metric.low[r], metric)} to ${points(metric.high[r], metric)}` : null },
      points(value, metric), column.key === "m0" && known ? el("small", {}, `${points(metric.low[r], metric)}–${points(metric.high[r], metric)}`) : null);
  }
  return el("td", { class: column.class }, value === null ? DASH : column.show(value));
}

function toggle(encoder) {
  if (!table.open.delete(encoder)) table.open.add(encoder);
  changed("table");
  document.querySelector(`#board [data-encoder="${encoder}"] .who button`)?.focus();
}

function metricText(metric, r) {
  const range = metric.low[r] === null || metric.high[r] === null ? "" : ` (${points(metric.low[r], metric, 2)} to ${points(metric.high[r], metric, 2)})`;
  return `${points(metric.value[r], metric, metric.unit === "%" ? 2 : 4)}${metric.unit === "%" ? " %" : ` ${metric.unit}`}${range}`;
}

function facts(b, r) {
  const e = D.encoders[b.encoder[r]];
  const d = b.detail[r];
  const group = (title, content) => el("div", {}, el("h3", {}, title), content);
  const warnings = (b.warnings[r] || []).map((w) => D.texts[w]);
  return el("div", { class: "facts" },
    group("Encoder", definitions([["family", e.family], ["architecture", e.arch], ["parameters", params(e.params)], ["patch", `${e.patch} px`],
      ["native size", `${e.resolution} px`], ["layers", e.layers], ["widths", [...new Set(e.widths)]], ["license", e.license], ["source", e.source],
      ["weights", e.weights], ["fingerprint", mono(e.sha256.slice(0, 16))], ["notes", e.notes.join("; ")]])),
    group("Result", definitions([...b.metrics.map((metric) => [metric.title, metric.value[r] === null ? null : metricText(metric, r)]),
      ["layers read", b.layers[r]], ["tokens an image", b.tokens[r]], ["FLOPs an image", flops(b.flops[r])],
      ...(d ? [["by seed", d.values.length > 1 ? d.values.map((v, k) => `${d.seeds[k].join(",")}: ${points(v, headline(b), 2)}`).join("; ") : null], ["over seeds", b.seedSd[r] === null ? null : `standard deviation ${points(b.seedSd[r], headline(b), 2)}`],
        ...Object.entries(d.chosen).map(([k, v]) => [`chosen ${k}`, v]), ["heads tried", d.heads],
        ["images skipped", d.skipped.length ? d.skipped : null]] : [])])),
    d ? group("Run", definitions([["created", d.created], ["file", d.file], ["record", mono(d.sha256)], ["device", D.texts[d.device]],
      ["seconds", Object.entries(d.seconds).map(([k, v]) => `${k} ${v}`).join(", ")], ["peak memory", `${d.memory} MB`],
      ["forwards", d.forwards ? d.forwards.toLocaleString("en") : "0 (all tokens came from the bank)"],
      ["bank", d.bank ? `${d.bank.dtype}, ${bytes(d.bank.bytes)}` : "none"], ["software", D.texts[d.env]], ["packages", D.texts[d.packages]]]))
      : group("Run", el("p", { class: "dim small" }, "Left out of this page to keep it small; it is in the record.")),
    warnings.length ? group("Warnings", el("ul", { class: "warn" }, warnings.map((w) => el("li", {}, bdi(w))))) : null);
}

function boardTable() {
  const b = board();
  const all = columns(b);
  const rows = order(b, all);
  const metric = headline(b);
  const known = [...metric.value, ...metric.low, ...metric.high].filter((v) => v !== null);
  const scale = [Math.min(...known), Math.max(...known)];
  const shown = state.printing ? rows : rows.slice(table.page * TABLE_ROWS, (table.page + 1) * TABLE_ROWS);
  const sortBy = (column) => {
    table.falling = table.sort === column.key ? !table.falling : Boolean(column.falling);
    table.sort = column.key;
    table.page = 0;
    changed("table");
    document.querySelector(`#board [data-sort="${column.key}"]`)?.focus();
  };
  const head = (column) => [el("th", { scope: "col", class: column.class.replace("score", "headline"), "aria-sort": table.sort === column.key ? (table.falling ? "descending" : "ascending") : null },
    el("button", { class: "sort", type: "button", "data-sort": column.key, onclick: () => sortBy(column) }, bdi(column.title), el("i", { "aria-hidden": "true" }, table.falling ? "▼" : "▲"))),
  column.key === "m0" ? el("th", { scope: "col", class: "interval mid" }, `${Math.round(100 * (b.interval ? b.interval.level : 0.95))} % interval`) : null];
  const body = shown.flatMap((r) => {
    const encoder = b.encoder[r];
    const chosen = state.picked.includes(encoder);
    const full = picked().length >= MOST_PICKED;
    const row = el("tr", { class: "row", "data-encoder": encoder },
      el("td", { class: "pick", style: { color: colorOf(encoder) || "inherit" } }, el("input", { type: "checkbox", checked: chosen, disabled: !chosen && full,
        title: !chosen && full ? `at most ${MOST_PICKED} at once` : "show in the plots", "aria-label": `Show ${isolate(encoderName(encoder))} in the plots`,
        onchange: (event) => { pick(encoder, event.target.checked); document.querySelector(`#board [data-encoder="${encoder}"] .pick input`)?.focus(); } })),
      all.flatMap((column) => [cell(b, column, r), column.key === "m0" ? el("td", { class: "interval mid" }, intervalBar(b, r, scale)) : null]));
    return table.open.has(encoder) ? [row, el("tr", { class: "more" }, el("td", { colspan: all.length + 2 }, facts(b, r)))] : [row];
  });
  const content = rows.length
    ? el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { class: "pick", scope: "col" }, el("span", { class: "dim", title: "in the plots" })), all.map(head))), el("tbody", {}, body)))
    : el("p", { class: "empty" }, "No encoder fits these words. ", el("button", { class: "button", type: "button", onclick: () => { table.words = ""; table.family = ""; changed("board"); } }, "Clear the filter"));
  return el("div", { class: "card" }, content, pager(rows.length, table.page, TABLE_ROWS, (page) => { table.page = page; changed("table"); }, "encoder"));
}

function boardPart() {
  const b = board();
  const families = [...new Set(b.encoder.map((e) => D.encoders[e].family))].sort();
  const refilter = () => { table.page = 0; changed("table"); };
  const search = el("input", { type: "search", value: table.words, placeholder: "Filter encoders", "aria-label": "Filter encoders", autocomplete: "off", spellcheck: "false",
    oninput: () => { table.words = search.value; refilter(); } });
  const protocol = D.protocols[b.protocol];
  const lead = [`${count(b.encoder.length, "encoder")} · `, bdi(b.task.kind), ` · ${count(b.task.n_test, "test image")} of `, bdi(b.task.test_split),
    " · protocol ", bdi(protocol.id), " ", mono(protocol.hash.slice(0, 8)), " · view ", bdi(b.view)];
  const slot = el("div", {});
  const draw = () => slot.replaceChildren(boardTable());
  draw();
  boardPart.draw = draw;
  return part("board", bdi(TITLES[state.board]), lead, [search,
    families.length > 1 ? dropdown("Family", [["", "All families"], ...families.map((f) => [f, f])], table.family, (v) => { table.family = v; refilter(); }) : null], slot);
}
on(["table", "picked"], () => boardPart.draw?.());
