// Validation loss of the base and of each expert, joined by a line whose length is the gain.
function lossPlot(rows, width) {
  const isDense = rows.length > 60;
  // Where experts are too many, families stand at the first of theirs.
  const names = rows.map(({ name, family }, i) => (!isDense ? name : i && rows[i - 1].family === family ? "" : family));
  const range = [0, 1.03 * Math.max(...rows.flatMap(({ base, expert }) => [base, expert]))];
  const p = ladder(names, width, { row: isDense ? 7 : 24, range, title: "nats per token", size: isDense ? 11 : 12 });
  rows.forEach(({ name, family, base, expert }, i) => {
    const [hue, y, radius] = [familyColour(family), p.y(i), isDense ? 2.5 : 5];
    const tip = `${name}\nbase ${base.toFixed(3)}, expert ${expert.toFixed(3)}`;
    p.add(spread(p, base, expert, y, hue, isDense ? 1.5 : 3));
    p.add(mark(p.x(base), y, { radius, fill: "var(--paper)", stroke: "var(--ink)" }, tip), mark(p.x(expert), y, { radius, fill: hue }, tip));
  });
  return [legend([{ name: "base", fill: "var(--paper)", stroke: "var(--ink)" }, { name: "expert", fill: "var(--ink)" }]), p.svg];
}
