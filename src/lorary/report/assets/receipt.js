// The receipt of a decision: the sentence, confidence against threshold, weights, what was not chosen, and each token's experts.
const NUM_SHOWN = 8;
const hueOfExpert = new Map(); // the same colour for an expert on the whole page

function expertHue(name) {
  if (!hueOfExpert.has(name)) hueOfExpert.set(name, Math.min(hueOfExpert.size, NUM_HUES - 1));
  return `var(--hue-${hueOfExpert.get(name)})`;
}

function bar(name, value, most, shown) {
  const line = html("i");
  line.style.setProperty("--c", expertHue(name));
  line.style.setProperty("--w", String(Math.max(0, Math.min(1, value / (most || 1)))));
  return html("li", {}, html("span", { textContent: name }), line, html("b", { textContent: shown }));
}

function weightBars(experts) {
  const items = experts.slice(0, NUM_SHOWN).map(({ name, weight }) => bar(name, weight, 1, weight.toFixed(2)));
  const more = experts.length > NUM_SHOWN ? [html("li", {}, html("span", { textContent: `and ${experts.length - NUM_SHOWN} more` }))] : [];
  return html("ul", { className: "bars" }, ...items, ...more);
}

// From the threshold, or from 0, to the confidence; scores of some rules are below 0 or above 1.
function confidenceMeter({ confidence, threshold }) {
  const from = threshold ?? 0;
  const [low, high] = [Math.min(0, confidence, from), Math.max(1, confidence, from)];
  const place = (value) => (value - low) / (high - low);
  const filled = html("i", { className: confidence < from ? "low" : "" });
  filled.style.setProperty("--from", String(place(Math.min(from, confidence))));
  filled.style.setProperty("--w", String(place(Math.max(from, confidence)) - place(Math.min(from, confidence))));
  const limit = html("b");
  limit.style.setProperty("--m", String(place(from)));
  const words = threshold === null ? "" : `, threshold ${cosineText(threshold)}`;
  const meter = html("div", { className: "meter", ariaHidden: "true" }, filled, ...(threshold === null ? [] : [limit]));
  return [html("div", { textContent: `confidence ${cosineText(confidence)}${words}` }), meter];
}

function rejectedTable(rejected) {
  const rows = rejected.map(({ name, score }) => html("tr", {}, html("th", { scope: "row", textContent: name }), html("td", { className: "number", textContent: score.toFixed(3).replace("-", "−") })));
  return html("details", {}, html("summary", { textContent: `${rejected.length} not chosen, with their scores` }),
    html("div", { className: "scroll tall", tabIndex: 0, role: "group", ariaLabel: "Experts not chosen" },
      html("table", { className: "groups" }, html("tbody", {}, ...rows))));
}

const expertWords = (experts) => experts.slice(0, 3).map(({ name, weight }) => `${name} ${weight.toFixed(2)}`).join(", ") || "no expert";

function groupTable(layers) {
  const rows = layers.map(({ group, experts }) => html("tr", {}, html("th", { scope: "row", textContent: group }), html("td", { textContent: expertWords(experts) })));
  return html("table", { className: "groups" }, html("tbody", {}, ...rows));
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

// A strip of tokens; the one under the pointer, or with the focus, shows its experts.
function tokenStrip(tokens) {
  const shown = html("div", { className: "token-experts", role: "status" });
  const elements = tokens.map(({ text, experts }, i) => {
    const element = html("span", { className: "token", textContent: visible(text), role: "option", tabIndex: i ? -1 : 0, ariaSelected: "false" });
    if (experts.length) {
      element.style.setProperty("--c", expertHue(experts[0].name));
      element.style.setProperty("--w", String(experts[0].weight));
    }
    element.setAttribute("aria-label", `${visible(text)}: ${expertWords(experts)}`);
    return element;
  });
  const strip = html("div", { className: "tokens", role: "listbox", ariaLabel: "Tokens of prompt and answer", ariaOrientation: "horizontal" }, ...elements);
  const show = (i) => {
    elements.forEach((element, j) => { element.ariaSelected = String(i === j); element.tabIndex = i === j ? 0 : -1; });
    const { text, experts, layers } = tokens[i];
    shown.replaceChildren(html("b", { textContent: `Token ${i + 1} of ${tokens.length}: “${visible(text)}”` }),
      layers ? groupTable(layers) : experts.length ? weightBars(experts) : " no expert");
  };
  strip.addEventListener("pointerover", (event) => { if (elements.includes(event.target)) show(elements.indexOf(event.target)); });
  strip.addEventListener("focusin", (event) => { if (elements.includes(event.target)) show(elements.indexOf(event.target)); });
  strip.addEventListener("keydown", (event) => {
    const at = elements.indexOf(event.target);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: elements.length - 1 }[event.key];
    if (to === undefined || !elements[to]) return;
    event.preventDefault();
    elements[to].focus();
  });
  shown.textContent = "Point at a token to see its experts.";
  return [strip, shown];
}

// What the router in the shadow would have chosen.
const shadowWords = ({ winner, agrees }) => (agrees ? `${winner}, the same` : winner);

function receiptParts(receipt) {
  const experts = receipt.experts ?? [];
  const facts = [
    ["router", receipt.rule && receipt.rule !== receipt.router ? `${receipt.router}, by the rule ${receipt.rule}` : receipt.router],
    ["fell back", receipt.is_fallback ? "yes" : "no"],
    ["time to decide", `${(receipt.ms ?? 0).toFixed(1)} ms`],
    ["prompt", `${receipt.num_tokens} tokens`],
    ...(receipt.shadow ? [["in the shadow", `${receipt.shadow.router}: ${shadowWords(receipt.shadow)}`]] : []),
    ["request", html("code", { textContent: receipt.id })],
  ];
  return [
    html("h4", { textContent: "Receipt" }),
    html("p", { className: "sentence", textContent: receipt.sentence }),
    ...(typeof receipt.confidence === "number" ? confidenceMeter({ ...receipt, threshold: receipt.threshold ?? null }) : []),
    ...(experts.length ? [weightBars(experts)] : []),
    definition(facts),
    ...(receipt.rejected?.length ? [rejectedTable(receipt.rejected)] : []),
    ...(receipt.tokens?.length ? [html("h4", { textContent: "Experts of each token" }), ...tokenStrip(receipt.tokens)] : []),
    ...(receipt.layers?.length ? [html("details", {}, html("summary", { textContent: "Experts by layer" }),
      html("div", { className: "scroll tall", tabIndex: 0, role: "group", ariaLabel: "Experts by layer" }, groupTable(receipt.layers)))] : []),
  ];
}
