// The pictures of a study: all cells at a glance, differences of an answer, and what drift did by depth.
// Names beside a picture; on a phone each stands in two lines.
function namesBeside(names, width) {
  const parts = (name) => name.split(name.includes(" − ") ? /(?= − )/ : name.includes("[") ? /(?=\[)/ : /(?<=: )/);
  return names.map((name) => (width > 620 ? [name] : parts(name)));
}

// A range with 0 in it, or not, and some room at both ends.
function rangeOf(values, hasZero) {
  const [low, high] = [Math.min(...values, ...(hasZero ? [0] : [])), Math.max(...values, ...(hasZero ? [0] : []))];
  const pad = 0.03 * (high - low || 1);
  return [low - pad, high + pad];
}

function columnsPlot(columns, width) {
  const names = columns.lines.map(({ name }) => name);
  const range = rangeOf(columns.lines.flatMap(({ points }) => points.flatMap((point) => point?.slice(0, 3) ?? [])), false);
  const p = ladder(namesBeside(names, width), width, { row: width > 620 ? 22 : 34, range, title: "points of 100" });
  const base = columns.lines.find(({ name }) => name === columns.base);
  base?.points.forEach((point, i) => point && p.add(line([[p.x(point[0]), p.top], [p.x(point[0]), p.bottom]], { stroke: hueOf(i), width: 1.3, dash: "2 3" })));
  columns.lines.forEach(({ name, points }, row) => {
    if (row > 0 && name.split(": ")[0] !== names[row - 1].split(": ")[0]) p.add(line([[0, p.y(row - 0.5)], [p.right, p.y(row - 0.5)]], { stroke: "var(--line)" }));
    points.forEach((point, i) => {
      if (!point) return;
      const [value, low, high, tasks] = point;
      const y = p.y(row + (i - (points.length - 1) / 2) * 0.3);
      const tip = `${name}, ${columns.splits[i]}\n${value.toFixed(1)}  [${low.toFixed(1)}, ${high.toFixed(1)}]\n${tasks} tasks`;
      p.add(spread(p, low, high, y, hueOf(i)), mark(p.x(value), y, { shape: i, radius: 4, fill: hueOf(i) }, tip));
    });
  });
  return [legend(columns.splits.map((name, i) => ({ name, shape: i, fill: hueOf(i) }))), p.svg];
}

function differencesPlot(lines, width) {
  const peers = [...new Set(lines.map(({ against }) => against))];
  const names = lines.map(({ cell, against }) => (peers.length > 1 ? `${cell} − ${against}` : cell));
  const title = peers.length > 1 ? "difference in points" : `points above ${peers[0]}`;
  const splits = [...new Set(lines.flatMap(({ points }) => points.map(({ split }) => split)))];
  const range = rangeOf(lines.flatMap(({ points }) => points.flatMap(({ rows, tasks }) => [...rows, ...(tasks ?? [])])), true);
  const p = ladder(namesBeside(names, width), width, { row: width > 620 ? 44 : 52, range, title });
  p.add(line([[p.x(0), p.top], [p.x(0), p.bottom]], { stroke: "var(--soft)", width: 1.5 }));
  lines.forEach(({ points }, row) => points.forEach(({ split, verdict, rows: [value, low, high], tasks }) => {
    const i = splits.indexOf(split);
    const [hue, y] = [hueOf(i), p.y(row + (i - (splits.length - 1) / 2) * 0.36)];
    const wide = tasks ? `\nover tasks [${written(tasks[0], 1)}, ${written(tasks[1], 1)}]` : "";
    const tip = `${names[row]}, ${split}: ${verdict}\n${written(value, 1)} points, over rows [${written(low, 1)}, ${written(high, 1)}]${wide}`;
    if (tasks) p.add(spread(p, ...tasks, y, hue, 1));
    p.add(spread(p, low, high, y, hue, 4));
    p.add(mark(p.x(value), y, { shape: i, fill: verdict === "level" ? "var(--paper)" : hue, stroke: hue, width: 2 }, tip));
  }));
  return [...(splits.length > 1 ? [legend(splits.map((name, i) => ({ name, shape: i, fill: hueOf(i) })))] : []), p.svg];
}

function driftPlot(lines, width) {
  const layers = [...new Set(lines.flatMap((drift) => drift.layers))].sort((a, b) => a - b);
  const every = Math.ceil(layers.length / Math.max(1, Math.min(width, 760) / 40));
  const xTicks = layers.filter((_, i) => i % every === 0).map((layer) => [layer, String(layer)]);
  const range = [Math.min(...layers) - 0.3, Math.max(...layers) + 0.3];
  const p = chart(Math.min(width, 760), 300, range, [0, 1], { title: "layer", xTicks, least: 0 });
  lines.forEach(({ name, layers: depths, values }, i) => {
    const places = depths.map((layer, j) => [p.x(layer), p.y(values[j])]);
    p.add(line(places, { stroke: hueOf(i), width: 2.5 }));
    places.forEach((place, j) => p.add(mark(...place, { radius: 4, fill: hueOf(i) }, `${name}\nlayer ${depths[j]}: ${values[j].toFixed(2)}`)));
  });
  return [...(lines.length > 1 ? [legend(lines.map(({ name }, i) => ({ name, fill: hueOf(i) })))] : []), p.svg];
}

const KINDS = {
  sweep: sweepPlot,
  differences: ({ lines }, width) => differencesPlot(lines, width),
  gaps: ({ panels, whole }, width) => gapPlot(panels, width, whole),
  drift: ({ lines }, width) => driftPlot(lines, width),
};

const redraw = drawAll;

if (data.columns) plot("plot-columns", (width) => columnsPlot(data.columns, width));
if (data.heat) plot("plot-heat", (width) => heatPlot(data.heat, width));
data.answers.forEach((pictures, i) => pictures.forEach((drawn, j) => plot(`plot-answer-${i}-${j}`, (width) => KINDS[drawn.kind](drawn, width))));
