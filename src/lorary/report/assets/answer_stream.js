// Asking the server: a token where it wants one, JSON, and answers that arrive piece by piece as server-sent events.
let token = ""; // in memory only
const tokenForm = byId("token-form");

class AnswerError extends Error {}

async function ask(path, { body, signal } = {}) {
  const headers = { ...(token && { authorization: `Bearer ${token}` }), ...(body && { "content-type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AnswerError("The server does not answer.");
  }
  if (response.status === 401) {
    tokenForm.hidden = false;
    throw new AnswerError(token ? "The server does not take this token." : "The server asks for a token.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const wait = response.headers.get("retry-after");
  throw new AnswerError([answer?.error?.message ?? `The server answers ${response.status}.`, ...(wait ? [`Try again in ${wait} s.`] : [])].join(" "));
}

const askJson = async (path, options) => (await ask(path, options)).json();

// The documents of a stream of events, one after the other.
async function* documents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += (value ?? "").replaceAll("\r\n", "\n");
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const text = event.split("\n").filter((part) => part.startsWith("data:")).map((part) => part.slice(5).trimStart()).join("\n");
      if (text === "[DONE]") return;
      if (text) yield JSON.parse(text);
    }
    if (done) throw new AnswerError("The answer broke off.");
  }
}

// One answer. `onText` is told of each piece; the result has the receipt, where there is one, and the request's id.
async function streamAnswer({ path, body, signal, onText }) {
  const response = await ask(path, { body: { ...body, stream: true }, signal });
  const result = { id: response.headers.get("x-request-id"), receipt: null, finish: null };
  for await (const part of documents(response)) {
    if (part.error) throw new AnswerError(part.error.message);
    if (part.lorary) result.receipt = [part.lorary].flat()[0];
    const choice = part.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) onText(text);
    if (choice?.finish_reason) result.finish = choice.finish_reason;
  }
  return result;
}
