// The tree of adapters: leaves on the left, brackets where branches join.
const NAMED_LEAVES = 80;
const MIXED = -1;
const clusterColour = (cluster) => (cluster === MIXED ? colour("--hue-7") : familyColour(`cluster ${cluster}`));

// One trace per colour: an arm, the bar that joins both, the other arm; gaps part the brackets.
function bracketTraces(joins, lineWidth) {
  const groups = new Map();
  for (const [a, b, heightA, heightB, level, cluster] of joins) {
    if (!groups.has(cluster)) groups.set(cluster, { x: [], y: [] });
    const { x, y } = groups.get(cluster);
    x.push(heightA, level, level, heightB, null);
    y.push(a, a, b, b, null);
  }
  return [...groups].map(([cluster, { x, y }]) => ({
    type: "scatter", mode: "lines", x, y, hoverinfo: "skip", line: { color: clusterColour(cluster), width: lineWidth },
  }));
}

function treePlot(tree, width) {
  const count = tree.names.length;
  const isNamed = count <= NAMED_LEAVES;
  const most = width > 520 ? 30 : 15;
  const longest = Math.max(...tree.names.map((name) => Math.min(name.length, most)));
  const left = isNamed ? Math.min(width * 0.42, 20 + 6.9 * longest) : 16;
  const places = tree.names.map((_, i) => i);
  const highest = Math.max(1e-3, ...tree.joins.map(([, , , , level]) => level));
  const hover = tree.names.map((name, i) => `${plain(name)}<br>cluster ${tree.labels[i]}`);
  const leaves = {
    type: "scatter", mode: "markers", x: places.map(() => 0), y: places, text: hover, hovertemplate: "%{text}<extra></extra>",
    marker: { color: tree.labels.map(clusterColour), size: isNamed ? 8 : 4, symbol: "square" }, cliponaxis: false,
  };
  const ticks = isNamed
    ? { tickvals: places, ticktext: tree.names.map((name) => plain(short(name, most))), tickfont: { size: 12 }, ticks: "outside", ticklen: 7, tickcolor: "rgba(0,0,0,0)" }
    : { showticklabels: false, ticks: "" };
  const layout = layoutOf({
    width, height: 60 + (isNamed ? 17 : Math.max(3, Math.min(8, 1200 / count))) * count, margin: { l: left, r: 14, t: 8, b: 48 },
    xaxis: axisOf({ title: { text: "1 − mean cosine", font: { size: 13 } }, range: [0, 1.03 * highest] }),
    yaxis: axisOf({ range: [count - 0.5, -0.5], showgrid: false, ...ticks }),
    hovermode: "closest",
  });
  return { traces: [...bracketTraces(tree.joins, isNamed ? 2 : 1.2), leaves], layout };
}
