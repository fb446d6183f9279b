// The matrix of cosines: families stand as blocks, framed and named in their colours.
function cosines(similarity) {
  const count = similarity.names.length;
  const flat = unpack(similarity.cosine, Int16Array);
  return (row, column) => (row === column ? null : flat[row * count + column] / similarity.parts);
}

// Two hues that meet at zero; one, from the least to the greatest, where all cosines are positive: there zero says nothing.
function cosineScale(similarity, cosine) {
  let [least, greatest] = [1, -1];
  similarity.names.forEach((_, row) => similarity.names.slice(row + 1).forEach((_, i) => {
    const value = cosine(row, row + 1 + i);
    [least, greatest] = [Math.min(least, value), Math.max(greatest, value)];
  }));
  const reach = Math.max(0.05, Math.abs(least), Math.abs(greatest));
  const [low, high] = least > 0 ? [least, Math.max(greatest, least + 0.05)] : [-reach, reach];
  return [shades(low, high, least > 0 ? RISING : DIVERGING), written(low, 2), `${written(high, 2)} cosine`];
}

function similarityPlot(similarity, cosine, width) {
  const count = similarity.names.length;
  const isNamed = count <= 64 && width > 520;
  const names = similarity.names.map((name) => fitted(name, 160));
  const left = isNamed ? 16 + Math.max(...names.map((name) => widthOf(name))) : 4;
  const families = similarity.blocks.map(({ family }) => fitted(family, Math.min(120, width * 0.25)));
  const right = 26 + Math.max(...families.map((family) => widthOf(family)));
  const side = Math.max(120, Math.min(width - left - right, count > 40 ? 780 : 640));
  const p = picture(left + side + right, left + side + 6, { left, right, top: left, bottom: 6 }, [0, count], [0, count]);
  const [scale, low, high] = cosineScale(similarity, cosine);
  grid(p, count, count, (r, c) => (r === c ? null : scale.of(cosine(r, c))), (r, c) =>
    (r === c ? similarity.names[r] : `${similarity.names[r]}\n${similarity.names[c]}\ncosine ${written(cosine(r, c), 3)}`));
  if (isNamed) {
    const size = Math.max(8, Math.min(12, (side / count) * 0.75));
    nameRows(p, names, size);
    nameColumns(p, names, size, -90);
  }
  similarity.blocks.forEach(({ family, start, end }, i) => {
    const hue = familyColour(family);
    const frame = { fill: "none", stroke: hue, "stroke-width": 2, "pointer-events": "none" };
    p.add(rectangle(p.x(start), p.y(start), p.x(end), p.y(end), frame), rectangle(p.right + 5, p.y(start), p.right + 12, p.y(end), { fill: hue }));
    if (p.y(end) - p.y(start) >= 11) p.add(label(families[i], p.right + 18, p.y((start + end) / 2)));
  });
  return [scaleBar(scale, low, high), p.svg];
}
