// The map of layers and experts follows the token and the module that a reader chooses.
const state = { kind: 0, prompt: null, token: null };
const unpacked = new Map();
const strips = [...document.querySelectorAll(".strip[data-prompt]")];
const tokensOf = (strip) => [...strip.querySelectorAll(".token")];

function routed(prompt) {
  if (!unpacked.has(prompt)) {
    const packed = data.prompts[prompt];
    unpacked.set(prompt, { ...packed, ids: unpack(packed.ids, Uint16Array), weights: unpack(packed.weights, Uint8Array) });
  }
  return unpacked.get(prompt);
}

const isOfKind = (kind) => data.kinds.length === 1 || state.kind === 0 || kind === state.kind - 1;

// Mean weights of one token, depth by depth; where the map of all tokens has no number, no expert can be chosen.
function tokenRows() {
  const trace = routed(state.prompt);
  const sums = data.usage[state.kind].map((row) => row.map((value) => (value === null ? null : 0)));
  const layers = data.depths.map((_, depth) => data.places.filter(([kind, at]) => at === depth && isOfKind(kind)).length);
  data.places.forEach(([kind, depth], layer) => {
    if (!isOfKind(kind)) return;
    const start = (layer * trace.tokens + state.token) * trace.kept;
    for (let i = start; i < start + trace.kept; i += 1) {
      if (trace.weights[i]) sums[depth][data.columns[trace.ids[i]]] += trace.weights[i] / data.parts / layers[depth];
    }
  });
  return sums;
}

function subject() {
  if (state.prompt === null) return "All tokens that count.";
  const tokens = tokensOf(strips[state.prompt]);
  const which = strips.length > 1 ? ` of prompt ${state.prompt + 1}` : "";
  return `Token ${state.token + 1} of ${tokens.length}${which}: “${tokens[state.token].textContent}”.`;
}

function showMap() {
  const rows = state.prompt === null ? data.usage[state.kind] : tokenRows();
  const peak = Math.max(...rows.flat().map((value) => value ?? 0)) || 1;
  [...byId("heat").tBodies[0].rows].forEach((row, depth) => [...row.cells].slice(1).forEach((cell, column) => {
    const value = rows[depth][column];
    cell.className = value === null ? "none" : "";
    cell.style.setProperty("--w", String((value ?? 0) / peak));
    cell.title = value === null ? "" : `layer ${data.depths[depth]}, ${data.names[column]}: ${value.toFixed(3)}`;
  }));
  byId("map-of").replaceChildren(html("b", { textContent: subject() }), ` Darkest: ${peak.toFixed(2)}`);
}

function choose(prompt, token) {
  state.prompt = prompt;
  state.token = token;
  strips.forEach((strip, p) => tokensOf(strip).forEach((element, t) => {
    element.setAttribute("aria-selected", String(p === prompt && t === token));
    element.tabIndex = t === (p === prompt ? token : 0) ? 0 : -1;
  }));
  showMap();
}

function walk(event, prompt) {
  const tokens = tokensOf(strips[prompt]);
  const at = tokens.indexOf(event.target);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (event.key === "Escape") choose(null, null);
  if (to === undefined || !tokens[to]) return;
  event.preventDefault();
  choose(prompt, to);
  tokens[to].focus();
}

strips.forEach((strip, prompt) => {
  strip.dataset.ready = "";
  strip.setAttribute("role", "listbox");
  strip.setAttribute("aria-orientation", "horizontal");
  strip.setAttribute("aria-label", `Tokens of prompt ${prompt + 1}`);
  tokensOf(strip).forEach((element, token) => {
    element.setAttribute("role", "option");
    element.addEventListener("click", () => choose(prompt, token));
  });
  strip.addEventListener("keydown", (event) => (event.key === "Enter" ? choose(prompt, tokensOf(strip).indexOf(event.target)) : walk(event, prompt)));
});
fillSelect("kind", data.kinds.map((kind) => (kind === "all" ? "all modules" : kind)));
byId("kind").addEventListener("change", (event) => { state.kind = Number(event.target.value); showMap(); });
byId("all-tokens").addEventListener("click", () => choose(null, null));
byId("map-controls").hidden = false;
choose(null, null);
