// All boards at once: one row an encoder, one column a board; and how families of tasks differ.
const OVERVIEW_ROWS = 10;
const overview = { sort: "wins", falling: true, words: "", page: 0 };

// Share of the other encoders of a board that each row beats; ties count half. Direction and scale of the metric drop out.
function wins(b) {
  if (!b.wins) {
    const metric = headline(b);
    const values = metric.value.map((v) => (metric.higher ? v : -v));
    const sorted = [...values].sort((x, y) => x - y);
    const below = (v) => { let [lo, hi] = [0, sorted.length]; while (lo < hi) { const m = (lo + hi) >> 1; if (sorted[m] < v) lo = m + 1; else hi = m; } return lo; };
    const upTo = (v) => { let [lo, hi] = [0, sorted.length]; while (lo < hi) { const m = (lo + hi) >> 1; if (sorted[m] <= v) lo = m + 1; else hi = m; } return lo; };
    b.wins = values.map((v) => (values.length < 2 ? null : (below(v) + (upTo(v) - below(v) - 1) / 2) / (values.length - 1)));
  }
  return b.wins;
}
const mean = (values) => (values.length ? values.reduce((x, y) => x + y, 0) / values.length : null);

const places = D.encoders.map(() => new Array(D.boards.length).fill(-1));
D.boards.forEach((b, k) => b.encoder.forEach((e, r) => { places[e][k] = r; }));

function overviewTable() {
  const words = overview.words.toLowerCase().split(/\s+/).filter(Boolean);
  const value = (e) => {
    if (overview.sort === "name") return encoderName(e).toLowerCase();
    if (overview.sort === "wins") return D.encoders[e].wins;
    const k = Number(overview.sort);
    return places[e][k] < 0 ? null : headline(D.boards[k]).value[places[e][k]];
  };
  const rows = D.encoders.map((_, e) => e).filter((e) => words.every((w) => `${encoderName(e)} ${D.encoders[e].family}`.toLowerCase().includes(w)))
    .sort((x, y) => {
      const [a, c] = [value(x), value(y)];
      if (a === null || c === null) return (a === null) - (c === null) || x - y;
      return (a < c ? -1 : a > c ? 1 : 0) * (overview.falling ? -1 : 1) || x - y;
    });
  const sortBy = (key, falling) => {
    overview.falling = overview.sort === key ? !overview.falling : falling;
    overview.sort = key;
    overview.page = 0;
    changed("overview");
    document.querySelector(`#overview [data-sort="${key}"]`)?.focus();
  };
  const head = (key, title, falling, name, under) => el("th", { scope: "col", class: name, "aria-sort": overview.sort === key ? (overview.falling ? "descending" : "ascending") : null },
    el("button", { class: "sort", type: "button", "data-sort": key, onclick: () => sortBy(key, falling) }, el("span", {}, taskName(title), under ? el("small", {}, bdi(under)) : null), el("i", { "aria-hidden": "true" }, overview.falling ? "▼" : "▲")));
  const shown = state.printing ? rows : rows.slice(overview.page * OVERVIEW_ROWS, (overview.page + 1) * OVERVIEW_ROWS);
  const body = shown.map((e) => el("tr", { class: "row" }, el("td", { class: "first" }, bdi(encoderName(e))),
    el("td", { class: "num" }, D.encoders[e].wins === null ? DASH : `${D.encoders[e].wins.toFixed(0)} %`),
    D.boards.map((b, k) => {
      const r = places[e][k];
      if (r < 0) return el("td", { class: "num dim" }, DASH);
      const win = wins(b)[r];
      return el("td", { class: b.rank[r] === 1 ? "num score" : "num", style: { background: `rgba(var(--heat), ${(0.2 * (win || 0) ** 2).toFixed(3)})` },
        title: `rank ${b.rank[r]} of ${b.encoder.length}` }, points(headline(b).value[r], headline(b)));
    })));
  return el("div", { class: "card" }, rows.length ? el("div", { class: "scroll" }, el("table", { class: "matrix" },
    el("thead", {}, el("tr", {}, head("name", "Encoder", false, "first"), head("wins", "Mean wins", true, "num"),
      D.boards.map((b, k) => head(String(k), NAMES[k].task, headline(b).higher, "task", [NAMES[k].rest, headline(b).title].filter(Boolean).join(" · "))))), el("tbody", {}, body)))
    : el("p", { class: "empty" }, "No encoder fits these words."),
  pager(rows.length, overview.page, OVERVIEW_ROWS, (page) => { overview.page = page; changed("overview"); }, "encoder"));
}

function overviewPart() {
  if (D.boards.length < 2) return null;
  const slot = el("div", {});
  const draw = () => slot.replaceChildren(overviewTable());
  on(["overview", "print"], draw);
  draw();
  const search = el("input", { type: "search", placeholder: "Filter encoders", "aria-label": "Filter encoders of all boards", autocomplete: "off", spellcheck: "false",
    oninput: () => { overview.words = search.value; overview.page = 0; draw(); } });
  return part("overview", "All tasks", `${count(D.encoders.length, "encoder")} on ${count(D.boards.length, "board")}. Mean wins is the share of the other encoders that one beats, averaged over its boards; scores of different boards are never averaged.`,
    search, slot);
}

// One axis a board while they are few, else one a kind of task.
function profilePlot(width) {
  const kinds = [...new Set(D.boards.map((b) => b.task.kind))];
  const axes = D.boards.length <= 10
    ? D.boards.map((b, k) => ({ title: NAMES[k].task, under: [NAMES[k].rest, headline(b).title].filter(Boolean).join(" · "), of: (e) => (places[e][k] < 0 ? null : headline(b).value[places[e][k]]), flip: !headline(b).higher, show: (v) => points(v, headline(b)) }))
    : kinds.map((kind) => ({ title: kind, under: count(D.boards.filter((b) => b.task.kind === kind).length, "board"), flip: false, range: [0, 1], show: (v) => `${(100 * v).toFixed(0)} %`,
      of: (e) => mean(D.boards.map((b, k) => (b.task.kind !== kind || places[e][k] < 0 ? null : wins(b)[places[e][k]])).filter((v) => v !== null)) }));
  return axes.length < 2 ? null : parallel(axes, width);
}

function profilePart() {
  if (D.boards.length < 2) return null;
  const kinds = new Set(D.boards.map((b) => b.task.kind)).size;
  const single = D.boards.length <= 10;
  if (!single && kinds < 2) return null;
  return figure("Profile over tasks", null, profilePlot, ["picked"], single
    ? "Each axis is one board with its own scale; the better end is up. Thin lines are the encoders that are not selected."
    : "Each axis is one kind of task: the share of the other encoders that one beats, averaged over the boards of that kind.", true);
}
