// Everything starts here: draw what there is data for, then listen.
function startRouting() {
  const prompts = data.routings.map(({ prompt }) => short(prompt.trim().replace(/\s+/g, " "), 90));
  fillSelect("prompt", prompts, 0);
  showPrompt();
  byId("prompt").addEventListener("change", (event) => { state.prompt = Number(event.target.value); showPrompt(); });
  byId("kind").addEventListener("change", (event) => { state.kind = Number(event.target.value); showView(); draw("plot-routing"); });
  byId("depth").addEventListener("input", (event) => chooseDepth(Number(event.target.value)));
  byId("shade").addEventListener("change", (event) => { state.shade = event.target.value; draw("plot-routing"); });
  const tokens = byId("tokens");
  for (const kind of ["pointerover", "click", "focusin"]) {
    tokens.addEventListener(kind, (event) => chooseToken(event.target.dataset.token));
  }
  tokens.addEventListener("keydown", walk);
}

function chooseToken(token) {
  if (token === undefined || Number(token) === state.token) return;
  state.token = Number(token);
  showToken();
}

function chooseDepth(depth) {
  state.depth = depth;
  byId("depth").value = String(depth);
  showView();
  showCursor(routed());
}

function walk(event) {
  const last = routed().tokens.length - 1;
  const to = { ArrowLeft: state.token - 1, ArrowRight: state.token + 1, Home: 0, End: last }[event.key];
  const up = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (to === undefined && up === undefined) return;
  event.preventDefault();
  if (to !== undefined) chooseToken(Math.max(0, Math.min(last, to)));
  else chooseDepth(Math.max(0, Math.min(routed().depths.length - 1, state.depth + up)));
  byId("tokens").children[state.token].focus();
}

function redraw() {
  drawAll();
  if (data.routings.length) showView();
}

if (data.means) plot("plot-means", (width) => meansPlot(data.means, width));
if (data.scores) plot("plot-scores", (width) => scorePlot(data.scores, width));
if (data.heat) plot("plot-heat", (width) => heatPlot(data.heat, width));
if (data.gap.length) plot("plot-gap", (width) => gapPlot(data.gap, width));
if (data.accuracy) plot("plot-accuracy", (width) => scorePlot(data.accuracy, width));
data.sweeps.forEach((sweep, i) => plot(`plot-sweep-${i}`, (width) => sweepPlot(sweep, width)));
if (data.similarity) {
  const cosine = cosines(data.similarity);
  plot("plot-similarity", (width) => similarityPlot(data.similarity, cosine, width));
}
if (data.rows) startRows();
if (data.matrix) startMatrix();
if (data.losses.length) plot("plot-losses", (width) => lossPlot(data.losses, width));
if (data.routings.length) startRouting();
