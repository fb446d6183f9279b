// Adapters in the plane: the colour is the cluster, the shape the family, lines lead to the middle of a cluster.
const NAMED_POINTS = 80;
const SHAPES = [
  "circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagram",
  "bowtie", "hourglass", "triangle-left", "triangle-right", "star-diamond", "star-square",
];

function shapesOf(names) {
  const families = [...new Set(names.map((name) => data.families[name] ?? ""))].sort();
  const isKnown = families.length > 1 && families.length <= SHAPES.length;
  return { families: isKnown ? families : [], of: (name) => (isKnown ? SHAPES[families.indexOf(data.families[name] ?? "")] : "circle") };
}

const meanOf = (points) => [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);

function middles(plane) {
  const members = new Map();
  plane.labels.forEach((label, i) => members.set(label, [...(members.get(label) ?? []), plane.points[i]]));
  return new Map([...members].map(([label, points]) => [label, meanOf(points)]));
}

function starTrace(plane, centre, label) {
  const own = plane.points.filter((_, i) => plane.labels[i] === label);
  return {
    type: "scatter", mode: "lines", hoverinfo: "skip", opacity: 0.45, line: { color: clusterColour(label), width: 1 },
    x: own.flatMap(([x]) => [centre[0], x, null]), y: own.flatMap(([, y]) => [centre[1], y, null]),
  };
}

// Ranges with one scale on both axes, and the pixels of a point.
function frame(points, area) {
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const middle = [xs, ys].map((values) => (Math.min(...values) + Math.max(...values)) / 2);
  const size = [xs, ys].map((values) => Math.max(...values) - Math.min(...values) || 1e-3);
  const scale = Math.min((area.width * 0.82) / size[0], (area.height * 0.86) / size[1]);
  const half = [area.width / 2 / scale, area.height / 2 / scale];
  return {
    ranges: [0, 1].map((axis) => [middle[axis] - half[axis], middle[axis] + half[axis]]),
    pixel: ([x, y]) => [(x - middle[0] + half[0]) * scale, (middle[1] + half[1] - y) * scale],
  };
}

// Texts beside their points, on a leader where they had to move away.
function annotationsAt(places, points, extra) {
  return places.flatMap((place, i) => place === null ? [] : [{
    x: points[i][0], y: points[i][1], showarrow: true, arrowhead: 0, arrowwidth: 0.7, standoff: 5, ax: place.dx, ay: place.dy,
    arrowcolor: Math.hypot(place.dx, place.dy) > 15 ? colour("--soft") : "rgba(0,0,0,0)",
    xanchor: Math.abs(place.dx) < 4 ? "center" : place.dx > 0 ? "left" : "right", yanchor: "middle", borderpad: 0, ...extra(i),
  }]);
}

function nameAnnotations(plane, pixel, area) {
  const names = plane.names.map((name) => short(name, 26));
  const places = placeNames(plane.points.map(pixel), names, area);
  return annotationsAt(places, plane.points, (i) => ({ text: plain(names[i]), font: { size: 11 } }));
}

function clusterAnnotations(centres, pixel, area) {
  const [labels, points] = [[...centres.keys()], [...centres.values()]];
  const places = placeNames(points.map(pixel), labels.map((label) => `  ${label}`), area);
  return annotationsAt(places, points, (i) => ({
    text: `<b>${labels[i]}</b>`, font: { size: 12 }, bgcolor: colour("--paper"), bordercolor: clusterColour(labels[i]), borderwidth: 1.5, borderpad: 1,
  }));
}

function legendTraces(families) {
  return families.map((family) => ({
    type: "scatter", mode: "markers", x: [null], y: [null], name: plain(short(family || "no family", 20)), showlegend: true,
    marker: { symbol: SHAPES[families.indexOf(family)], color: colour("--soft"), size: 9 },
  }));
}

function planePlot(plane, width) {
  const isNamed = plane.names.length <= NAMED_POINTS && width > 520;
  const shapes = shapesOf(plane.names);
  const area = { width: width - 4, height: Math.round(Math.min(680, Math.max(320, width * 0.68))) };
  const legend = shapes.families.length ? 26 + 22 * Math.ceil(shapes.families.length / Math.max(1, Math.floor(width / 150))) : 8;
  const { ranges, pixel } = frame(plane.points, area);
  const centres = middles(plane);
  const points = {
    type: "scatter", mode: "markers", x: plane.points.map(([x]) => x), y: plane.points.map(([, y]) => y),
    text: plane.names.map((name, i) => [plain(name), `cluster ${plane.labels[i]}`, plain(data.families[name] ?? "")].filter(Boolean).join("<br>")),
    hovertemplate: "%{text}<extra></extra>",
    marker: { color: plane.labels.map(clusterColour), symbol: plane.names.map(shapes.of), size: isNamed ? 11 : 8, line: { color: colour("--paper"), width: 1 } },
  };
  const names = isNamed ? nameAnnotations(plane, pixel, area) : clusterAnnotations(centres, pixel, area);
  const axis = { showgrid: false, showticklabels: false, ticks: "", showline: true, mirror: true };
  const layout = layoutOf({
    width, height: area.height + legend + 4, margin: { l: 2, r: 2, t: 2, b: legend + 2 }, annotations: names, hovermode: "closest",
    xaxis: axisOf({ ...axis, range: ranges[0], fixedrange: isNamed }), yaxis: axisOf({ ...axis, range: ranges[1], fixedrange: isNamed }),
    dragmode: isNamed || width <= 520 ? false : "zoom",
    showlegend: shapes.families.length > 0, legend: { orientation: "h", x: 0, y: 0, yanchor: "top", font: { size: 12 } },
  });
  const stars = [...centres].map(([label, centre]) => starTrace(plane, centre, label));
  return { traces: [...stars, { ...points, showlegend: false }, ...legendTraces(shapes.families)].map((trace) => ({ showlegend: false, ...trace })), layout };
}
