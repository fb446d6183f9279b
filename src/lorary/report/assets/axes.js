// Pictures with axes.
const linear = ([low, high], [from, to]) => (value) => from + ((value - low) / (high - low)) * (to - from);

// The area inside the margins; `x` and `y` turn numbers into pixels.
function picture(width, height, { left, right, top, bottom }, xRange, yRange) {
  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  const area = { left, right: width - right, top, bottom: height - bottom };
  return {
    svg, ...area, xRange, yRange, add: (...marks) => svg.append(...marks),
    x: linear(xRange, [area.left, area.right]), y: linear(yRange, [area.top, area.bottom]),
  };
}

// Round numbers inside a range, as many as there is room for, and how they are written.
function ticksOf([low, high], most) {
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) + (step / power === 2.5 && power < 10 ? 1 : 0);
  const first = Math.ceil(low / step - 1e-6);
  const count = Math.floor(high / step + 1e-6) - first + 1;
  return Array.from({ length: count }, (_, i) => (first + i) * step).map((value) => [value, written(value, digits)]);
}

const written = (value, digits) => (Number(value.toFixed(digits)) || 0).toFixed(digits).replace("-", "−");

function axisBelow(p, { title = "", suffix = "", ticks = ticksOf(p.xRange, (p.right - p.left) / 64), hasGrid = true }) {
  for (const [value, text] of ticks) {
    const x = p.x(value);
    if (hasGrid) p.add(line([[x, p.top], [x, p.bottom]], { stroke: "var(--line)" }));
    p.add(label(text + suffix, x, p.bottom + 13, { anchor: "middle" }));
  }
  if (title) p.add(label(fitted(title, p.right, 13), Math.max((p.left + p.right) / 2, widthOf(title, 13) / 2), p.bottom + 34, { anchor: "middle", size: 13 }));
}

function axisLeft(p, { ticks = ticksOf([...p.yRange].sort((a, b) => a - b), (p.bottom - p.top) / 48) } = {}) {
  for (const [value, text] of ticks) {
    p.add(line([[p.left, p.y(value)], [p.right, p.y(value)]], { stroke: "var(--line)" }), label(text, p.left - 6, p.y(value), { anchor: "end" }));
  }
}

// Names down the left side, each in one line or several, and an axis of numbers below.
function ladder(names, width, { row, range, title = "", suffix = "", size = 12, share = 0.44, right = 18, bold = [] }) {
  const shown = names.map((name) => [name].flat().map((part) => fitted(part, width * share - 16, size)));
  const left = 14 + Math.max(0, ...shown.flat().map((part) => widthOf(part, size + 0.5)));
  const bottom = title ? 48 : 28;
  const margin = { left, right, top: 6, bottom };
  const p = picture(width, 6 + row * names.length + bottom, margin, range, [-0.5, names.length - 0.5]);
  axisBelow(p, { title, suffix });
  shown.forEach((parts, i) => parts.forEach((part, k) => p.add(
    label(part, left - 8, p.y(i) + (k - (parts.length - 1) / 2) * 1.15 * size, { size, anchor: "end", bold: bold.includes(i) }))));
  return p;
}

// An interval beside a mark: a horizontal line.
const spread = (p, low, high, y, stroke, width = 1.5) => line([[p.x(low), y], [p.x(high), y]], { stroke, width });

// Numbers over numbers or over places in order; `xTicks` as `ticksOf` gives them.
function chart(width, height, xRange, values, { title = "", xTicks, least = Infinity, most = -Infinity }) {
  const numbers = values.filter((value) => value !== null);
  const [low, high] = [Math.min(least, ...numbers), Math.max(most, ...numbers)];
  const pad = 0.04 * (high - low || 1);
  const p = picture(width, height, { left: 44, right: 16, top: 8, bottom: title ? 48 : 28 }, xRange, [high + pad, low === least ? low : low - pad]);
  axisLeft(p);
  axisBelow(p, { title, ticks: xTicks, hasGrid: false });
  return p;
}
