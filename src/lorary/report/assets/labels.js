// Names beside points so that no two overlap: each takes the nearest free place around its point, or stays for hover.
const RADII = [9, 14, 20, 28, 38, 50, 64, 80];
const ANGLES = Array.from({ length: 16 }, (_, i) => (i * Math.PI) / 8);
const TEXT_HEIGHT = 13;
const TEXT_WIDTH = 6.8;

const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const boxAround = ([x, y], half) => ({ left: x - half, right: x + half, top: y - half, bottom: y + half });

// The box of a text whose nearest edge or corner lies at this offset from the point.
function textBox([x, y], dx, dy, width) {
  const left = Math.abs(dx) < 4 ? x - width / 2 : dx > 0 ? x + dx : x + dx - width;
  const top = y + dy - TEXT_HEIGHT / 2;
  return { left, right: left + width, top, bottom: top + TEXT_HEIGHT };
}

function freePlace(point, width, taken, area) {
  for (const radius of RADII) {
    for (const angle of ANGLES) {
      const [dx, dy] = [radius * Math.cos(angle), radius * Math.sin(angle)];
      const box = textBox(point, dx, dy, width);
      const isInside = box.left >= 0 && box.top >= 0 && box.right <= area.width && box.bottom <= area.height;
      if (isInside && !taken.some((other) => overlap(box, other))) return { dx, dy, box };
    }
  }
  return null;
}

// Points and offsets in pixels of the plot; null where there was no place.
function placeNames(points, names, area) {
  const taken = points.map((point) => boxAround(point, 6));
  const middle = [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
  const far = (i) => Math.hypot(points[i][0] - middle[0], points[i][1] - middle[1]);
  const placed = points.map(() => null);
  // From the outside in: names at the rim have the room around them to themselves.
  for (const i of points.map((_, i) => i).sort((a, b) => far(b) - far(a))) {
    placed[i] = freePlace(points[i], TEXT_WIDTH * names[i].length + 4, taken, area);
    if (placed[i]) taken.push(placed[i].box);
  }
  return placed;
}
