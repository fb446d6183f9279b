// The map of tokens and layers. Its rows are the depths of the chosen module kind.
const mapDepths = (trace) => trace.depths.map((_, i) => i).filter((i) => trace.depths[i] !== "all" && trace.views[state.kind][i] !== null);

// What the map now shows: the picture, and the group that frames the chosen token and layer.
const routedMap = { p: null, frames: null };

function showCursor(trace) {
  const { p, frames } = routedMap;
  const [row, token] = [mapDepths(trace).indexOf(state.depth), state.token];
  const look = { fill: "none", stroke: "var(--ink)", "stroke-width": 1.5, "pointer-events": "none" };
  const across = row < 0 ? [] : [rectangle(p.left, p.y(row), p.right, p.y(row + 1), look)];
  frames.replaceChildren(rectangle(p.x(token), p.top, p.x(token + 1), p.bottom, look), ...across);
}

// The colour of each cell, and the scale where there is one.
function cellColours(trace, depths, experts) {
  if (state.shade === "expert") {
    const colours = expertColours(trace.experts);
    return { of: (d, t) => (experts(d, t).length ? colours[experts(d, t)[0][0]] : null) };
  }
  const spreadAt = (d, t) => trace.spread[trace.views[state.kind][depths[d]] * trace.tokens.length + t] / trace.parts.spread;
  const most = Math.max(1.01, ...depths.flatMap((_, d) => trace.tokens.map((_, t) => spreadAt(d, t))));
  const scale = shades(1, most, RISING);
  return { of: (d, t) => scale.of(spreadAt(d, t)), bar: scaleBar(scale, "1", `${most.toFixed(1)} experts`) };
}

function routingMap(trace, width) {
  const depths = mapDepths(trace);
  const count = trace.tokens.length;
  const isNamed = count <= 48 && width > 420;
  const words = trace.tokens.map((token) => short(visible(token).trim(), 12));
  const bottom = isNamed ? 16 + 0.87 * Math.max(...words.map((word) => widthOf(word, 11))) : 48;
  const height = Math.max(150, Math.min(520, 26 * depths.length)) + 6 + bottom;
  const p = picture(width, height, { left: 46, right: 10, top: 6, bottom }, [0, count], [0, depths.length]);
  const experts = (d, t) => strongest(trace, trace.views[state.kind][depths[d]], t);
  const { of, bar } = cellColours(trace, depths, experts);
  const image = grid(p, depths.length, count, of, (d, t) =>
    [`${depthName(trace.depths[depths[d]])}, token ${t + 1} “${visible(trace.tokens[t])}”`,
      ...experts(d, t).map(([id, weight]) => `${weight.toFixed(2)} ${trace.experts[id]}`)].join("\n"));
  image.addEventListener("click", (event) => {
    const [row, token] = image.cellAt(event);
    chooseDepth(depths[row]);
    chooseToken(token);
  });
  const every = Math.ceil(depths.length / 16);
  depths.forEach((depth, d) => d % every === 0 && p.add(label(trace.depths[depth], p.left - 6, p.y(d + 0.5), { anchor: "end" })));
  p.add(label("layer", 10, (p.top + p.bottom) / 2, { anchor: "middle", turn: -90, size: 13 }));
  if (isNamed) {
    words.forEach((word, t) => p.add(label(word, p.x(t + 0.5), p.bottom + 9, { anchor: "end", turn: -60, size: 11 })));
  } else {
    axisBelow(p, { title: "token", ticks: ticksOf([1, count], width / 60).map(([at, text]) => [at - 0.5, text]), hasGrid: false });
  }
  Object.assign(routedMap, { p, frames: make("g") });
  p.add(routedMap.frames);
  showCursor(trace);
  return [...(bar ? [bar] : []), p.svg];
}
