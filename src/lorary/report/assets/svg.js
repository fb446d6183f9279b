// Marks of a picture, and what a pointer over them says.
function make(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// `tip`: a text, or a function that makes it of the pointer's event.
const telling = (element, tip) => Object.assign(element, { tip });

const tipBox = document.body.appendChild(html("div", { className: "tip", hidden: true }));

function showTip(event) {
  const { tip } = event.target;
  const words = typeof tip === "function" ? tip(event) : tip;
  tipBox.hidden = !words;
  if (!words) return;
  tipBox.textContent = words;
  const { width, height } = tipBox.getBoundingClientRect();
  const below = event.clientY + 16;
  tipBox.style.left = `${Math.max(4, Math.min(event.clientX + 12, document.documentElement.clientWidth - width - 4))}px`;
  tipBox.style.top = `${below + height > window.innerHeight ? event.clientY - height - 10 : below}px`;
}

document.addEventListener("pointermove", showTip);
document.addEventListener("pointerdown", showTip);
document.addEventListener("scroll", () => { tipBox.hidden = true; }, { capture: true, passive: true });

// How wide a text is, and as much of it as fits.
const ruler = document.createElement("canvas").getContext("2d");
function widthOf(text, size = 12) {
  ruler.font = `${size}px system-ui, sans-serif`;
  return ruler.measureText(text).width;
}

function fitted(text, room, size = 12) {
  let length = text.length;
  while (length > 1 && widthOf(short(text, length), size) > room) length -= 1;
  return short(text, length);
}

// `halo`: what a text is set off from, where it stands on marks.
function label(text, x, y, { size = 12, anchor = "start", fill = "var(--ink)", turn = 0, bold = false, halo = "none" } = {}) {
  const attributes = { stroke: halo, "stroke-width": 5, "paint-order": "stroke", "font-size": size, "text-anchor": anchor, fill, "dominant-baseline": "central", "font-weight": bold ? 700 : 400 };
  return make("text", { ...attributes, transform: `translate(${x} ${y})${turn ? ` rotate(${turn})` : ""}` }, text);
}

// A line through points; null parts it.
function line(points, { stroke, width = 1, dash = "none", opacity = 1 }) {
  const d = points.map((point, i) => (point ? `${i && points[i - 1] ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}` : "")).join("");
  return make("path", { d, fill: "none", stroke, "stroke-width": width, "stroke-dasharray": dash, opacity, "pointer-events": "none" });
}

const rectangle = (left, top, right, bottom, attributes) =>
  make("rect", { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top), ...attributes });

// Corners, turn in degrees, and for stars the inner radius; no corners make a circle.
const SHAPES = [
  [0], [4, 0], [4, 45], [3, -90], [4, 45, 0.4], [5, -90, 0.45], [6, 0], [4, 0, 0.4],
  [3, 90], [5, -90], [3, 0], [3, 180], [6, 30, 0.6], [8, 0, 0.6], [5, 90], [3, -90, 0.35],
];

function outline(shape, radius) {
  const [corners, turn, inner] = SHAPES[shape % SHAPES.length];
  if (!corners) return `M${-radius} 0a${radius} ${radius} 0 1 0 ${2 * radius} 0a${radius} ${radius} 0 1 0 ${-2 * radius} 0Z`;
  const count = inner ? 2 * corners : corners;
  const points = Array.from({ length: count }, (_, i) => {
    const angle = ((turn + (i * 360) / count) * Math.PI) / 180;
    const reach = 1.2 * radius * (inner && i % 2 ? inner : 1);
    return `${(reach * Math.cos(angle)).toFixed(2)} ${(reach * Math.sin(angle)).toFixed(2)}`;
  });
  return `M${points.join("L")}Z`;
}

// A mark without an edge has an unseen one, so that a pointer finds it.
function mark(x, y, { shape = 0, radius = 5, fill, stroke = "transparent", width = stroke === "transparent" ? 8 : 1.5 }, tip) {
  const attributes = { d: outline(shape, radius), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, fill, stroke, "stroke-width": width };
  return telling(make("path", attributes), tip);
}

// What the marks of a plot stand for: [{ name, fill, shape, stroke }].
function legend(entries) {
  const items = entries.map(({ name, ...look }) =>
    html("li", {}, make("svg", { width: 16, height: 14 }, mark(8, 7, look)), name));
  return html("ul", { className: "marks" }, ...items);
}
