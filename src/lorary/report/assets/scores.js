// Means by family and router: one panel per split, beside each other where there is room.
const SHAPES = ["circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "x"];
const ROUTER_HUES = [1, 2, 3, 5, 4, 6];

function routerColours(scores) {
  const rest = scores.routers.filter((name) => name !== scores.base && name !== scores.main);
  const hue = (name) => (name === scores.main ? 0 : ROUTER_HUES[rest.indexOf(name) % ROUTER_HUES.length]);
  return scores.routers.map((name) => (name === scores.base ? colour("--soft") : colour(`--hue-${hue(name)}`)));
}

// So many letters of a column's name: the library is cut before the router is.
function inLegend(name, most) {
  const start = name.lastIndexOf(": ");
  if (start < 0 || name.length <= most) return short(name, most);
  const router = name.slice(start);
  return short(name.slice(0, start), Math.max(4, most - router.length)) + short(router, most - 4);
}

function scoreTraces(scores, colours, most) {
  return scores.splits.flatMap((split, panel) => scores.routers.map((router, r) => {
    const spread = (r - (scores.routers.length - 1) / 2) * (0.72 / scores.routers.length);
    const found = split.groups.map((group, g) => [group.points[r], g + spread, group.family ?? "all tasks"]).filter(([p]) => p);
    return {
      type: "scatter", mode: "markers", name: plain(inLegend(router, most)), legendgroup: router, showlegend: panel === 0,
      x: found.map(([p]) => p[0]), y: found.map(([, y]) => y),
      xaxis: panel ? `x${panel + 1}` : "x", yaxis: panel ? `y${panel + 1}` : "y",
      error_x: {
        type: "data", symmetric: false, array: found.map(([p]) => p[2] - p[0]), arrayminus: found.map(([p]) => p[0] - p[1]),
        color: colours[r], thickness: 1.5, width: 0,
      },
      marker: { color: colours[r], symbol: SHAPES[r % SHAPES.length], size: 9 },
      text: found.map(([p, , family]) =>
        `${plain(family)}, ${split.name}<br>${plain(router)}: ${p[0].toFixed(1)}  [${p[1].toFixed(0)}, ${p[2].toFixed(0)}]` +
        `<br>${p[3]} ${p[3] === 1 ? "task" : "tasks"}`),
      hovertemplate: "%{text}<extra></extra>",
    };
  }));
}

function scorePlot(scores, width) {
  const row = Math.max(38, 11 * scores.routers.length);
  const isWide = width > 720;
  const sizes = scores.splits.map((split) => split.groups.length * row);
  const [left, gap] = [isWide ? 130 : 104, isWide ? 130 : 66];
  // The legend's lines, since plotly lets a long one run into what lies below: entries are as wide as the widest.
  const most = Math.floor((width - 60) / 8.5);
  const entry = 46 + 7.2 * Math.max(...scores.routers.map((name) => Math.min(name.length, most)));
  const legendLines = Math.ceil(scores.routers.length / Math.max(1, Math.floor((isWide ? width - left - 14 : width) / entry)));
  const top = 47 + 19 * legendLines;
  const inner = isWide ? Math.max(...sizes) : sizes.reduce((sum, size) => sum + size, 0) + gap * (sizes.length - 1);
  const layout = layoutOf({
    width, height: inner + top + 46, margin: { l: left, r: 14, t: top, b: 46 },
    showlegend: true, legend: { orientation: "h", x: isWide ? 0 : -left / (width - left - 14), y: 1 + 32 / inner, yanchor: "bottom" },
    annotations: [], shapes: [],
  });
  const across = width - left - 14;
  const panelWidth = (across - gap * (sizes.length - 1)) / sizes.length / across;
  let used = 0;
  scores.splits.forEach((split, i) => {
    const suffix = i ? String(i + 1) : "";
    const x = isWide ? [i * (panelWidth + gap / across), i * (panelWidth + gap / across) + panelWidth] : [0, 1];
    const y = isWide ? [1 - sizes[i] / inner, 1] : [Math.max(0, 1 - (used + sizes[i]) / inner), 1 - used / inner];
    used += sizes[i] + gap;
    layout[`xaxis${suffix}`] = axisOf({ domain: x, anchor: `y${suffix}`, range: [-2, 102], dtick: 25, side: "bottom" });
    layout[`yaxis${suffix}`] = axisOf({
      domain: y, anchor: `x${suffix}`, range: [split.groups.length - 0.5, -0.5], showgrid: false,
      tickvals: split.groups.map((_, g) => g),
      ticktext: split.groups.map((group) => (group.family === null ? "<b>all tasks</b>" : plain(short(group.family, 16)))),
    });
    layout.annotations.push({
      text: `<b>${split.name}</b>`, x: x[0], y: y[1], xref: "paper", yref: "paper", showarrow: false,
      xanchor: "left", yanchor: "bottom", yshift: 4,
    });
    for (const chance of scores.chance ?? []) layout.shapes.push({
      type: "line", xref: `x${suffix}`, yref: `y${suffix} domain`, x0: chance, x1: chance, y0: 0, y1: 1,
      line: { color: colour("--soft"), width: 1.5, dash: "dot" },
    });
    split.groups.slice(1).forEach((_, g) => layout.shapes.push({
      type: "line", xref: `x${suffix} domain`, yref: `y${suffix}`, x0: 0, x1: 1, y0: g + 0.5, y1: g + 0.5,
      line: { color: colour("--line"), width: g ? 1 : 2 },
    }));
  });
  return { traces: scoreTraces(scores, routerColours(scores), most), layout };
}
