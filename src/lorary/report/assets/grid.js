// Matrices as pictures: a bitmap of cells, colours of numbers, and what the colours mean.
function grid(p, rows, columns, colourAt, tipAt) {
  const [width, height] = [p.right - p.left, p.bottom - p.top];
  const isFine = Math.min(width / columns, height / rows) < 4;
  // Larger cells are drawn at twice their size, for fine screens, with a gap between them.
  const size = isFine ? { width: columns, height: rows } : { width: Math.round(2 * width), height: Math.round(2 * height) };
  const canvas = html("canvas", size);
  const pen = canvas.getContext("2d");
  const edges = (count, length) => Array.from({ length: count + 1 }, (_, i) => Math.round((i * length) / count));
  const [xs, ys, gap] = [edges(columns, canvas.width), edges(rows, canvas.height), isFine ? 0 : 2];
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const hue = colourAt(row, column);
      if (!hue) continue;
      pen.fillStyle = hue;
      pen.fillRect(xs[column], ys[row], xs[column + 1] - xs[column] - gap, ys[row + 1] - ys[row] - gap);
    }
  }
  const place = { x: p.left, y: p.top, width, height, preserveAspectRatio: "none" };
  const image = make("image", { href: canvas.toDataURL(), ...place, style: isFine ? "image-rendering: pixelated" : "" });
  const cellAt = ({ clientX, clientY }) => {
    const box = image.getBoundingClientRect();
    const part = (at, count) => Math.max(0, Math.min(count - 1, Math.floor(at * count)));
    return [part((clientY - box.top) / box.height, rows), part((clientX - box.left) / box.width, columns)];
  };
  telling(image, (event) => tipAt(...cellAt(event)));
  p.add(image);
  return Object.assign(image, { cellAt });
}

// Colours from the lowest number to the highest.
function shades(low, high, names) {
  const stops = names.map(colour);
  const palette = Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const stop = Math.min(Math.floor(at), stops.length - 2);
    return mixed(stops[stop], stops[stop + 1], at - stop);
  });
  const of = (value) => palette[Math.round(255 * Math.max(0, Math.min(1, (value - low) / (high - low))))];
  return { of, stops };
}

const DIVERGING = ["--low-end", "--low", "--zero", "--high", "--high-end"];
const RISING = DIVERGING.slice(2);

// A bar with the colours between two texts.
function scaleBar({ stops }, low, high) {
  const bar = html("i");
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  return html("p", { className: "scale-bar" }, html("span", { textContent: low }), bar, html("span", { textContent: high }));
}

// Black or white, whichever can be read on a colour.
function inkOn(hex) {
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return 0.3 * red + 0.59 * green + 0.11 * blue > 140 ? "#14181d" : "#ffffff";
}

// Names above columns, leaning or upright, and beside rows; those that would touch each other are left out.
function nameColumns(p, names, size, turn) {
  const step = (p.right - p.left) / names.length;
  if (step < 0.8 * size) return;
  names.forEach((name, i) => p.add(label(name, p.left + (i + 0.5) * step, p.top - 7, { size, turn })));
}

function nameRows(p, names, size) {
  const step = (p.bottom - p.top) / names.length;
  if (step < 0.8 * size) return;
  names.forEach((name, i) => p.add(label(name, p.left - 7, p.top + (i + 0.5) * step, { size, anchor: "end" })));
}
