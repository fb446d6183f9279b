// A number of one router varied: a line per library and split, the base and the oracle as levels of the same colour.
function sweepPlot(sweep, width) {
  const several = new Set(sweep.lines.map(({ library }) => library)).size > 1;
  const named = ({ library, split }) => (several ? `${library}, ${split}` : split);
  const ticks = [...new Set(sweep.lines.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
  const traces = sweep.lines.flatMap((line, i) => {
    const hue = hueOf(i);
    const at = line.points.map(([x]) => ticks.indexOf(x));
    const levels = sweep.levels.filter(({ library, split }) => library === line.library && split === line.split);
    return [
      {
        type: "scatter", mode: "lines+markers", name: plain(named(line)), x: at, y: line.points.map(([, mean]) => mean),
        line: { color: hue, width: 2.5 }, marker: { size: 8 },
        error_y: {
          type: "data", symmetric: false, color: hue, thickness: 1.2, width: 4,
          array: line.points.map(([, mean, , high]) => high - mean), arrayminus: line.points.map(([, mean, low]) => mean - low),
        },
        text: line.points.map(([x, mean, low, high]) =>
          `${sweep.field} ${x}, ${plain(named(line))}<br>${mean.toFixed(1)}  [${low.toFixed(1)}, ${high.toFixed(1)}]`),
        hovertemplate: "%{text}<extra></extra>",
      },
      ...levels.map(({ router, mean }) => ({
        type: "scatter", mode: "lines", x: [-0.3, ticks.length - 0.7], y: [mean, mean], showlegend: false,
        line: { color: hue, width: 1.3, dash: router === "base" ? "dot" : "dash" },
        hovertemplate: `${plain(router)}, ${plain(named(line))}: ${mean.toFixed(1)}<extra></extra>`,
      })),
    ];
  });
  const layout = layoutOf({
    width: Math.min(width, 760), height: 340 + 18 * Math.floor(sweep.lines.length / (width > 520 ? 4 : 2)),
    margin: { l: 44, r: 14, t: 30 + 20 * Math.ceil(sweep.lines.length / (width > 520 ? 4 : 2)), b: 50 },
    showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    xaxis: axisOf({
      range: [-0.3, ticks.length - 0.7], showgrid: false, tickvals: ticks.map((_, i) => i), ticktext: ticks,
      title: { text: plain(sweep.title), font: { size: 13 } },
    }),
    yaxis: axisOf({}),
  });
  return { traces, layout };
}
