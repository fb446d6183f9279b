// Validation loss of the base and of each expert, joined by a line whose length is the gain.
const NAMED_EXPERTS = 60;

// Every expert by name, or where they are too many the families at the first of their experts.
function lossTicks(rows, most) {
  const places = rows.map((_, i) => i);
  if (rows.length <= NAMED_EXPERTS) return { tickvals: places, ticktext: rows.map(({ name }) => plain(short(name, most))) };
  const first = places.filter((i) => i === 0 || rows[i].family !== rows[i - 1].family);
  return { tickvals: first, ticktext: first.map((i) => plain(short(rows[i].family, most))) };
}

function lossPlot(rows, width) {
  const ticks = lossTicks(rows, width > 520 ? 26 : 16);
  const left = Math.min(width * 0.38, 18 + 7.2 * Math.max(...ticks.ticktext.map((label) => label.length)));
  const places = rows.map((_, i) => i);
  const isDense = rows.length > NAMED_EXPERTS;
  const hover = rows.map(({ name, base, expert }) => `${plain(name)}<br>base ${base.toFixed(3)}, expert ${expert.toFixed(3)}`);
  const colours = rows.map(({ family }) => familyColour(family));
  const dots = (key, label, marker) => ({
    type: "scatter", mode: "markers", name: label, x: rows.map((row) => row[key]), y: places, marker,
    text: hover, hovertemplate: "%{text}<extra></extra>",
  });
  const layout = layoutOf({
    width, height: 100 + (isDense ? 6 : 26) * rows.length, margin: { l: left, r: 14, t: 36, b: 50 },
    showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    xaxis: axisOf({ title: { text: "nats per token", font: { size: 13 } }, rangemode: "tozero" }),
    yaxis: axisOf({
      range: [rows.length - 0.5, -0.5], showgrid: false, ...ticks,
    }),
    shapes: rows.map(({ base, expert }, i) => ({
      type: "line", layer: "between", x0: base, x1: expert, y0: i, y1: i, line: { color: colours[i], width: isDense ? 1.5 : 3 },
    })),
  });
  const open = { color: colour("--paper"), size: isDense ? 5 : 10, line: { color: colour("--ink"), width: 1.5 } };
  return { traces: [dots("base", "base", open), dots("expert", "expert", { color: colours, size: isDense ? 5 : 11 })], layout };
}
