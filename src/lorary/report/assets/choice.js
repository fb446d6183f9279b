// Quality of each number of clusters; the number that was chosen is marked.
function choicePlot(candidates, chosen, width) {
  const isLate = chosen > (candidates[0][0] + candidates.at(-1)[0]) / 2;
  const line = (index, name, hue) => ({
    type: "scatter", mode: "lines+markers", name, x: candidates.map(([k]) => k), y: candidates.map((row) => row[index]),
    line: { color: colour(hue), width: 2 }, marker: { size: 7 }, hovertemplate: `%{x} clusters<br>${name} %{y:.3f}<extra></extra>`,
  });
  const traces = [line(1, "silhouette", "--hue-0"), line(2, "stability", "--hue-5")];
  const layout = layoutOf({
    width, height: 320, margin: { l: 48, r: 14, t: 34, b: 48 }, showlegend: true,
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    xaxis: axisOf({ title: { text: "clusters", font: { size: 13 } }, tickformat: "d", showgrid: false }),
    yaxis: axisOf({ rangemode: "tozero" }),
    shapes: [{ type: "line", x0: chosen, x1: chosen, yref: "paper", y0: 0, y1: 1, line: { color: colour("--soft"), width: 1, dash: "dot" } }],
    annotations: [{ x: chosen, yref: "paper", y: 1, yanchor: "top", xanchor: isLate ? "right" : "left", showarrow: false, text: ` ${chosen} chosen `, font: { color: colour("--soft"), size: 12 } }],
  });
  return { traces: traces.filter(({ y }) => y.some((value) => value !== null)), layout };
}
