// The pictures of a study: all cells at a glance, differences of an answer, and what drift did by depth.
const SPLIT_SHAPES = ["circle", "diamond", "square", "triangle-up", "cross"];

// How far names reach to the left of a plot, and the names; on a phone each stands in two lines.
const MOST_LETTERS = 44;
function namesBeside(names, width) {
  const isWide = width > 620;
  const most = isWide ? MOST_LETTERS : Math.floor((width * 0.5 - 16) / 7.1);
  const parts = (name) => name.split(name.includes(" − ") ? /(?= − )/ : name.includes("[") ? /(?=\[)/ : /(?<=: )/);
  const lines = (name) => (isWide ? [name] : parts(name)).map((line) => short(line, most));
  const longest = Math.max(...names.flatMap(lines).map(({ length }) => length));
  return { left: Math.min(width * 0.5, 16 + 7.1 * longest), texts: names.map((name) => lines(name).map(plain).join("<br>")) };
}

function columnsPlot(columns, width) {
  const names = columns.lines.map(({ name }) => name);
  const { left, texts } = namesBeside(names, width);
  const row = width > 620 ? 22 : 34;
  const traces = columns.splits.map((split, i) => {
    const found = columns.lines.map(({ points }, y) => [points[i], y + (i - (columns.splits.length - 1) / 2) * 0.3, names[y]]).filter(([point]) => point);
    return {
      type: "scatter", mode: "markers", name: split, x: found.map(([[value]]) => value), y: found.map(([, y]) => y),
      error_x: {
        type: "data", symmetric: false, width: 0, thickness: 1.5, color: hueOf(i),
        array: found.map(([[value, , high]]) => high - value), arrayminus: found.map(([[value, low]]) => value - low),
      },
      marker: { color: hueOf(i), symbol: SPLIT_SHAPES[i], size: 8 },
      text: found.map(([[value, low, high, tasks], , name]) =>
        `${plain(name)}, ${plain(split)}<br>${value.toFixed(1)}  [${low.toFixed(1)}, ${high.toFixed(1)}]<br>${tasks} tasks`),
      hovertemplate: "%{text}<extra></extra>",
    };
  });
  const base = columns.lines.find(({ name }) => name === columns.base);
  const levels = base ? base.points.map((point, i) => point && {
    type: "line", layer: "below", x0: point[0], x1: point[0], yref: "paper", y0: 0, y1: 1, line: { color: hueOf(i), width: 1.3, dash: "dot" },
  }).filter((shape) => shape) : [];
  const isNewLibrary = (i) => i > 0 && names[i].split(": ")[0] !== names[i - 1].split(": ")[0];
  const edges = names.flatMap((_, i) => (isNewLibrary(i) ? [i - 0.5] : []));
  const layout = layoutOf({
    width, height: 96 + row * names.length, margin: { l: left, r: 14, t: 40, b: 50 },
    showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    xaxis: axisOf({ title: { text: "points of 100", font: { size: 13 } } }),
    yaxis: axisOf({ range: [names.length - 0.5, -0.5], showgrid: false, tickvals: names.map((_, i) => i), ticktext: texts, tickfont: { size: 12 } }),
    shapes: [...levels, ...edges.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour("--line"), width: 1 } }))],
  });
  return { traces, layout };
}

function differencesPlot(lines, width) {
  const peers = [...new Set(lines.map(({ against }) => against))];
  const names = lines.map(({ cell, against }) => (peers.length > 1 ? `${cell} − ${against}` : cell));
  const title = peers.length > 1 ? "difference in points" : `points above ${plain(short(peers[0], MOST_LETTERS))}`;
  const { left, texts } = namesBeside(names, width);
  const splits = [...new Set(lines.flatMap(({ points }) => points.map(({ split }) => split)))];
  const row = width > 620 ? 44 : 52;
  const traces = splits.flatMap((split, i) => {
    const found = lines.flatMap(({ points }, y) => points.filter((point) => point.split === split)
      .map((point) => ({ ...point, name: names[y], y: y + (i - (splits.length - 1) / 2) * 0.36 })));
    const wide = found.filter(({ tasks }) => tasks);
    const x = (points) => points.map(({ rows }) => rows[0]);
    const y = (points) => points.map((point) => point.y);
    const spread = (points, key, thickness) => ({
      type: "data", symmetric: false, width: 0, thickness, color: hueOf(i),
      array: points.map(({ rows, [key]: ends }) => ends.at(-1) - rows[0]), arrayminus: points.map(({ rows, [key]: ends }) => rows[0] - ends.at(-2)),
    });
    const words = ({ name, verdict, rows: [value, low, high], tasks }) =>
      `${plain(name)}, ${plain(split)}: ${verdict}<br>${value.toFixed(1)} points, over rows [${low.toFixed(1)}, ${high.toFixed(1)}]` +
      (tasks ? `<br>over tasks [${tasks[0].toFixed(1)}, ${tasks[1].toFixed(1)}]` : "");
    return [
      { type: "scatter", mode: "markers", x: x(wide), y: y(wide), error_x: spread(wide, "tasks", 1), marker: { size: 0.1, color: hueOf(i) }, showlegend: false, hoverinfo: "skip" },
      {
        type: "scatter", mode: "markers", name: split, x: x(found), y: y(found), error_x: spread(found, "rows", 4),
        marker: {
          size: 11, symbol: SPLIT_SHAPES[i], line: { color: hueOf(i), width: 2 },
          color: found.map(({ verdict }) => (verdict === "level" ? colour("--paper") : hueOf(i))),
        },
        text: found.map(words), hovertemplate: "%{text}<extra></extra>",
      },
    ];
  });
  const layout = layoutOf({
    width, height: 96 + row * lines.length, margin: { l: left, r: 14, t: 40, b: 50 },
    showlegend: splits.length > 1, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    xaxis: axisOf({ title: { text: title, font: { size: 13 } }, rangemode: "tozero" }),
    yaxis: axisOf({ range: [lines.length - 0.5, -0.5], showgrid: false, tickvals: names.map((_, i) => i), ticktext: texts }),
    shapes: [{ type: "line", layer: "below", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: colour("--soft"), width: 1.5 } }],
  });
  return { traces, layout };
}

function driftPlot(lines, width) {
  const traces = lines.map(({ name, layers, values }, i) => ({
    type: "scatter", mode: "lines+markers", name: plain(name), x: layers, y: values, line: { color: hueOf(i), width: 2.5 },
    hovertemplate: "layer %{x}: %{y:.2f}<extra></extra>",
  }));
  const layout = layoutOf({
    width: Math.min(width, 760), height: 300, margin: { l: 48, r: 14, t: 14, b: 50 },
    xaxis: axisOf({ title: { text: "layer", font: { size: 13 } }, showgrid: false }),
    yaxis: axisOf({ range: [0, 1.02], title: { text: "mean |cosine|", font: { size: 13 } } }),
  });
  return { traces, layout };
}

const KINDS = {
  sweep: (found, width) => sweepPlot(found, width),
  differences: ({ lines }, width) => differencesPlot(lines, width),
  gaps: ({ panels, whole }, width) => gapPlot(panels, width, whole),
  drift: ({ lines }, width) => driftPlot(lines, width),
};

function redraw() {
  drawAll();
}

if (data.columns) plot("plot-columns", (width) => columnsPlot(data.columns, width));
if (data.heat) plot("plot-heat", (width) => heatPlot(data.heat, width));
data.answers.forEach((pictures, i) => pictures.forEach((found, j) =>
  plot(`plot-answer-${i}-${j}`, (width) => KINDS[found.kind](found, width))));
