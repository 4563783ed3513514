// The page: header, board picker, parts in order, theme, printing.
function themeNow() {
  return state.theme || (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}
function setTheme(theme, keep) {
  state.theme = theme;
  if (theme) document.documentElement.dataset.theme = theme;
  try { if (keep) localStorage.setItem("rice-eval-theme", theme); } catch { /* storage may be closed to files */ }
  themeButton.textContent = themeNow() === "dark" ? "Light" : "Dark";
  themeButton.setAttribute("aria-label", `Switch to the ${themeNow() === "dark" ? "light" : "dark"} theme`);
}
const themeButton = el("button", { class: "button", type: "button", id: "theme", onclick: () => setTheme(themeNow() === "dark" ? "light" : "dark", true) });

function boardPicker() {
  if (D.boards.length < 2) return null;
  const kinds = [...new Set(D.boards.map((b) => b.task.kind))];
  const select = el("select", { id: "picker", onchange: () => openBoard(Number(select.value)) }, kinds.map((kind) =>
    el("optgroup", { label: kind }, D.boards.map((b, k) => (b.task.kind === kind ? el("option", { value: k, selected: k === state.board }, TITLES[k]) : null)))));
  return el("label", {}, el("span", { class: "dim small" }, "Board"), select);
}
function openBoard(number) {
  state.board = number;
  Object.assign(table, { sort: "rank", falling: false, words: "", family: "", page: 0 });
  table.open.clear();
  heat.all = false;
  show.most = 4;
  if (!picked().some((e) => rowOf(board(), e) >= 0)) pickBest();
  try { history.replaceState(null, "", `#${board().key}`); } catch { /* no history in this frame */ }
  changed("board");
}

const stage = el("div", { class: "wrap" });
const overviewSlot = el("div", { class: "wrap" });
function drawBoard() {
  boardPart.draw = classesPart.draw = detectionPart.draw = picturesPart.draw = plotsPart.draw = null;
  stage.replaceChildren(...[boardPart(), plotsPart(), classesPart(), detectionPart(), picturesPart(), printedPart(), cardsPart()].filter(Boolean));
  redrawFigures();
}

function start() {
  const app = document.getElementById("app");
  const facts = [count(D.encoders.length, "encoder"), count(D.boards.length, "board"), count(D.records, "record")];
  const hasMany = D.boards.length > 1;
  app.append(
    el("header", { class: "top" }, el("div", { class: "wrap" },
      el("div", {}, el("h1", {}, bdi(D.title)), el("p", { class: "dim small" }, facts.join(" · "), D.newest ? ` · newest ${D.newest.slice(0, 10)}` : "", ` · rice-eval ${D.version}`)),
      el("div", { class: "tools" }, el("button", { class: "button", type: "button", onclick: () => window.print() }, "Print"), themeButton))),
    hasMany ? el("div", { class: "bar" }, el("div", { class: "wrap" }, boardPicker(), el("nav", { "aria-label": "Parts" },
      [["overview", "All tasks"], ["board", "Leaderboard"], ["plots", "Compare"], ["protocol", "Protocol"]].map(([id, text]) =>
        el("a", { href: `#${id}`, onclick: (event) => { event.preventDefault(); document.getElementById(id)?.scrollIntoView(); } }, text))))) : "",
    el("main", { id: "main", tabindex: "-1" }, overviewSlot, stage),
    el("footer", { class: "foot" }, el("div", { class: "wrap" },
      el("p", {}, "Intervals are over test images; where an encoder has several seeds, its score is their mean and its interval holds both sources of noise. A range beside a rank is the interval of the rank itself: this test set can't order the encoders within it."),
      el("p", {}, "The circle before a rank selects an encoder for the plots. A dash is a number nobody measured."))), tip);
  let theme = null;
  try { theme = localStorage.getItem("rice-eval-theme"); } catch { /* as above */ }
  setTheme(theme === "dark" || theme === "light" ? theme : null, false);
  if (!D.boards.length) {
    stage.append(el("p", { class: "card empty" }, "There are no records yet. Run rice-eval demo, or rice-eval run, and write the report again."));
    return;
  }
  const wanted = D.boards.findIndex((b) => `#${b.key}` === location.hash);
  state.board = Math.max(0, wanted);
  pickBest();
  overviewSlot.append(overviewPart() || "");
  on(["board"], drawBoard);
  drawBoard();
  let width = stage.clientWidth;
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (stage.clientWidth === width || state.printing) return;
    width = stage.clientWidth;
    redrawFigures();
  })).observe(stage);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (!state.theme) setTheme(null, false); });
  window.addEventListener("scroll", () => {
    // A point that took the focus may have scrolled into view: its tooltip goes with it.
    const at = document.activeElement?.closest?.(".mark");
    if (at && !tip.hidden) placeTip(at.querySelector("circle"));
    else hideTip();
  }, { passive: true });
  window.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  for (const [name, printing] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(name, () => {
      state.printing = printing;
      for (const node of document.querySelectorAll("details")) node.open = printing;
      changed("print");
      changed("table");
    });
  }
}
start();
