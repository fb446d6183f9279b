// The map of tokens and layers. Its rows are the depths of the chosen module kind.
const mapDepths = (trace) => trace.depths.map((_, i) => i).filter((i) => trace.depths[i] !== "all" && trace.views[state.kind][i] !== null);

function cursor(trace) {
  const line = { color: colour("--ink"), width: 1.5 };
  const row = mapDepths(trace).indexOf(state.depth);
  const column = { type: "rect", yref: "paper", x0: state.token - 0.5, x1: state.token + 0.5, y0: 0, y1: 1, line };
  const across = { type: "rect", xref: "paper", x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line };
  return row < 0 ? [column] : [column, across];
}

function mapTrace(trace, depths) {
  const colours = expertColours(trace.experts);
  const cells = depths.map((depth) => trace.tokens.map((_, t) => strongest(trace, trace.views[state.kind][depth], t)));
  const text = cells.map((row, d) => row.map((experts, t) =>
    `${depthName(trace.depths[depths[d]])}, token ${t + 1} “${plain(visible(trace.tokens[t]))}”<br>` +
    experts.map(([id, weight]) => `${weight.toFixed(2)} ${plain(trace.experts[id])}`).join("<br>")));
  const shared = { type: "heatmap", text, hovertemplate: "%{text}<extra></extra>", hoverongaps: false };
  if (state.shade === "spread") {
    const z = depths.map((depth) => trace.tokens.map((_, t) =>
      trace.spread[trace.views[state.kind][depth] * trace.tokens.length + t] / trace.parts.spread));
    return { ...shared, z, zmin: 1, colorscale: "Cividis", colorbar: { thickness: 10, outlinewidth: 0, x: 1.01 } };
  }
  const used = [...new Set(cells.flat().filter((experts) => experts.length).map((experts) => experts[0][0]))].sort((a, b) => a - b);
  const place = new Map(used.map((id, i) => [id, i]));
  // Two equal stops per expert: steps of colour, no blending.
  const colorscale = used.flatMap((id, i) => [[i / used.length, colours[id]], [(i + 1) / used.length, colours[id]]]);
  const z = cells.map((row) => row.map((experts) => (experts.length ? place.get(experts[0][0]) : null)));
  const steps = colorscale.length ? { colorscale } : {};
  return { ...shared, z, zmin: -0.5, zmax: used.length - 0.5, showscale: false, ...steps };
}

function routingMap(trace, width) {
  const depths = mapDepths(trace);
  const isNamed = trace.tokens.length <= MAP_TOKENS && width > 420;
  const columns = trace.tokens.map((_, i) => i);
  const bottom = isNamed ? 92 : 44;
  const step = width > 420 || columns.length <= 60 ? 20 : 50;
  const every = Math.ceil(depths.length / 16);
  const layout = layoutOf({
    width, height: Math.max(170, Math.min(520, 26 * depths.length)) + bottom + 10,
    margin: { l: 46, r: state.shade === "spread" ? 56 : 12, t: 10, b: bottom },
    xaxis: axisOf({
      showgrid: false, ticks: "",
      ...(isNamed
        ? { tickvals: columns, ticktext: trace.tokens.map((token) => plain(short(visible(token).trim(), 12))), tickangle: -60, tickfont: { size: 11 } }
        : { title: { text: "token", font: { size: 13 } }, tickvals: columns.filter((i) => i % step === step - 1), ticktext: columns.map((i) => i + 1).filter((i) => i % step === 0) }),
    }),
    yaxis: axisOf({
      showgrid: false, ticks: "", title: { text: "layer", standoff: 4, font: { size: 13 } },
      tickvals: depths.map((_, i) => i).filter((i) => i % every === 0),
      ticktext: depths.filter((_, i) => i % every === 0).map((depth) => trace.depths[depth]),
    }),
    shapes: cursor(trace),
  });
  return { traces: [mapTrace(trace, depths)], layout };
}
