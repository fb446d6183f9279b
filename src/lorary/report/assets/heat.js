// Every task under every router: how far above or below the base, as colours; the value itself where there is room.
function heatPlot(heat, width) {
  const columns = heat.routers.length;
  const names = heat.rows.map(({ task }) => fitted(task, Math.min(190, width * 0.36 - 14)));
  const left = 14 + Math.max(...names.map((name) => widthOf(name)));
  const heads = heat.routers.map((name) => short(name, 44));
  const longest = Math.max(...heads.map((name) => widthOf(name)));
  const isSlanted = (width - left) / columns > 44;
  const right = isSlanted ? 16 + 0.5 * longest : 16;
  // Where columns would be narrower than their names, the plot is wider than the page and scrolls in its box.
  const inner = Math.max(Math.min(width - left - right, 74 * columns), 14 * columns);
  const row = heat.rows.length > 80 ? 12 : 22;
  const top = 16 + (isSlanted ? 0.87 : 1) * longest;
  const p = picture(left + inner + right, top + row * heat.rows.length + 4, { left, right, top, bottom: 4 }, [0, columns], [0, heat.rows.length]);
  const reach = Math.max(10, ...heat.rows.flatMap(({ gains }) => gains.filter((gain) => gain !== null).map(Math.abs)));
  const scale = shades(-reach, reach, DIVERGING);
  const cell = inner / columns;
  grid(p, heat.rows.length, columns, (r, c) => (heat.rows[r].gains[c] === null ? null : scale.of(heat.rows[r].gains[c])), (r, c) => {
    const { task, family, values, gains } = heat.rows[r];
    const value = values[c] === null ? "not scored" : values[c].toFixed(1);
    const gain = gains[c] === null ? "" : `\n${gains[c] > 0 ? "+" : ""}${written(gains[c], 1)} over the base`;
    return `${task} (${family})\n${heat.routers[c]}: ${value}${gain}`;
  });
  nameRows(p, names, row < 18 ? 9 : 12);
  nameColumns(p, heads, 12, isSlanted ? -60 : -90);
  heat.rows.forEach(({ split, values, gains }, r) => {
    if (r > 0 && split !== heat.rows[r - 1].split) p.add(line([[0, p.y(r)], [p.right, p.y(r)]], { stroke: "var(--ink)", width: 2 }));
    if (cell < 34 || row < 18) return;
    values.forEach((value, c) => {
      if (value === null) return;
      const fill = gains[c] === null ? "var(--ink)" : inkOn(scale.of(gains[c]));
      p.add(label(value.toFixed(0), p.x(c + 0.5), p.y(r + 0.5), { size: 11, anchor: "middle", fill }));
    });
  });
  return [scaleBar(scale, `−${reach.toFixed(0)}`, `+${reach.toFixed(0)} points over the base`), p.svg];
}
