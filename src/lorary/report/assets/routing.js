// Where the tokens of a prompt go: a row of tokens, a map of tokens and layers, and the experts of one token.
const NUM_BARS = 12;
const MAP_TOKENS = 48;
const state = { prompt: 0, kind: 0, depth: 0, token: 0, shade: "expert" };
const unpacked = new Map();

function routed() {
  if (!unpacked.has(state.prompt)) {
    const packed = data.routings[state.prompt];
    unpacked.set(state.prompt, {
      ...packed,
      ids: unpack(packed.ids, Uint16Array), weights: unpack(packed.weights, Uint8Array),
      spread: unpack(packed.spread, Uint16Array), usage: unpack(packed.usage, Uint16Array),
    });
  }
  return unpacked.get(state.prompt);
}

// The strongest experts of a token in a view: [[expert, weight], ...], those of weight zero left out.
function strongest(trace, view, token) {
  const start = (view * trace.tokens.length + token) * trace.kept;
  return Array.from({ length: trace.kept }, (_, i) => [trace.ids[start + i], trace.weights[start + i] / trace.parts.weights])
    .filter(([, weight]) => weight > 0);
}

const currentView = (trace) => trace.views[state.kind][state.depth];
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
const depthName = (depth) => (depth === "all" ? "all layers" : depth === "-" ? "no number" : `layer ${depth}`);
const kindName = (kind) => (kind === "all" ? "all modules" : kind);

function bar(name, weight, shown, hue) {
  const length = html("i");
  length.style.setProperty("--w", String(shown));
  length.style.setProperty("--c", hue);
  return html("li", {}, html("span", { textContent: name }), length, html("b", { textContent: weight.toFixed(2) }));
}

function showTokens(trace, colours) {
  const view = currentView(trace);
  const all = trace.tokens.map((_, t) => (view === null ? [] : strongest(trace, view, t)));
  const peak = Math.max(...all.map((experts) => experts[0]?.[1] ?? 0), 1e-6);
  byId("tokens").replaceChildren(...trace.tokens.map((token, t) => {
    const [best] = all[t];
    const element = html("span", { className: "token", textContent: visible(token), tabIndex: t === state.token ? 0 : -1 });
    element.setAttribute("role", "option");
    element.setAttribute("aria-selected", String(t === state.token));
    element.setAttribute("aria-label", `token ${t + 1}, ${visible(token)}: ${best ? `${trace.experts[best[0]]} ${best[1].toFixed(2)}` : "no expert"}`);
    element.dataset.token = String(t);
    if (best) element.style.setProperty("--c", colours[best[0]]);
    element.style.setProperty("--w", best ? String(best[1] / peak) : "0");
    return element;
  }));
}

function showExperts(trace, colours) {
  const view = currentView(trace);
  byId("token-name").textContent = `Token ${state.token + 1} of ${trace.tokens.length}: “${visible(trace.tokens[state.token])}”`;
  if (view === null) {
    byId("token-experts").replaceChildren(bar("this module is not routed here", 0, 0, "transparent"));
    return;
  }
  const experts = strongest(trace, view, state.token);
  const rest = 1 - experts.reduce((sum, [, weight]) => sum + weight, 0);
  const bars = experts.map(([id, weight]) => bar(trace.experts[id], weight, weight, colours[id]));
  if (rest > 0.015) bars.push(bar("others, or the base", rest, rest, colour("--soft")));
  byId("token-experts").replaceChildren(...bars);
}

function showUsage(trace, colours) {
  const view = currentView(trace);
  byId("usage-of").textContent = `mean weight, ${kindName(trace.kinds[state.kind])}, ${depthName(trace.depths[state.depth])}`;
  const usage = trace.experts.map((_, id) => (view === null ? 0 : trace.usage[view * trace.experts.length + id] / trace.parts.usage));
  const order = usage.map((_, id) => id).filter((id) => usage[id] > 0).sort((a, b) => usage[b] - usage[a]);
  const peak = Math.max(...usage, 1e-6);
  const bars = order.slice(0, NUM_BARS).map((id) => bar(trace.experts[id], usage[id], usage[id] / peak, colours[id]));
  const left = order.slice(NUM_BARS);
  const rest = left.reduce((sum, id) => sum + usage[id], 0);
  if (left.length) bars.push(bar(`${left.length} more`, rest, Math.min(1, rest / peak), colour("--soft")));
  byId("usage").replaceChildren(...bars);
}

function showToken() {
  const trace = routed();
  for (const element of byId("tokens").children) {
    const isChosen = Number(element.dataset.token) === state.token;
    element.tabIndex = isChosen ? 0 : -1;
    element.setAttribute("aria-selected", String(isChosen));
  }
  showExperts(trace, expertColours(trace.experts));
  showCursor(trace);
}

function showView() {
  const trace = routed();
  const colours = expertColours(trace.experts);
  byId("depth-name").textContent = depthName(trace.depths[state.depth]);
  byId("depth").setAttribute("aria-valuetext", depthName(trace.depths[state.depth]));
  showTokens(trace, colours);
  showExperts(trace, colours);
  showUsage(trace, colours);
}

function showPrompt() {
  const trace = routed();
  state.token = Math.min(state.token, trace.tokens.length - 1);
  state.kind = Math.min(state.kind, trace.kinds.length - 1);
  state.depth = Math.min(state.depth, trace.depths.length - 1);
  fillSelect("kind", trace.kinds.map(kindName), state.kind);
  byId("depth").max = String(trace.depths.length - 1);
  byId("depth").value = String(state.depth);
  const verdict = trace.right === null ? [] : [" ", html("span", { className: `verdict ${trace.right ? "up" : "down"}`, textContent: trace.right ? "right" : "wrong" })];
  byId("answer").replaceChildren(html("small", { textContent: "answer  " }), trace.answer.trim(), ...verdict);
  showView();
  plot("plot-routing", (width) => routingMap(routed(), width));
}
