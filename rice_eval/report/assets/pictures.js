// Pictures: one image with every encoder beside it, or every picture of one encoder.
const show = { who: "all", role: "prediction", most: 4 };
const ROLES = { image: "Image", truth: "Truth", prediction: "Prediction", error: "Errors", tokens: "Tokens, PCA" };
const source = (number) => `data:image/webp;base64,${D.pictures[number]}`;

function enlarge(title, tile, role) {
  const dialog = el("dialog", { "aria-label": title, onclick: (event) => { if (event.target === dialog) dialog.close(); }, onclose: () => dialog.remove() },
    el("header", {}, bdi(title), el("button", { class: "button", type: "button", onclick: () => dialog.close() }, "Close")),
    el("img", { src: source(tile[0]), alt: title, class: role === "image" ? null : "pixels" }));
  document.body.append(dialog);
  dialog.showModal();
}
function tileButton(panel, role, caption, under, alt) {
  const tile = panel.tiles[role];
  if (!tile) return null;
  return el("button", { class: "tile", type: "button", onclick: () => enlarge(alt, tile, role) },
    el("img", { src: source(tile[0]), alt, width: tile[1], height: tile[2], decoding: "async", class: role === "prediction" || role === "truth" || role === "tokens" ? "pixels" : null }),
    el("span", { class: "caption" }, bdi(caption), under ? el("small", {}, under) : null));
}
function legendOf(panels) {
  const entries = new Map(panels.flatMap((p) => p.legend));
  const place = new Map(board().classes.map((name, k) => [name, k]));
  const sorted = [...entries].sort(([a], [c]) => (place.get(a) ?? Infinity) - (place.get(c) ?? Infinity));
  return sorted.length ? el("ul", { class: "legend", "aria-label": "Classes" }, sorted.map(([name, color]) =>
    el("li", {}, svg("svg", { viewBox: "-.5 -.5 11 11", "aria-hidden": "true" }, svg("rect", { width: 10, height: 10, rx: 2, fill: color })), bdi(name)))) : null;
}

// Boxes and text need more room than label maps; their tiles are drawn larger.
const tileList = (panel, only, ...tiles) => el("div", { class: `tiles${only ? " strip-of-one" : ""}${Object.values(panel.tiles)[0][1] > 300 ? " large" : ""}` }, tiles);

function strips(b) {
  const label = (panel) => encoderName(b.encoder[panel.row]);
  if (show.who !== "all") {
    return b.panels.filter((p) => b.encoder[p.row] === Number(show.who)).map((p) => el("article", { class: "strip" },
      el("header", {}, el("h3", {}, bdi(p.image)), el("span", { class: "dim small" }, p.note)),
      tileList(p, true, Object.keys(ROLES).map((role) => tileButton(p, role, ROLES[role], "", `${ROLES[role]} of ${isolate(p.image)}, ${isolate(label(p))}`))), legendOf([p])));
  }
  const images = new Map();
  for (const p of b.panels) {
    if (!images.has(p.image)) images.set(p.image, []);
    images.get(p.image).push(p);
  }
  return [...images].map(([image, panels]) => el("article", { class: "strip" },
    el("header", {}, el("h3", {}, bdi(image))),
    tileList(panels[0], false,
      tileButton(panels[0], "image", "Image", "", `Image ${isolate(image)}`), tileButton(panels[0], "truth", "Truth", "", `Truth of ${isolate(image)}`),
      panels.map((p) => tileButton(p, show.role, label(p), p.note, `${ROLES[show.role]} of ${isolate(image)}, ${isolate(label(p))}`))),
    show.role === "prediction" ? legendOf(panels) : null));
}

function picturesPart() {
  const b = board();
  if (!b.panels.length) {
    return b.panelsLeftOut ? part("pictures", "Pictures", null, null, el("p", { class: "card empty" }, "Left out of this page to keep it small; they lie beside the records.")) : null;
  }
  const encoders = [...new Set(b.panels.map((p) => b.encoder[p.row]))];
  if (show.who !== "all" && !encoders.includes(Number(show.who))) show.who = "all";
  const roles = ["prediction", "error", "tokens"].filter((role) => b.panels.some((p) => p.tiles[role]));
  if (!roles.includes(show.role)) [show.role] = roles;
  const slot = el("div", {});
  const controls = el("div", { class: "controls" });
  const draw = () => {
    controls.replaceChildren(...[show.who === "all" && roles.length > 1 ? segments("What to show", roles.map((r) => [r, ROLES[r]]), show.role, (v) => { show.role = v; draw(); }) : null,
      dropdown("Whose pictures", [["all", "All encoders side by side"], ...encoders.map((e) => [e, encoderName(e)])], show.who, (v) => { show.who = v; draw(); })].filter(Boolean));
    const all = strips(b);
    const some = state.printing ? all : all.slice(0, show.most);
    slot.replaceChildren(el("div", { class: "card" }, some, some.length < all.length ? el("div", { class: "pager" }, el("span", { class: "grow" }, `${some.length} of ${count(all.length, "image")}`),
      el("button", { class: "button", type: "button", onclick: () => { show.most = Infinity; draw(); } }, "Show all images")) : null),
    b.panelsLeftOut ? el("p", { class: "note" }, `Pictures of ${count(b.panelsLeftOut, "result")} more were left out to keep the page small; they lie beside the records.`) : "");
  };
  draw();
  picturesPart.draw = draw;
  return part("pictures", "Pictures", ["The same test images for every encoder.", roles.includes("tokens") ? " Token maps show the first three principal components of an encoder's patch tokens as red, green and blue." : ""], controls, slot);
}
on(["print"], () => picturesPart.draw?.());
