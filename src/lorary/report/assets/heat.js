// Every task under every router: how far above or below the base, as colours; the value itself where there is room.
const HEAT_ROW = 22;
const HEAT_COLUMN = 74;

function heatPlot(heat, width) {
  const names = heat.rows.map(({ task }) => task);
  const left = Math.min(width * 0.36, 20 + 6.7 * Math.max(...names.map((name) => Math.min(name.length, 24))));
  const most = width > 520 ? 24 : 15;
  const columns = heat.routers.length;
  const longest = Math.max(...heat.routers.map((name) => Math.min(name.length, 44)));
  // Slanted names lean out to the right, where plotly hides what finds no room; upright ones need none.
  const isSlanted = (width - left) / columns > 44;
  const right = isSlanted ? 16 + 3.4 * longest : 16;
  // Where columns would be narrower than their names, the plot is wider than the page and scrolls in its box.
  const inner = Math.max(Math.min(width - left - right, HEAT_COLUMN * columns), 14 * columns);
  const cell = inner / columns;
  const row = heat.rows.length > 80 ? 12 : HEAT_ROW;
  const top = 24 + (isSlanted ? 5.8 : 6.7) * longest;
  const reach = Math.max(10, ...heat.rows.flatMap(({ gains }) => gains.filter((gain) => gain !== null).map(Math.abs)));
  const colours = ["--low-end", "--low", "--zero", "--high", "--high-end"].map((name, i) => [i / 4, colour(name)]);
  const hasText = cell >= 34 && row >= 18;
  const trace = {
    type: "heatmap", z: heat.rows.map(({ gains }) => gains), zmin: -reach, zmax: reach, colorscale: colours, xgap: 1, ygap: 1,
    text: heat.rows.map(({ values }) => values.map((value) => (value === null ? "" : value.toFixed(0)))),
    texttemplate: hasText ? "%{text}" : "", textfont: { size: 11 },
    customdata: heat.rows.map(({ task, family, values }) => values.map((value, i) =>
      `${plain(task)} (${plain(family)})<br>${plain(heat.routers[i])}: ${value === null ? "not scored" : value.toFixed(1)}`)),
    hovertemplate: "%{customdata}<br>%{z:+.1f} over the base<extra></extra>", hoverongaps: false,
    colorbar: {
      orientation: "h", yref: "container", y: 0, yanchor: "bottom", ypad: 4, thickness: 10, x: 0, xanchor: "left",
      lenmode: "pixels", len: Math.max(120, Math.min(280, inner)), outlinewidth: 0, tickangle: 0,
      tickvals: [-reach, 0, reach], ticktext: [`−${reach.toFixed(0)}`, "0", `+${reach.toFixed(0)} points`],
    },
  };
  const edges = heat.rows.flatMap(({ split }, i) => (i > 0 && split !== heat.rows[i - 1].split ? [i - 0.5] : []));
  const layout = layoutOf({
    width: left + inner + right, height: top + row * heat.rows.length + 56, margin: { l: left, r: right, t: top, b: 52 },
    xaxis: axisOf({
      side: "top", showgrid: false, ticks: "", tickangle: isSlanted ? -60 : -90, range: [-0.5, columns - 0.5], tickfont: { size: 12 },
      tickvals: heat.routers.map((_, i) => i), ticktext: heat.routers.map((name) => plain(short(name, 44))),
    }),
    yaxis: axisOf({
      range: [heat.rows.length - 0.5, -0.5], showgrid: false, ticks: "", tickfont: { size: row < 18 ? 9 : 12 },
      tickvals: names.map((_, i) => i), ticktext: names.map((name) => plain(short(name, most))),
    }),
    shapes: edges.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour("--ink"), width: 2 } })),
  });
  return { traces: [trace], layout };
}
