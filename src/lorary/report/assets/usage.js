// What the server does meanwhile: usage, the router in the shadow, the last decisions. A page out of sight does not ask.
const PERIOD_MS = 5000;
const NUM_DECISIONS = 20;
const NUM_BARS = 12;

const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");

function showUsage({ requests, fallback, experts, shadow }) {
  const ranked = Object.entries(experts).sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  const most = ranked[0]?.[1] ?? 0;
  const items = ranked.slice(0, NUM_BARS).map(([name, count]) => bar(name, count, most, String(count)));
  byId("usage-bars").replaceChildren(...(items.length ? items : [html("li", {}, html("span", { textContent: "none yet" }))]));
  const facts = [
    ["requests", requests.toLocaleString("en")],
    ["fell back", `${fallback.toLocaleString("en")} (${share(fallback, requests)})`],
    ...(ranked.length > NUM_BARS ? [["experts used", String(ranked.length)]] : []),
    ...(shadow ? [["router in the shadow", shadow.router], ["decided beside the others", shadow.requests.toLocaleString("en")],
      ["agrees", `${shadow.agree.toLocaleString("en")} (${share(shadow.agree, shadow.requests)})`]] : []),
  ];
  byId("usage-facts").replaceChildren(...facts.map(([term, value]) => html("div", {}, html("dt", { textContent: term }), html("dd", { textContent: value }))));
}

async function showDecision(id) {
  const box = byId("decision-shown");
  try {
    const receipt = await askJson(`v1/decisions/${encodeURIComponent(id)}`);
    box.replaceChildren(html("h3", { textContent: `Request ${id}` }), ...receiptParts(receipt));
  } catch (error) {
    if (!(error instanceof AnswerError)) throw error;
    box.replaceChildren(html("p", { className: "note", textContent: error.message }));
  }
  box.hidden = false;
  box.focus();
}

function decisionRow(decision) {
  const number = (value, digits) => html("td", { className: "number", textContent: typeof value === "number" ? value.toFixed(digits).replace("-", "−") : "–" });
  const button = html("button", { type: "button", className: "name", textContent: decision.id });
  button.addEventListener("click", () => showDecision(decision.id));
  const cells = [
    html("td", { textContent: decision.router }), html("td", { textContent: expertWords(decision.experts ?? []) }),
    number(decision.confidence, 2), number(decision.ms, 1), html("td", { textContent: decision.is_fallback ? "yes" : "no" }),
    html("td", { textContent: decision.shadow ? shadowWords(decision.shadow) : "–" }),
  ];
  ["router", "experts", "confidence", "ms", "fell back", "in the shadow"].forEach((name, i) => { cells[i].dataset.label = name; });
  return html("tr", {}, html("th", { scope: "row" }, button), ...cells);
}

let shownDecisions = null;

function showDecisions(decisions) {
  // A row under the reader's finger or focus stays as long as nothing is new.
  const key = JSON.stringify(decisions);
  if (key === shownDecisions) return;
  shownDecisions = key;
  const at = [...byId("decision-rows").rows].findIndex((row) => row.contains(document.activeElement));
  const focused = at < 0 ? null : document.activeElement.textContent;
  byId("decision-rows").replaceChildren(...decisions.map(decisionRow));
  if (focused) [...byId("decision-rows").querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
}

async function lookAtServer() {
  if (document.hidden) return;
  try {
    const [usage, decisions] = await Promise.all([askJson("v1/usage"), askJson(`v1/decisions?limit=${NUM_DECISIONS}`)]);
    showUsage(usage);
    showDecisions(decisions.data);
    byId("usage-note").textContent = "Since the server started; asked again every 5 s.";
  } catch (error) {
    if (!(error instanceof AnswerError)) throw error;
    byId("usage-note").textContent = error.message;
  }
}

setInterval(lookAtServer, PERIOD_MS);
document.addEventListener("visibilitychange", lookAtServer);
lookAtServer();
