// The chat page: one conversation, streamed. What the model writes enters the document as text nodes only.
"use strict";

const $ = (id) => document.getElementById(id);
const conversation = []; // messages as the server takes them
let model = null; // the name of the model once it can answer
let running = null; // AbortController of the answer being written
let chapter = 0; // how often the conversation was cleared

// --- rendering -------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Text with `code` marked.
function inline(text) {
  return text.split(/(`[^`\n]+`)/).filter(Boolean).map((part) =>
    part.length > 2 && part.startsWith("`") && part.endsWith("`")
      ? element("code", "", part.slice(1, -1))
      : document.createTextNode(part));
}

// Text with ``` blocks; one that is still open at the end is a block already.
function rendered(text) {
  const nodes = [];
  text.split(/^```/m).forEach((part, index) => {
    if (index % 2 === 0) {
      nodes.push(...inline((index === 0 ? part : part.replace(/^\s+/, "")).replace(/\s+$/, "")));
    } else {
      const firstLine = part.indexOf("\n");
      const block = element("pre");
      block.append(element("code", "", firstLine < 0 ? "" : part.slice(firstLine + 1).replace(/\n$/, "")));
      nodes.push(block);
    }
  });
  return nodes;
}

function keepInView(change) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function addUser(text) {
  const row = element("div", "user");
  row.append(element("div", "", text));
  $("log").append(row);
}

// The view of one answer: thinking apart, redrawn at most once a frame.
class AnswerView {
  constructor() {
    this.thinking = "";
    this.content = "";
    this.node = element("div", "answer busy");
    this.body = element("div", "text");
    this.node.append(this.body);
    $("log").append(this.node);
    this.start = performance.now();
    this.pending = false;
  }

  add(delta) {
    if (delta.content || delta.reasoning_content) this.first ??= performance.now();
    this.thinking += delta.reasoning_content || "";
    this.content += delta.content || "";
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      keepInView(() => this.draw());
    });
  }

  draw() {
    if (this.thinking && !this.fold) {
      this.fold = element("details", "thinking");
      this.fold.open = true;
      this.label = element("summary", "", "Thinking\u2026");
      this.thought = element("div", "text");
      this.fold.append(this.label, this.thought);
      this.node.prepend(this.fold);
    }
    if (this.fold && this.shown !== this.thinking) {
      this.shown = this.thinking;
      this.thought.replaceChildren(...rendered(this.thinking));
    }
    if (this.content) this.endThinking();
    this.body.replaceChildren(...rendered(this.content));
  }

  endThinking() {
    if (!this.fold || this.thoughtFor) return;
    this.thoughtFor = ((performance.now() - this.start) / 1000).toFixed(1);
    this.label.textContent = `Thought for ${this.thoughtFor} s`;
    this.fold.open = false;
  }

  finish(note, error) {
    keepInView(() => {
      this.draw();
      if (this.content) this.endThinking();
      else if (this.label) this.label.textContent = "Thinking (no answer followed)";
      this.node.classList.remove("busy");
      if (error) this.node.append(element("p", "error", error));
      if (note) this.node.append(element("p", "note", note));
    });
  }
}

// --- talking to the server -------------------------------------------------------------------------------------

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const frames = held.split("\n\n");
    held = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ") || frame === "data: [DONE]") continue;
      yield JSON.parse(frame.slice(6));
    }
  }
}

function requestBody() {
  const thinking = $("thinking").checked;
  const body = {
    model,
    messages: conversation,
    stream: true,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value) || 1024,
    thinking: { type: thinking ? "enabled" : "disabled" },
  };
  if (thinking) body.reasoning_effort = $("effort").value;
  return JSON.stringify(body);
}

async function answer() {
  const view = new AnswerView();
  const asked = chapter;
  running = new AbortController();
  showRunning();
  let usage = null, reason = null, error = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: requestBody(),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of serverEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      view.add(event.choices[0].delta);
      reason = event.choices[0].finish_reason || reason;
      usage = event.usage || usage;
    }
  } catch (problem) {
    if (problem.name === "AbortError") reason = "stopped";
    else error = problem instanceof TypeError ? "The server cannot be reached." : problem.message;
  }
  running = null;
  showRunning();
  const seconds = (performance.now() - view.first) / 1000; // of the tokens after the first
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && seconds > 0.1) parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(0)} tokens/s`);
  if (reason === "stopped") parts.push("stopped");
  if (reason === "length") parts.push("cut at the longest answer");
  view.finish(parts.join(" \u00b7 "), error);
  if (asked !== chapter) return; // cleared meanwhile
  const wrote = view.content || view.thinking;
  if (wrote) conversation.push({ role: "assistant", content: view.content, reasoning_content: view.thinking });
  else conversation.pop(); // the question got no answer: leave it out of what follows
  $("input").focus();
}

function send(text) {
  if (!text.trim() || running) return;
  $("welcome").hidden = true;
  conversation.push({ role: "user", content: text });
  addUser(text);
  $("log").scrollTop = $("log").scrollHeight;
  answer();
}

async function watchServer() {
  let wait = 1000;
  try {
    const health = await fetch("health", { cache: "no-store" });
    const state = await health.json();
    model = health.ok ? state.model : null;
    $("status").className = health.ok ? "ready" : "";
    $("status-text").textContent = health.ok ? model : `loading ${state.model}`;
    if (health.ok) wait = 15000;
  } catch {
    $("status").className = "lost";
    $("status-text").textContent = "server not reachable";
  }
  showRunning();
  setTimeout(watchServer, wait);
}

// --- controls --------------------------------------------------------------------------------------------------

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("send").disabled = !$("input").value.trim() || model === null;
}

function fitInput() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  showRunning();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || model === null) return;
  const text = $("input").value;
  $("input").value = "";
  fitInput();
  send(text);
});
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  conversation.length = 0;
  chapter += 1;
  $("log").replaceChildren($("welcome"));
  $("welcome").hidden = false;
  $("input").focus();
});
$("settings-button").addEventListener("click", (event) => {
  $("settings").hidden = !$("settings").hidden;
  event.currentTarget.setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("thinking").addEventListener("change", () => { $("effort").disabled = !$("thinking").checked; });
$("temperature").addEventListener("input", () => {
  $("temperature-value").textContent = Number($("temperature").value).toFixed(1);
});
for (const example of document.querySelectorAll("#examples button")) {
  example.addEventListener("click", () => model !== null && send(example.textContent));
}
watchServer();
