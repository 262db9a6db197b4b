// How the page talks to its server. Addresses are relative: it also works behind a proxy that serves it under a prefix.

const KEY = "jax-engine-api-key";

/** What went wrong, in the server's own words where it said anything. */
export class ServerError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Kept for this tab only, and gone with it. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** A response with a good status; ServerError otherwise. `body` makes it a POST. */
async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Not this server's: a proxy's page, say.
  }
  const message = error.message ?? `The server answered with ${response.status} ${response.statusText}.`;
  throw new ServerError(message, { status: response.status, code: error.code });
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

/** The chunks of a streamed chat completion, until `[DONE]`. */
export async function* chatChunks(body, signal) {
  const response = await request("v1/chat/completions", { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let isComplete = false;
  try {
    while (true) {
      const { value, done } = await readFrom(reader);
      if (done && isComplete) return;
      if (done) throw new ServerError("The connection ended before the answer did.");
      const events = (pending + value).split("\n\n");
      pending = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:"));
        const text = data.map((line) => line.slice(5).trim()).join("\n");
        isComplete ||= text === "[DONE]";
        if (!text || isComplete) continue;
        const chunk = JSON.parse(text);
        if (chunk.error) throw new ServerError(chunk.error.message, { code: chunk.error.code });
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function readFrom(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server was lost.");
  }
}
