// The result at a glance: a bar for each mean, with its interval; one panel per split.
function meansPlot(means, width) {
  const colours = routerColours(means);
  const panels = means.splits.map(({ name, points }) => {
    const at = points.map((_, r) => r).filter((r) => points[r]);
    const across = panelWidth(means.splits.length, width);
    const p = ladder(at.map((r) => means.routers[r]), across, { row: 30, range: [0, 100], size: 13, right: 44 });
    at.forEach((r, i) => {
      const [mean, low, high, tasks] = points[r];
      const tip = `${means.routers[r]}, ${name}\n${mean.toFixed(1)}  [${low.toFixed(1)}, ${high.toFixed(1)}]\n${tasks} ${tasks === 1 ? "task" : "tasks"}`;
      p.add(
        telling(rectangle(p.left, p.y(i) - 9, p.x(mean), p.y(i) + 9, { fill: colours[r] }), tip),
        spread(p, low, high, p.y(i), "var(--ink)"),
        label(mean.toFixed(1), p.x(high) + 6, p.y(i), { bold: true }),
      );
    });
    return panel(name, p.svg);
  });
  return [beside(panels)];
}
