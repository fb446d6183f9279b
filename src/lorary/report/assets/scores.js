// Means by family and router: one panel per split, beside each other where there is room.
const ROUTER_HUES = [1, 2, 3, 5, 4, 6];

function routerColours({ routers, base, main }) {
  const others = routers.filter((name) => name !== base && name !== main);
  const hue = (name) => (name === main ? 0 : ROUTER_HUES[others.indexOf(name) % ROUTER_HUES.length]);
  return routers.map((name) => (name === base ? colour("--soft") : colour(`--hue-${hue(name)}`)));
}

const PANEL_GAP = 24;
const panelWidth = (count, width) => (width > 720 ? (width - PANEL_GAP * (count - 1)) / count : width);
const panel = (name, svg) => html("div", {}, html("h4", { textContent: name }), svg);
const beside = (panels) => html("div", { className: "panels" }, ...panels);

function scorePanel({ name, groups }, scores, colours, width) {
  const names = groups.map(({ family }) => family ?? "all tasks");
  const row = Math.max(36, 11 * scores.routers.length);
  const p = ladder(names, width, { row, range: [-2, 102], bold: [0] });
  groups.slice(1).forEach((_, g) => {
    const y = p.y(g + 0.5);
    p.add(line([[p.left, y], [p.right, y]], { stroke: g ? "var(--line)" : "var(--soft)" }));
  });
  for (const chance of scores.chance ?? []) {
    p.add(line([[p.x(chance), p.top], [p.x(chance), p.bottom]], { stroke: "var(--soft)", width: 1.5, dash: "2 3" }));
  }
  groups.forEach(({ points }, g) => points.forEach((point, r) => {
    if (!point) return;
    const [mean, low, high, tasks] = point;
    const y = p.y(g + (r - (points.length - 1) / 2) * (0.76 / points.length));
    const tip = `${names[g]}, ${name}\n${scores.routers[r]}: ${mean.toFixed(1)}  [${low.toFixed(0)}, ${high.toFixed(0)}]\n${tasks} ${tasks === 1 ? "task" : "tasks"}`;
    p.add(spread(p, low, high, y, colours[r]), mark(p.x(mean), y, { shape: r, radius: 4.5, fill: colours[r] }, tip));
  }));
  return panel(name, p.svg);
}

function scorePlot(scores, width) {
  const colours = routerColours(scores);
  const panels = scores.splits.map((split) => scorePanel(split, scores, colours, panelWidth(scores.splits.length, width)));
  return [legend(scores.routers.map((name, r) => ({ name, fill: colours[r], shape: r }))), beside(panels)];
}
