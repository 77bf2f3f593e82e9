// Talking to the server: the key, what is asked for, and the chunks of a streamed chat completion.
import { held, hold } from "./store.js";

const KIND = {
  0: "The server cannot be reached. Is it still running?",
  401: "This server wants an API key.",
  413: "That is more than this server takes in one request.",
  429: "The server is busy.",
  503: "The model is still loading.",
};

export const key = () => held("pelagos.key", "sessionStorage") ?? "";
export const setKey = (value) => hold("pelagos.key", value, "sessionStorage");

export class Refusal extends Error {
  constructor(status, said, wait) {
    const parts = [KIND[status], status !== 401 && said, wait && `Try again in ${wait} s.`].filter(Boolean);
    super(parts.join(" ") || `The server answered ${status}.`);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key() && { Authorization: `Bearer ${key()}` }) };
  const response = await fetch(path, { headers, cache: "no-store", ...options }).catch((problem) => {
    throw problem.name === "AbortError" ? problem : new Refusal(0);
  });
  if (response.ok) return response;
  const said = await response.json().then((body) => body.error.message, () => "").catch(() => "");
  throw new Refusal(response.status, said, response.headers.get("Retry-After"));
}

export const get = async (path) => (await request(path)).json();

export async function* streamed(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { done = true, value } = await reader.read().catch(() => ({}));
    signal.throwIfAborted();
    if (done) throw new Error("The answer broke off before its end.");
    const frames = (held + value).split("\n\n");
    held = frames.pop();
    for (const frame of frames) {
      if (frame === "data: [DONE]") return;
      if (!frame.startsWith("data: ")) continue; // a comment that keeps the connection open
      const chunk = JSON.parse(frame.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// Tools as typed: a JSON array of functions, bare or wrapped as the API has them; {tools, problem}.
export function toolsOf(typed) {
  try {
    const tools = [JSON.parse(typed.trim() || "[]")].flat().map((tool) => (tool.function ? tool : { type: "function", function: tool }));
    const isNamed = tools.every((tool) => typeof tool.function.name === "string");
    return isNamed ? { tools, problem: "" } : { tools: [], problem: "Each tool needs a \u201cname\u201d." };
  } catch (problem) {
    return { tools: [], problem: `This is not JSON yet: ${problem.message}` };
  }
}

// The request for an answer to the end of `messages`, a branch of `asked`.
export function requestBody(model, asked, messages, { effort, ...sampling }) {
  const sent = asked.system.trim() ? [{ role: "system", content: asked.system }] : [], { tools } = toolsOf(asked.tools);
  for (const { parent, meta, tool_calls: calls, ...message } of messages) {
    if (calls && meta.finish === "tool_calls") message.tool_calls = calls; // a call that was cut is not sent
    if (message.role !== "assistant" || message.content || message.reasoning_content || message.tool_calls) sent.push(message);
  }
  const given = Object.entries(sampling).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]);
  const body = { model, messages: sent, stream: true, stream_options: { include_usage: true }, ...Object.fromEntries(given) };
  if (tools.length) body.tools = tools;
  return { ...body, ...(effort === "off" ? { thinking: { type: "disabled" } } : { thinking: { type: "enabled" }, reasoning_effort: effort }) };
}

// Add what a chunk brings to a message.
export function fold(node, delta) {
  node.content += delta.content || "";
  node.reasoning_content += delta.reasoning_content || "";
  for (const { index, id, function: part } of delta.tool_calls ?? []) {
    node.tool_calls ??= [];
    node.tool_calls[index] ??= { id, type: "function", function: { name: part.name, arguments: "" } };
    node.tool_calls[index].function.arguments += part.arguments || "";
  }
}
