// Experts by tasks: a share of the routing, or what an expert does alone.
const UNKNOWN = 65535;
const VIEWS = {
  share: { title: (name) => `routing weight under ${name}`, tip: (value) => `${(100 * value).toFixed(1)} % of the weight` },
  score: { title: (name) => `score alone${name && `, ${name}`}`, tip: (value) => `scores ${(100 * value).toFixed(1)} alone` },
  loss: { title: (name) => `loss alone${name && `, ${name}`}`, tip: (value) => `loss ${value.toFixed(3)} alone` },
};

// The colour of a value, and the bar that explains it. A loss is measured from the least loss on its task.
function matrixScale({ kind }, valueAt, tasks, experts) {
  const known = (values) => values.filter((value) => value !== null);
  if (kind !== "loss") {
    const most = kind === "score" ? 1 : Math.max(0.01, ...tasks.flatMap((_, t) => known(experts.map((_, e) => valueAt(e, t)))));
    const scale = shades(0, most, RISING);
    return { of: (e, t) => scale.of(valueAt(e, t)), bar: scaleBar(scale, "0", kind === "score" ? "100 points" : `${(100 * most).toFixed(0)} %`) };
  }
  const least = tasks.map((_, t) => Math.min(...known(experts.map((_, e) => valueAt(e, t)))));
  const reach = Math.max(0.01, ...tasks.flatMap((_, t) => known(experts.map((_, e) => valueAt(e, t))).map((value) => value - least[t])));
  const scale = shades(-reach, 0, RISING);
  return { of: (e, t) => scale.of(least[t] - valueAt(e, t)), bar: scaleBar(scale, `${reach.toFixed(2)} nats above`, "the best expert of the task") };
}

function matrixPlot(matrix, view, width) {
  const { experts, tasks } = matrix;
  const values = unpack(view.values, Uint16Array);
  const at = (e, t) => values[e * tasks.length + t];
  const valueAt = (e, t) => (at(e, t) === UNKNOWN ? null : at(e, t) / matrix.parts);
  const [rows, columns] = [experts, tasks].map((list) => list.map(({ name }) => fitted(name, Math.min(170, width * 0.36 - 14), 11)));
  const [left, top] = [rows, columns].map((names) => 14 + Math.max(...names.map((name) => widthOf(name, 11))));
  // Cells stay large enough for a name; a matrix that is too wide for the page scrolls in its box.
  const cell = Math.max(12, Math.min(28, (width - left - 8) / tasks.length));
  const row = Math.max(12, Math.min(22, cell));
  const size = Math.min(11, row - 1);
  const margin = { left, right: 8, top, bottom: 4 };
  const p = picture(left + cell * tasks.length + 8, top + row * experts.length + 4, margin, [0, tasks.length], [0, experts.length]);
  const scale = matrixScale(view, valueAt, tasks, experts);
  grid(p, experts.length, tasks.length, (e, t) => (valueAt(e, t) === null ? null : scale.of(e, t)), (e, t) => {
    const value = valueAt(e, t);
    return `${experts[e].name} (${experts[e].family})\non ${tasks[t].name} (${tasks[t].family}, ${tasks[t].split})\n${value === null ? "not known" : VIEWS[view.kind].tip(value)}`;
  });
  nameRows(p, rows, size);
  nameColumns(p, columns, Math.min(11, cell - 1), -90);
  for (const [e, t] of matrix.marks) {
    p.add(rectangle(p.x(t), p.y(e), p.x(t + 1) - 1, p.y(e + 1) - 1, { fill: "none", stroke: "var(--ink)", "stroke-width": 1.2, "pointer-events": "none" }));
  }
  tasks.forEach(({ split }, t) => {
    if (t > 0 && split !== tasks[t - 1].split) p.add(line([[p.x(t), 0], [p.x(t), p.bottom]], { stroke: "var(--ink)", width: 1.5 }));
  });
  return [scale.bar, p.svg];
}

function startMatrix() {
  const { views } = data.matrix;
  const main = views.findIndex(({ kind, name }) => kind === "share" && name === data.means?.main);
  fillSelect("matrix-view", views.map(({ kind, name }) => VIEWS[kind].title(name)), Math.max(0, main));
  byId("matrix-view").addEventListener("change", () => draw("plot-matrix"));
  plot("plot-matrix", (width) => matrixPlot(data.matrix, views[Number(byId("matrix-view").value)], width));
}
