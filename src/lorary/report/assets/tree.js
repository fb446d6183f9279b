// The tree of adapters: leaves on the left, brackets where branches join.
function treePlot(tree, width) {
  const count = tree.names.length;
  const isNamed = count <= 80;
  const highest = Math.max(1e-3, ...tree.joins.map(([, , , , level]) => level));
  const row = isNamed ? 17 : Math.max(3, Math.min(8, 1200 / count));
  const p = ladder(isNamed ? tree.names : tree.names.map(() => ""), width, { row, range: [0, 1.03 * highest], title: "1 − mean cosine" });
  // An arm, the bar that joins both, the other arm.
  for (const [a, b, heightA, heightB, level, cluster] of tree.joins) {
    const corners = [[heightA, a], [level, a], [level, b], [heightB, b]].map(([x, y]) => [p.x(x), p.y(y)]);
    p.add(line(corners, { stroke: clusterColour(cluster), width: isNamed ? 2 : 1.2 }));
  }
  tree.names.forEach((name, i) => p.add(
    mark(p.left, p.y(i), { shape: 2, radius: isNamed ? 4 : 2, fill: clusterColour(tree.labels[i]) }, `${name}\ncluster ${tree.labels[i]}`)));
  return [p.svg];
}
