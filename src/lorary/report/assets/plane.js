// Adapters in the plane: the colour is the cluster, the shape the family, lines lead to the middle of a cluster.
// Grey where there is none, or where there are several.
const MIXED = -1;
const clusterColour = (cluster) => (cluster === MIXED ? colour("--hue-7") : familyColour(`cluster ${cluster}`));

function shapesOf(names) {
  const families = [...new Set(names.map((name) => data.families[name] ?? ""))].sort();
  const isKnown = families.length > 1 && families.length <= SHAPES.length;
  return { families: isKnown ? families : [], of: (name) => (isKnown ? families.indexOf(data.families[name] ?? "") : 0) };
}

const meanOf = (points) => [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);

// Pixels of a point, with one scale on both axes.
function pixelsIn(points, area) {
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const middle = [xs, ys].map((values) => (Math.min(...values) + Math.max(...values)) / 2);
  const size = [xs, ys].map((values) => Math.max(...values) - Math.min(...values) || 1e-3);
  const scale = Math.min((area.width * 0.82) / size[0], (area.height * 0.86) / size[1]);
  return ([x, y]) => [area.width / 2 + (x - middle[0]) * scale, area.height / 2 - (y - middle[1]) * scale];
}

// Texts beside their points, on a leader where they had to move away.
function namesAt(places, points, texts, look) {
  return places.flatMap((place, i) => {
    if (place === null) return [];
    const [x, y] = [points[i][0] + place.dx, points[i][1] + place.dy];
    const anchor = Math.abs(place.dx) < 4 ? "middle" : place.dx > 0 ? "start" : "end";
    const leader = Math.hypot(place.dx, place.dy) > 15 ? [line([points[i], [x, y]], { stroke: "var(--soft)", width: 0.7 })] : [];
    return [...leader, label(texts[i], x, y, { anchor, ...look(i) })];
  });
}

function planePlot(plane, width) {
  const isNamed = plane.names.length <= 80 && width > 520;
  const shapes = shapesOf(plane.names);
  const area = { width: width - 2, height: Math.round(Math.min(680, Math.max(320, width * 0.68))) };
  const pixel = pixelsIn(plane.points, area);
  const points = plane.points.map(pixel);
  const clusters = [...new Set(plane.labels)].sort((a, b) => a - b);
  const centres = clusters.map((cluster) => meanOf(points.filter((_, i) => plane.labels[i] === cluster)));
  const svg = make("svg", { width: area.width, height: area.height });
  svg.append(rectangle(0.5, 0.5, area.width - 0.5, area.height - 0.5, { fill: "none", stroke: "var(--line)" }));
  points.forEach((point, i) => svg.append(
    line([centres[clusters.indexOf(plane.labels[i])], point], { stroke: clusterColour(plane.labels[i]), opacity: 0.45 })));
  points.forEach(([x, y], i) => {
    const look = { shape: shapes.of(plane.names[i]), radius: isNamed ? 5 : 4, fill: clusterColour(plane.labels[i]), stroke: "var(--paper)", width: 1 };
    svg.append(mark(x, y, look, [plane.names[i], `cluster ${plane.labels[i]}`, data.families[plane.names[i]]].filter(Boolean).join("\n")));
  });
  const names = isNamed ? plane.names.map((name) => short(name, 26)) : clusters.map((cluster) => `  ${cluster}`);
  const anchors = isNamed ? points : centres;
  const look = (i) => (isNamed ? { size: 11 } : { size: 14, bold: true, fill: clusterColour(clusters[i]), halo: "var(--paper)" });
  svg.append(...namesAt(placeNames(anchors, names, area), anchors, names, look));
  const families = shapes.families.map((family, shape) => ({ name: family || "no family", shape, fill: "var(--soft)" }));
  return [...(families.length ? [legend(families)] : []), svg];
}
