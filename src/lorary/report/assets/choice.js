// Quality of each number of clusters; the number that was chosen is marked.
function choicePlot(candidates, chosen, width) {
  const ks = candidates.map(([k]) => k);
  const range = [Math.min(...ks) - 0.3, Math.max(...ks) + 0.3];
  const drawn = [["silhouette", 1, "--hue-0"], ["stability", 2, "--hue-5"]];
  const values = drawn.flatMap(([, i]) => candidates.map((row) => row[i]));
  const every = Math.ceil(ks.length / Math.max(1, (width - 70) / 30));
  const xTicks = ks.filter((_, i) => i % every === 0).map((k) => [k, String(k)]);
  const p = chart(width, 300, range, values, { title: "clusters", xTicks, least: 0 });
  const isLate = chosen > (range[0] + range[1]) / 2;
  p.add(
    line([[p.x(chosen), p.top], [p.x(chosen), p.bottom]], { stroke: "var(--soft)", dash: "2 3" }),
    label(`${chosen} chosen`, p.x(chosen) + (isLate ? -6 : 6), p.top + 8, { anchor: isLate ? "end" : "start", fill: "var(--soft)" }),
  );
  for (const [name, i, hue] of drawn) {
    const places = candidates.map((row) => [p.x(row[0]), p.y(row[i])]);
    p.add(line(places, { stroke: `var(${hue})`, width: 2 }));
    places.forEach((place, j) => p.add(mark(...place, { radius: 4, fill: `var(${hue})` }, `${ks[j]} clusters\n${name} ${written(candidates[j][i], 3)}`)));
  }
  return [legend(drawn.map(([name, , hue]) => ({ name, fill: `var(${hue})` }))), p.svg];
}
