// The way from the base (0) to the oracle (100): a bar per router, one panel per split.
function gapPlot(panels, width, whole = "the oracle") {
  const routers = [...new Set(panels.flatMap((panel) => panel.routers))];
  const values = panels.flatMap(({ points }) => points.flat().filter((value) => value !== null));
  const range = [Math.max(-100, Math.min(-5, ...values)), Math.min(200, Math.max(105, ...values))];
  // On a phone, a library stands in a line of its own above its router.
  const names = routers.map((name) => (width > 520 ? [name] : name.split(/(?<=: )/)));
  const title = width > 520 ? `gap closed, from the base to ${whole}` : "gap closed";
  const p = ladder(names, width, { row: 14 + 16 * panels.length, range, title, suffix: " %" });
  const inside = (value) => Math.max(range[0], Math.min(range[1], value));
  panels.forEach(({ name, routers: scored, points }, i) => points.forEach(([value, low, high], j) => {
    const y = p.y(routers.indexOf(scored[j])) + 14 * (i - (panels.length - 1) / 2);
    const [from, to] = [0, inside(value)].sort((a, b) => a - b);
    const ends = low === null ? "" : `  [${written(low, 0)}, ${written(high, 0)}]`;
    p.add(telling(rectangle(p.x(from), y - 6, p.x(to), y + 6, { fill: hueOf(i) }), `${scored[j]}, ${name}\n${written(value, 0)} %${ends}`));
    if (low !== null) p.add(spread(p, inside(low), inside(high), y, "var(--ink)", 1.2));
  }));
  for (const end of [0, 100]) p.add(line([[p.x(end), p.top], [p.x(end), p.bottom]], { stroke: "var(--soft)", width: 1.5, dash: "2 3" }));
  return [...(panels.length > 1 ? [legend(panels.map(({ name }, i) => ({ name, fill: hueOf(i), shape: 2 })))] : []), p.svg];
}
