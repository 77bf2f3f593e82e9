// Talking to the server: the key, JSON, and the chunks of a streamed chat completion.
export class Refusal extends Error {
  constructor(status, message, wait = 0) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

let heldKey = null; // where sessionStorage is forbidden
export const key = () => {
  try {
    return sessionStorage.getItem("pelagos.key") ?? heldKey;
  } catch {
    return heldKey;
  }
};
export function setKey(value) {
  heldKey = value;
  try {
    sessionStorage.setItem("pelagos.key", value);
  } catch { /* held for this page only */ }
}

const KIND = {
  401: "This server wants an API key.",
  413: "That is more than this server takes in one request.",
  429: "The server is busy.",
  503: "The model is still loading.",
};

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { headers, cache: "no-store", ...options });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Refusal(0, "The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().then((body) => body.error?.message, () => null);
  const wait = Number(response.headers.get("Retry-After")) || 0;
  const kind = KIND[response.status];
  throw new Refusal(response.status, [kind, said].filter(Boolean).join(" ") || `The server answered ${response.status}.`, wait);
}

export const get = async (path) => (await request(path)).json();

export async function* streamed(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch((problem) => {
      throw problem.name === "AbortError" ? problem : new Refusal(0, "The connection broke off.");
    });
    if (done) throw new Refusal(0, "The answer broke off before its end.");
    held += value;
    const frames = held.split("\n\n");
    held = frames.pop();
    for (const frame of frames) {
      if (frame === "data: [DONE]") return;
      if (!frame.startsWith("data: ")) continue;
      const chunk = JSON.parse(frame.slice(6));
      if (chunk.error) throw new Refusal(500, chunk.error.message);
      yield chunk;
    }
  }
}
