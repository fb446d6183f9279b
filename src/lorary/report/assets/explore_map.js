// The map: a mark for each adapter, names as far as there is room, and the chosen one with lines to its nearest.
// As SVG, each mark is an option that a screen reader meets. A canvas draws 1,000 marks faster (2 ms against 140 ms on a
// busy core), but a search only marks them anew, and stays below 100 ms.
const HIT = 24;
const MOST_NAMED = 60;
const LARGEST = 40;
const view = { zoom: 1, middle: [0, 0] };
let places = []; // of the adapters, in pixels
let area = { width: 1, height: 1 };
let layer = null;
let chosenLayer = null;
let named = new Set(); // whose names stand on the map
const mapBox = byId("plot-map");

const isInside = ([x, y]) => x >= 0 && y >= 0 && x <= area.width && y <= area.height;

function mapPixel([x, y]) {
  const scale = view.zoom * Math.min(area.width * 0.44, area.height * 0.44);
  return [area.width / 2 + (x - view.middle[0]) * scale, area.height / 2 - (y - view.middle[1]) * scale];
}

function spot(i, { shape, radius, fill }) {
  const look = { shape, radius, fill, stroke: "var(--paper)", width: 1 };
  const tip = [adapters[i].name, clusterText(data.labels[i]), adapters[i].families.join(", ")].filter(Boolean).join("\n");
  const element = mark(...places[i], look, tip);
  const label = [adapters[i].name, clusterText(data.labels[i])].join(", ");
  for (const [name, value] of Object.entries({ id: `spot-${i}`, role: "option", "aria-label": label, "aria-selected": "false" })) {
    element.setAttribute(name, value);
  }
  return element;
}

// Names of single adapters where few are in sight, else the clusters' names at their middles.
function namesOnMap() {
  const seen = adapters.map((_, i) => i).filter((i) => matches[i] && isInside(places[i]));
  named = new Set();
  if (seen.length <= MOST_NAMED) {
    const names = seen.map((i) => short(adapters[i].name, area.width > 520 ? 26 : 16));
    const points = seen.map((i) => places[i]);
    const free = placeNames(points, names, area);
    named = new Set(seen.filter((_, at) => free[at]));
    return namesAt(free, points, names, () => ({ size: 11, halo: "var(--paper)" }));
  }
  const clusters = [...new Set(seen.map((i) => data.labels[i]))].filter((label) => label >= 0).sort((a, b) => a - b);
  return clusters.map((cluster) => {
    const points = seen.filter((i) => data.labels[i] === cluster).map((i) => places[i]);
    const top = Math.max(10, Math.min(...points.map(([, y]) => y)) - 12);
    const name = short(data.clusters[cluster], area.width > 520 ? 24 : 14);
    return label(name, meanOf(points)[0], top, { size: 12, bold: true, anchor: "middle", halo: "var(--paper)" });
  });
}

function mapPlot(width) {
  area = { width: width - 2, height: Math.round(Math.min(640, Math.max(320, width * 0.72))) };
  places = data.points.map(mapPixel);
  const shapes = shapesOf(adapters.map((adapter) => adapter.name));
  const radius = adapters.length > 200 ? 4 : 5.5;
  const svg = make("svg", { width: area.width, height: area.height, role: "none" });
  layer = make("g", { role: "none" });
  // A colour is looked up once: for each of 1,000 marks it would take longer than to draw them.
  const fills = new Map([...new Set(data.labels)].map((label) => [label, clusterColour(label)]));
  adapters.forEach((adapter, i) => layer.append(spot(i, { shape: shapes.of(adapter.name), radius, fill: fills.get(data.labels[i]) })));
  chosenLayer = make("g", { "aria-hidden": "true" });
  svg.append(layer, make("g", { "aria-hidden": "true", id: "map-names" }), chosenLayer);
  layer.childNodes.forEach((element, i) => element.classList.toggle("out", !matches[i]));
  const families = shapes.families.map((family, shape) => ({ name: family || "no family", shape, fill: "var(--soft)" }));
  byId("map-legend").replaceChildren(...(families.length ? [legend(families)] : []));
  return [svg];
}

function showNames() {
  byId("map-names").replaceChildren(...namesOnMap());
}

function showChosen() {
  const i = explored.chosen;
  layer.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  if (i === null) {
    mapBox.removeAttribute("aria-activedescendant");
    return chosenLayer.replaceChildren();
  }
  layer.childNodes[i].setAttribute("aria-selected", "true");
  mapBox.setAttribute("aria-activedescendant", `spot-${i}`);
  const lines = adapters[i].nearest.map(([other, cosine]) =>
    line([places[i], places[other]], { stroke: "var(--ink)", width: 1.3, opacity: 0.25 + 0.6 * Math.max(0, cosine) }));
  const [x, y] = places[i];
  const anchor = x > area.width * 0.7 ? "end" : "start";
  const name = label(short(adapters[i].name, 40), x + (anchor === "end" ? -14 : 14), y, { anchor, size: 13, bold: true, halo: "var(--paper)" });
  chosenLayer.replaceChildren(...lines, make("circle", { class: "ring", cx: x, cy: y, r: 10 }), ...(named.has(i) ? [] : [name]));
}

function drawMap() {
  draw("plot-map");
  showNames();
  showChosen();
  mapBox.classList.toggle("zoomed", view.zoom > 1);
}

function zoomBy(factor) {
  const wanted = Math.min(LARGEST, Math.max(1, view.zoom * factor));
  // Towards what is chosen or found; in the middle of the map as it is otherwise.
  if (factor > 1 && explored.chosen !== null) view.middle = data.points[explored.chosen];
  else if (factor > 1 && numMatches && numMatches < adapters.length) view.middle = meanOf(data.points.filter((_, i) => matches[i]));
  if (wanted === 1) view.middle = [0, 0];
  view.zoom = wanted;
  drawMap();
}

// The matching adapter that is nearest to a place, or to another one in a direction.
function nearestTo([x, y], reach) {
  let best = null;
  places.forEach((place, i) => {
    const distance = matches[i] ? Math.hypot(place[0] - x, place[1] - y) : Infinity;
    if (distance <= reach) [best, reach] = [i, distance];
  });
  return best;
}

function nextTowards(dx, dy) {
  const [x, y] = places[explored.chosen];
  let best = null;
  let least = Infinity;
  places.forEach((place, i) => {
    const along = (place[0] - x) * dx + (place[1] - y) * dy;
    const aside = Math.abs((place[0] - x) * dy - (place[1] - y) * dx);
    if (!matches[i] || i === explored.chosen || along <= 0 || aside > 2 * along) return;
    if (along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
  });
  return best;
}

const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onMapKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const found = adapters.map((_, i) => i).filter((i) => matches[i]);
  const factor = { "+": 1.6, "=": 1.6, "-": 1 / 1.6, 0: 1 / LARGEST }[event.key];
  if (factor) zoomBy(factor);
  else if (DIRECTIONS[event.key] || event.key === "Home" || event.key === "End") {
    const isStart = explored.chosen === null || event.key === "Home";
    const next = isStart ? found[0] : event.key === "End" ? found.at(-1) : nextTowards(...DIRECTIONS[event.key]);
    if (next !== null && next !== undefined) choose(next);
  } else if ((event.key === "Enter" || event.key === " ") && explored.chosen !== null) byId("card").focus();
  else if (event.key === "Escape") choose(null);
  else return;
  event.preventDefault();
}

// Drag to move a larger map; a press that does not move chooses.
function onMapPress(press) {
  if (press.button !== 0) return;
  const start = [press.clientX, press.clientY];
  let moved = [0, 0];
  const move = (event) => {
    moved = [event.clientX - start[0], event.clientY - start[1]];
    if (view.zoom > 1) layer.parentNode.childNodes.forEach((group) => group.setAttribute("transform", `translate(${moved.join(" ")})`));
  };
  const end = (event) => {
    mapBox.removeEventListener("pointermove", move);
    mapBox.removeEventListener("pointerup", end);
    mapBox.removeEventListener("pointercancel", end);
    const box = mapBox.getBoundingClientRect();
    if (Math.hypot(...moved) < 5) {
      const found = event.type === "pointerup" ? nearestTo([event.clientX - box.left - 1, event.clientY - box.top - 1], HIT) : null;
      if (found !== null) choose(found);
    } else if (view.zoom > 1) {
      const scale = view.zoom * Math.min(area.width * 0.44, area.height * 0.44);
      view.middle = [view.middle[0] - moved[0] / scale, view.middle[1] + moved[1] / scale];
      drawMap();
    }
  };
  if (view.zoom > 1) mapBox.setPointerCapture(press.pointerId);
  mapBox.addEventListener("pointermove", move);
  mapBox.addEventListener("pointerup", end);
  mapBox.addEventListener("pointercancel", end);
}

function startMap() {
  plot("plot-map", mapPlot);
  drawMap();
  byId("zoom").hidden = false;
  byId("zoom-in").addEventListener("click", () => zoomBy(1.6));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.6));
  byId("zoom-whole").addEventListener("click", () => zoomBy(1 / LARGEST));
  mapBox.addEventListener("keydown", onMapKey);
  mapBox.addEventListener("pointerdown", onMapPress);
  watchers.matches.push(() => {
    layer.childNodes.forEach((element, i) => element.classList.toggle("out", !matches[i]));
    showNames();
  });
  watchers.chosen.push(() => {
    if (explored.chosen !== null && !isInside(places[explored.chosen])) {
      view.middle = data.points[explored.chosen];
      drawMap();
    } else showChosen();
  });
}
