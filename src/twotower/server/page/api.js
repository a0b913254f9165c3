// Talking to the server: requests, streams of events, and errors in words.

const KEY = "twotower-key"; // in sessionStorage only: it ends with the tab

/** Something went wrong that a reader can be told. param: the field of the request that is meant, if any. */
export class Refusal extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The served model's card. */
export async function model() {
  const answer = await send("v1/models");
  return (await answer.json()).data[0];
}

/** The events of a streamed completion: {chunk, at}, `at` by performance.now() when it arrived. */
export async function* stream(asked, signal) {
  const body = JSON.stringify({ ...asked, stream: true, stream_options: { include_usage: true } });
  const answer = await send("v1/completions", { method: "POST", body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await broken(reader.read(), signal);
    const at = performance.now();
    if (done) throw new Refusal("The server ended the connection before the text was whole. It may have been stopped.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection open
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Refusal(sentence(chunk.error.message), { param: chunk.error.param });
      yield { chunk, at };
    }
  }
}

async function send(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. It may have been stopped: start it again with “twotower serve”.");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  const none = [404, 405, 501].includes(answer.status) && !said; // a server of files alone
  const unsaid = none
    ? "There is no twotower server behind this page. “How it works” needs none"
    : `The server answered ${answer.status} without saying why`;
  const message = said?.error?.message ?? unsaid;
  const wait = answer.headers.get("retry-after");
  throw new Refusal(sentence(message) + (wait ? ` It says to come again in ${wait} s.` : ""), {
    status: answer.status,
    param: said?.error?.param ?? null,
  });
}

async function broken(reading, signal) {
  try {
    return await reading;
  } catch (error) {
    if (signal?.aborted) throw new DOMException("stopped", "AbortError");
    throw new Refusal("The connection broke before the text was whole. The server may have been stopped.");
  }
}

function sentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?…]$/.test(message) ? "" : ".");
}
