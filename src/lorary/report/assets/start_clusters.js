// Everything starts here: draw what there is data for.
const redraw = drawAll;

if (byId("plot-similarity")) {
  const cosine = cosines(data.similarity);
  plot("plot-similarity", (width) => similarityPlot(data.similarity, cosine, width));
}
if (data.plane) plot("plot-plane", (width) => planePlot(data.plane, width));
if (data.tree) plot("plot-tree", (width) => treePlot(data.tree, width));
if (data.candidates.length) plot("plot-choice", (width) => choicePlot(data.candidates, data.k, width));
