// Everything of the library starts here.
const redraw = () => { if (data.points) drawMap(); };

if (data.points) startMap();
if (table) startTable();

function fillChoice(id, entries) {
  byId(`${id}-choice`).hidden = entries.length < 2;
  fillSelect(id, ["all", ...entries.map(([text]) => text)]);
  byId(id).addEventListener("change", (event) => {
    const place = Number(event.target.value);
    look({ [id]: place ? entries[place - 1][1] : null });
  });
}

const usedLabels = [...new Set(data.labels)].sort((a, b) => a - b);
fillChoice("cluster", usedLabels.map((label) => [clusterText(label), label]));
fillChoice("family", data.family_names.map((name) => [name, name]));
byId("search").addEventListener("input", (event) => look({ words: event.target.value.toLowerCase().split(/\s+/).filter(Boolean) }));
byId("show-all").addEventListener("click", () => {
  byId("search").value = "";
  byId("cluster").value = byId("family").value = "0";
  look({ words: [], cluster: null, family: null });
});
byId("cluster-table")?.addEventListener("click", (event) => {
  const label = event.target.closest("button.name")?.dataset.cluster;
  if (label === undefined) return;
  byId("cluster").value = String(usedLabels.indexOf(Number(label)) + 1);
  look({ cluster: Number(label) });
  byId("map").scrollIntoView();
});
if (adapters.length) {
  byId("filters").hidden = false;
  look({});
}
