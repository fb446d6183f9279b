// A number of one router varied: a line per library and split, the base and the oracle as levels of the same colour.
function sweepPlot(sweep, width) {
  const several = new Set(sweep.lines.map(({ library }) => library)).size > 1;
  const named = ({ library, split }) => (several ? `${library}, ${split}` : split);
  const ticks = [...new Set(sweep.lines.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
  const values = [...sweep.lines.flatMap(({ points }) => points.flatMap(([, ...ends]) => ends)), ...sweep.levels.map(({ mean }) => mean)];
  const p = chart(Math.min(width, 760), 330, [-0.3, ticks.length - 0.7], values, { title: sweep.title, xTicks: ticks.map((text, i) => [i, text]) });
  sweep.lines.forEach((swept, i) => {
    const hue = hueOf(i);
    for (const { router, mean } of sweep.levels.filter(({ library, split }) => library === swept.library && split === swept.split)) {
      p.add(line([[p.left, p.y(mean)], [p.right, p.y(mean)]], { stroke: hue, width: 1.3, dash: router === "base" ? "2 3" : "7 4" }));
    }
    const places = swept.points.map(([x, mean]) => [p.x(ticks.indexOf(x)), p.y(mean)]);
    p.add(line(places, { stroke: hue, width: 2.5 }));
    swept.points.forEach(([x, mean, low, high], j) => p.add(
      line([[places[j][0], p.y(low)], [places[j][0], p.y(high)]], { stroke: hue, width: 1.2 }),
      mark(...places[j], { fill: hue }, `${sweep.field} ${x}, ${named(swept)}\n${mean.toFixed(1)}  [${low.toFixed(1)}, ${high.toFixed(1)}]`),
    ));
  });
  return [legend(sweep.lines.map((swept, i) => ({ name: named(swept), fill: hueOf(i) }))), p.svg];
}
