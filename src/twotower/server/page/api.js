// Requests to the server: the model card, streamed completions, and errors as sentences.

const KEY = "twotower-key"; // in sessionStorage, so the browser forgets the key when the tab is closed

/** An error to show to the user. status: HTTP status, 0 without a response; param: the request field, if known. */
export class ApiError extends Error {
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

/** The model card of the served model. */
export async function model() {
  const response = await send("v1/models");
  return (await response.json()).data[0];
}

/** Yields the events of a streamed completion as {chunk, at}; `at`: arrival time by performance.now(). */
export async function* stream(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await send("v1/completions", { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await readChunk(reader.read(), signal);
    const at = performance.now();
    if (done) {
      throw new ApiError("The server closed the connection before the text was complete. Run the request again.");
    }
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection open
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ApiError(sentence(chunk.error.message), { param: chunk.error.param });
      yield { chunk, at };
    }
  }
}

async function send(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Check that “twotower serve” is running, then try again.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const staticFilesOnly = [404, 405, 501].includes(response.status) && !body;
  const fallback = staticFilesOnly
    ? "There is no twotower server behind this page. Start one with “twotower serve”; “How it works” needs no server"
    : `The server returned status ${response.status} without a message; its log may have the cause`;
  const message = body?.error?.message ?? fallback;
  const wait = response.headers.get("retry-after");
  throw new ApiError(sentence(message) + (wait ? ` Try again in ${wait} s.` : ""), {
    status: response.status,
    param: body?.error?.param ?? null,
  });
}

async function readChunk(reading, signal) {
  try {
    return await reading;
  } catch (error) {
    if (signal?.aborted) throw new DOMException("stopped", "AbortError");
    throw new ApiError("The connection was lost before the text was complete. Check that the server is running.");
  }
}

function sentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?…]$/.test(message) ? "" : ".");
}
