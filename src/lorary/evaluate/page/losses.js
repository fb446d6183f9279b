// Validation loss of the base and of each expert, joined by a line whose length is the gain.
function lossPlot(rows, width) {
  const left = Math.min(width * 0.38, 18 + 7.2 * Math.max(...rows.map(({ name }) => Math.min(name.length, 26))));
  const places = rows.map((_, i) => i);
  const hover = rows.map(({ name, base, expert }) => `${plain(name)}<br>base ${base.toFixed(3)}, expert ${expert.toFixed(3)}`);
  const colours = rows.map(({ family }) => familyColour(family));
  const dots = (key, label, marker) => ({
    type: "scatter", mode: "markers", name: label, x: rows.map((row) => row[key]), y: places, marker,
    text: hover, hovertemplate: "%{text}<extra></extra>",
  });
  const layout = layoutOf({
    width, height: 100 + 26 * rows.length, margin: { l: left, r: 14, t: 36, b: 50 },
    showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    xaxis: axisOf({ title: { text: "nats per token" }, rangemode: "tozero" }),
    yaxis: axisOf({
      range: [rows.length - 0.5, -0.5], showgrid: false, tickvals: places,
      ticktext: rows.map(({ name }) => plain(short(name, width > 520 ? 26 : 16))),
    }),
    shapes: rows.map(({ base, expert }, i) => ({
      type: "line", layer: "below", x0: base, x1: expert, y0: i, y1: i, line: { color: colours[i], width: 3 },
    })),
  });
  const open = { color: colour("--paper"), size: 10, line: { color: colour("--ink"), width: 1.5 } };
  return { traces: [dots("base", "base", open), dots("expert", "expert", { color: colours, size: 11 })], layout };
}
