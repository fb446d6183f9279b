// The matrix of cosines: families stand as blocks, framed and named in their colours.
const NAMED_ROWS = 64;

function cosines(similarity) {
  const count = similarity.names.length;
  const flat = unpack(similarity.cosine, Int16Array);
  return similarity.names.map((_, row) =>
    similarity.names.map((_, column) => (row === column ? null : flat[row * count + column] / similarity.parts)));
}

function similarityShapes(blocks) {
  return blocks.flatMap(({ family, start, end }) => {
    const line = { color: familyColour(family), width: 2 };
    const [low, high] = [start - 0.5, end - 0.5];
    return [
      { type: "rect", x0: low, x1: high, y0: low, y1: high, line, fillcolor: "rgba(0,0,0,0)" },
      { type: "rect", xref: "paper", x0: 1.01, x1: 1.025, y0: low, y1: high, line: { width: 0 }, fillcolor: line.color },
    ];
  });
}

// Two hues that meet at zero; one, from the least to the greatest, where all cosines are positive: there zero says nothing.
function cosineScale(values) {
  const [least, greatest] = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [1, -1]);
  const names = ["--low-end", "--low", "--zero", "--high", "--high-end"].slice(least > 0 ? 2 : 0);
  const reach = Math.max(0.05, Math.abs(least), Math.abs(greatest));
  const range = least > 0 ? { zmin: least, zmax: Math.max(greatest, least + 0.05) } : { zmin: -reach, zmax: reach };
  return { ...range, colorscale: names.map((name, i) => [i / (names.length - 1), colour(name)]) };
}

function similarityPlot(similarity, z, width) {
  const count = similarity.names.length;
  const isNamed = count <= NAMED_ROWS && width > 520;
  const longest = Math.max(...similarity.names.map((name) => Math.min(name.length, 24)));
  const names = isNamed ? Math.min(170, 18 + 6.8 * longest) : 12;
  const longestFamily = Math.max(...similarity.blocks.map(({ family }) => Math.min(family.length, 16)));
  const right = 26 + 7.5 * longestFamily;
  const side = Math.max(120, Math.min(width - names - right, count > 40 ? 780 : 640));
  const scale = cosineScale(z.flat().filter((value) => value !== null));
  const ticks = isNamed
    ? { tickvals: similarity.names.map((_, i) => i), ticktext: similarity.names.map((name) => plain(short(name, 24))) }
    : { showticklabels: false, ticks: "" };
  const fontSize = Math.max(8, Math.min(12, (side / count) * 0.75));
  const axis = { ...ticks, showgrid: false, range: [-0.5, count - 0.5], tickfont: { size: fontSize }, ticks: "", fixedrange: false };
  const trace = {
    type: "heatmap", z, ...scale, xgap: count > 40 ? 0 : 1, ygap: count > 40 ? 0 : 1,
    colorbar: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", ypad: 4, thickness: 10, len: 0.6, outlinewidth: 0, title: { text: "cosine", side: "top", font: { size: 12 } } },
    text: similarity.names.map((row) => similarity.names.map((column) => `${plain(row)}<br>${plain(column)}`)),
    hovertemplate: "%{text}<br>cosine %{z:.3f}<extra></extra>", hoverongaps: false,
  };
  const layout = layoutOf({
    width: side + names + right, height: side + 12 + names + 64, margin: { l: names, r: right, t: 12, b: names + 64 },
    xaxis: axisOf({ ...axis, tickangle: -90 }),
    yaxis: axisOf({ ...axis, range: [count - 0.5, -0.5] }),
    dragmode: width > 520 ? "zoom" : false,
    shapes: similarityShapes(similarity.blocks),
    annotations: similarity.blocks.filter(({ start, end }) => ((end - start) / count) * side >= 11).map(({ family, start, end }) => ({
      xref: "paper", x: 1.035, xanchor: "left", y: (start + end - 1) / 2, yanchor: "middle", showarrow: false,
      text: plain(short(family, 16)), font: { size: 12 },
    })),
  });
  return { traces: [trace], layout };
}
