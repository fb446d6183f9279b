// Questions to the server: one answer, or two side by side.
let running = null; // what stops the answers that are being made

const sides = [1, 2].map((side) => ({
  model: byId(`model-${side}`),
  pane: byId(`pane-${side}`),
  part: (selector) => byId(`pane-${side}`).querySelector(selector),
}));

function say(side, words, isBad = false) {
  const outcome = side.part(".outcome");
  outcome.textContent = words;
  outcome.classList.toggle("bad", isBad);
}

async function loadModels() {
  try {
    const models = (await askJson("v1/models")).data.map(({ id }) => id);
    const [first, second] = sides.map(({ model }) => model.value);
    const options = (chosen) => models.map((id) => new Option(id, id, id === chosen, id === chosen));
    sides[0].model.replaceChildren(...options(models.includes(first) ? first : models[0]));
    sides[1].model.replaceChildren(new Option("nothing", ""), ...options(second));
    byId("ask-note").textContent = "";
  } catch (error) {
    byId("ask-note").textContent = error.message;
  }
}

function question(model) {
  const text = byId("prompt").value;
  const isChat = byId("format").value === "chat";
  return {
    path: isChat ? "v1/chat/completions" : "v1/completions",
    body: { model, ...(isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text }) },
  };
}

async function answerIn(side, signal) {
  const { path, body } = question(side.model.value);
  const start = performance.now();
  let first = null;
  let pieces = 0;
  const reply = side.part(".reply");
  reply.ariaBusy = "true";
  say(side, "asked");
  try {
    const sampling = { max_tokens: Number(byId("max-tokens").value) || 64, temperature: Number(byId("temperature").value) || 0 };
    const onText = (text) => {
      first ??= performance.now() - start;
      pieces += 1;
      reply.append(text);
    };
    const result = await streamAnswer({ path, body: { ...body, ...sampling, trace: byId("trace").checked }, signal, onText });
    const seconds = (performance.now() - start) / 1000;
    say(side, `${result.finish === "length" ? "Cut at the most tokens. " : ""}First text after ${Math.round(first ?? 0)} ms, all after ${seconds.toFixed(1)} s.`);
    const receipt = result.receipt ?? (result.id ? await askJson(`v1/decisions/${encodeURIComponent(result.id)}`, { signal }).catch(() => null) : null);
    if (receipt) side.part(".routed").replaceChildren(...receiptParts(receipt));
  } catch (error) {
    if (error.name === "AbortError") say(side, "Stopped.");
    else if (error instanceof AnswerError) say(side, error.message, true);
    else throw error;
  } finally {
    reply.ariaBusy = "false";
  }
}

async function decideIn(side, signal) {
  say(side, "asked");
  try {
    const { body } = question(side.model.value);
    const receipt = await askJson("v1/route", { body: { ...body, trace: byId("trace").checked }, signal });
    say(side, "Decided, not answered.");
    side.part(".routed").replaceChildren(...receiptParts(receipt));
  } catch (error) {
    if (error.name === "AbortError") say(side, "Stopped.");
    else if (error instanceof AnswerError) say(side, error.message, true);
    else throw error;
  }
}

async function run(work) {
  if (!byId("ask").reportValidity() || running) return;
  running = new AbortController();
  byId("stop").disabled = false;
  byId("run").disabled = byId("route").disabled = true;
  const used = sides.filter(({ model }) => model.value);
  sides.forEach((side) => {
    side.pane.hidden = !used.includes(side);
    side.part("h3").textContent = side.model.value;
    side.part(".reply").textContent = "";
    side.part(".reply").hidden = work === decideIn;
    side.part(".routed").replaceChildren();
  });
  try {
    await Promise.all(used.map((side) => work(side, running.signal)));
  } finally {
    running = null;
    byId("stop").disabled = true;
    byId("run").disabled = byId("route").disabled = false;
  }
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); run(answerIn); });
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("route").addEventListener("click", () => run(decideIn));
byId("stop").addEventListener("click", () => running?.abort());
tokenForm.addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  byId("token").value = "";
  tokenForm.hidden = true;
  loadModels();
  lookAtServer();
});
loadModels();
