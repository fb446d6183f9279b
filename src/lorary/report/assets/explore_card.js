// The card of the chosen adapter.
const definition = (pairs) => html("dl", { className: "facts-list" }, ...pairs.flatMap(([term, ...value]) => [html("dt", { textContent: term }), html("dd", {}, ...value)]));
const points100 = (value) => (value === null ? "–" : (100 * value).toFixed(1));

function nearList(nearest) {
  const items = nearest.map(([i, cosine]) => {
    const button = html("button", { type: "button", className: "name", textContent: adapters[i].name });
    button.addEventListener("click", () => { choose(i); byId("card").focus(); });
    return html("li", {}, button, html("span", { className: "number", textContent: cosineText(cosine) }));
  });
  return html("ul", { className: "near" }, ...items);
}

function scoreTable(scores) {
  const head = ["task", "metric", "base", "adapter", "rows"].map((text, i) => html("th", { scope: "col", textContent: text, className: i > 1 ? "number" : "" }));
  const lines = scores.map(([task, metric, value, base, n]) => html("tr", {},
    html("td", { textContent: task }), html("td", { textContent: metric }),
    ...[points100(base), points100(value), String(n)].map((text) => html("td", { className: "number", textContent: text }))));
  return html("table", {}, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...lines));
}

function showCard() {
  const i = explored.chosen;
  if (i === null) {
    byId("card").replaceChildren(html("p", { className: "note", textContent: "Choose an adapter on the map or in the table." }));
    return;
  }
  const adapter = adapters[i];
  const facts = [
    ["cluster", clusterText(data.labels[i])],
    ["family", adapter.families.join(", ") || "–"],
    ["tasks", adapter.tasks.join(", ") || "not recorded"],
    ...adapter.facts.map(([term, value]) => [term, textOf(value)]),
    ...(adapter.losses ? [["validation loss", `${adapter.losses[1].toFixed(3)} (base ${adapter.losses[0].toFixed(3)})`]] : []),
    ["hash", html("code", { textContent: adapter.hash })],
  ];
  const parts = [html("h3", { textContent: adapter.name }), definition(facts)];
  if (adapter.nearest.length) parts.push(html("h4", { textContent: "Nearest, by cosine" }), nearList(adapter.nearest));
  if (adapter.scores.length) parts.push(html("h4", { textContent: "Results, 0 to 100" }), scoreTable(adapter.scores));
  if (adapter.provenance.length) {
    const lines = adapter.provenance.map(([term, value]) => [term, textOf(value)]);
    parts.push(html("details", {}, html("summary", { textContent: "Provenance" }), definition(lines)));
  }
  byId("card").replaceChildren(...parts);
  byId("card").setAttribute("aria-label", `Card of ${adapter.name}`);
}

watchers.chosen.push(showCard);
