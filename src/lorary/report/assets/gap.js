// The way from the base (0) to the oracle (100): a bar per router, one panel per split.
function gapPlot(panels, width, whole = "the oracle") {
  const routers = [...new Set(panels.flatMap((panel) => panel.routers))];
  // On a phone, a library stands in a line of its own above its router.
  const lines = (name) => (width > 520 ? [name] : name.split(/(?<=: )/));
  const most = width > 520 ? 40 : 22;
  const left = Math.min(width * 0.45, 18 + 6.9 * Math.max(...routers.flatMap(lines).map((line) => Math.min(line.length, most))));
  const values = panels.flatMap(({ points }) => points.flat().filter((value) => value !== null));
  const range = [Math.max(-100, Math.min(-5, ...values)), Math.min(200, Math.max(105, ...values))];
  const traces = panels.map(({ name, routers: own, points }, i) => ({
    type: "bar", orientation: "h", name, y: own.map((router) => routers.indexOf(router)), x: points.map(([value]) => value),
    marker: { color: colour(`--hue-${[0, 1, 2][i]}`) },
    error_x: {
      type: "data", symmetric: false, color: colour("--ink"), thickness: 1.2, width: 3,
      array: points.map(([value, , high]) => (high === null ? 0 : high - value)),
      arrayminus: points.map(([value, low]) => (low === null ? 0 : value - low)),
    },
    hovertemplate: points.map(([value, low, high], j) =>
      `${plain(own[j])}, ${name}<br>${value.toFixed(0)} %${low === null ? "" : `  [${low.toFixed(0)}, ${high.toFixed(0)}]`}<extra></extra>`),
  }));
  const layout = layoutOf({
    width, height: 96 + (14 + 16 * panels.length) * routers.length, margin: { l: left, r: 14, t: 40, b: 52 },
    barmode: "group", bargap: 0.3, showlegend: panels.length > 1, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" },
    xaxis: axisOf({ range, ticksuffix: " %", title: { text: width > 520 ? `gap closed, from the base to ${plain(short(whole, 30))}` : "gap closed", font: { size: 13 } } }),
    yaxis: axisOf({
      range: [routers.length - 0.5, -0.5], showgrid: false,
      tickvals: routers.map((_, i) => i), ticktext: routers.map((name) => lines(name).map((line) => plain(short(line, most))).join("<br>")),
    }),
    shapes: [0, 100].map((x) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: colour("--soft"), width: 1.5, dash: "dot" } })),
  });
  return { traces, layout };
}
