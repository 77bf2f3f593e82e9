// The chat page: the conversation on show, answers under way, and every control.
import { Refusal, get, key, setKey, streamed } from "./api.js";
import { button, element } from "./markdown.js";
import * as store from "./store.js";
import { AnswerTurn, userTurn } from "./turns.js";

const $ = (id) => document.getElementById(id);
const icon = (name) => $("icons").content.querySelector(`[data-icon="${name}"]`).cloneNode(true);
const DEFAULTS = { effort: "high", temperature: "1", top_p: "1", max_tokens: "", seed: "" };
const SAVE_MS = 500; // between copies of a growing answer in storage
const runs = new Map(); // id of a conversation -> its answer under way: {controller, turn, touch}
let chat = store.newChat(); // on show
let views = []; // of its messages
let settings = { ...DEFAULTS };
let server = { model: null, context: 0 };
let toldUntil = 0; // timer of the toast
let isLeaving = false;

// --- the conversation on show -----------------------------------------------------------------------------------

const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

function inView(change) {
  const follow = isAtEnd();
  change();
  if (follow) toEnd();
}

function show(next = chat) {
  chat = next;
  views = [];
  const turns = [];
  let last = null; // answer
  for (const at of store.path(chat)) {
    const node = chat.nodes[at], versions = { at, all: store.siblings(chat, at) };
    const onChoose = (other) => {
      store.choose(chat, other);
      keep();
      show();
    };
    if (node.role === "tool") {
      last?.results.set(node.tool_call_id, node.content);
    } else if (node.role === "user") {
      const view = userTurn(node, versions, { onChoose, onEdit: (text) => say(text, node.parent) });
      views.push(view);
      turns.push(view.turn);
    } else {
      const canAnswer = at === chat.leaf && node.meta.finish === "tool_calls";
      last = new AnswerTurn(node, versions, { onChoose, onAgain: () => answer(node.parent), onResults: canAnswer && giveResults });
      views.push(last);
      turns.push(last.turn);
      if (at === chat.leaf && runs.has(chat.id)) runs.get(chat.id).turn = last;
    }
  }
  for (const view of views) if (view.draw) view.draw(runs.get(chat.id)?.turn === view ? runs.get(chat.id).start : undefined);
  $("turns").replaceChildren(...turns);
  $("welcome").hidden = turns.length > 0;
  $("title").textContent = document.title = chat.title || "New chat";
  document.title = chat.title ? `${chat.title} \u00b7 Pelagos` : "Pelagos";
  history.replaceState(null, "", chat.nodes.length ? `#${chat.id}` : location.pathname);
  listChats();
  showState();
}

function showState() {
  const isRunning = runs.has(chat.id), calls = toolsOf(chat.tools).tools.length;
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("send").disabled = !$("input").value.trim() || server.model === null;
  $("tools-chip").hidden = !calls;
  $("tools-chip").textContent = `${calls} tool${calls === 1 ? "" : "s"}`;
  const used = store.path(chat).map((at) => chat.nodes[at].meta.usage).filter(Boolean).at(-1);
  $("context").hidden = !used || !server.context;
  if ($("context").hidden) return;
  const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const total = used.prompt_tokens + used.completion_tokens;
  Object.assign($("context-meter"), { max: server.context, high: server.context * 0.9, value: total });
  $("context-text").textContent = `${short.format(total)} of ${short.format(server.context)}`;
}

function keep(kept = chat) {
  const problem = store.save(kept);
  if (problem) toast(problem);
}

function toast(text, label, onClick) {
  clearTimeout(toldUntil);
  $("toast").replaceChildren(text, ...(label ? [button(label, () => { $("toast").replaceChildren(); onClick(); })] : []));
  toldUntil = setTimeout(() => $("toast").replaceChildren(), label ? 10000 : 6000);
}

// --- asking -----------------------------------------------------------------------------------------------------

// Tools as typed: a JSON array of functions, bare or wrapped as the API has them; {tools, problem}.
function toolsOf(typed) {
  if (!typed.trim()) return { tools: [] };
  try {
    const list = [JSON.parse(typed)].flat().map((tool) => (tool.function ? tool : { type: "function", function: tool }));
    if (list.every((tool) => typeof tool.function.name === "string")) return { tools: list };
    return { tools: [], problem: "Each tool needs a \u201cname\u201d." };
  } catch (problem) {
    return { tools: [], problem: `This is not JSON yet: ${problem.message}` };
  }
}

function requestBody(asked, leaf) {
  const messages = asked.system.trim() ? [{ role: "system", content: asked.system }] : [];
  for (const at of store.path(asked, leaf)) {
    const { parent, meta, tool_calls: calls, ...message } = asked.nodes[at];
    if (calls && meta.finish === "tool_calls") message.tool_calls = calls;
    if (message.role !== "assistant" || message.content || message.reasoning_content || message.tool_calls) messages.push(message);
  }
  const isThinking = settings.effort !== "off", { tools } = toolsOf(asked.tools);
  const body = { model: server.model, messages, stream: true, stream_options: { include_usage: true }, thinking: { type: isThinking ? "enabled" : "disabled" } };
  if (isThinking) body.reasoning_effort = settings.effort;
  if (tools.length) body.tools = tools;
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (settings[name] !== "") body[name] = Number(settings[name]);
  return body;
}

function fold(node, delta) {
  node.content += delta.content || "";
  node.reasoning_content += delta.reasoning_content || "";
  for (const { index, id, function: part } of delta.tool_calls ?? []) {
    node.tool_calls ??= [];
    node.tool_calls[index] ??= { id, type: "function", function: { name: part.name, arguments: "" } };
    node.tool_calls[index].function.arguments += part.arguments || "";
  }
}

// Draws a growing answer once a frame, and less often when drawing takes long.
function drawer(run) {
  let pending = false, cost = 0;
  const draw = () => requestAnimationFrame(() => {
    pending = false;
    if (run.isOver || !run.turn.turn.isConnected) return;
    const begun = performance.now();
    inView(() => run.turn.draw(run.start));
    cost = performance.now() - begun;
  });
  return () => {
    if (!pending) setTimeout(draw, cost > 8 ? cost * 4 : 0);
    pending = true;
  };
}

// Ask for an answer to the message at `parent` of the conversation on show, beside those that are there.
async function answer(parent) {
  const asked = chat;
  if (runs.has(asked.id) || server.model === null) return;
  const body = requestBody(asked, parent), meta = { wasCut: true };
  const node = asked.nodes[store.add(asked, { role: "assistant", content: "", reasoning_content: "", meta }, parent)];
  const run = { controller: new AbortController(), start: performance.now() };
  run.touch = drawer(run);
  runs.set(asked.id, run);
  keep(asked);
  show();
  toEnd();
  const ticking = setInterval(run.touch, 1000);
  const elapsed = () => (performance.now() - run.start) / 1000;
  let saved = performance.now(), wanted = null;
  try {
    for await (const { choices: [choice], usage } of streamed(body, run.controller.signal)) {
      if (usage) meta.usage = usage;
      if (!choice) continue;
      fold(node, choice.delta);
      meta.finish = choice.finish_reason || meta.finish;
      if (node.content || node.reasoning_content || node.tool_calls) meta.first ??= elapsed();
      if (node.reasoning_content && (node.content || node.tool_calls)) meta.thought ??= elapsed();
      run.touch();
      if (performance.now() - saved > SAVE_MS) {
        saved = performance.now();
        store.save(asked);
      }
    }
  } catch (problem) {
    if (problem.name === "AbortError") meta.finish = "stopped";
    else meta.error = problem instanceof Refusal ? problem.message : `The page failed: ${problem.message}`;
    if (problem.wait) meta.error += ` Try again in ${problem.wait} s.`;
    if (problem.status === 401) wanted = parent;
  }
  clearInterval(ticking);
  if (isLeaving) return; // what came is kept as an answer that was cut
  run.isOver = true;
  runs.delete(asked.id);
  delete meta.wasCut;
  if (node.reasoning_content) meta.thought ??= elapsed();
  if (meta.usage && elapsed() - meta.first > 0.1) meta.speed = (meta.usage.completion_tokens - 1) / (elapsed() - meta.first);
  if (!store.chats.has(asked.id)) return; // deleted meanwhile
  keep(asked);
  if (chat !== asked) return listChats();
  inView(() => show());
  speak(meta.error || node.content || (node.tool_calls ? "The answer calls a tool." : "The answer is empty."));
  const field = $("turns").querySelector(".result textarea");
  if (wanted !== null) askForKey(wanted);
  else if (field && document.activeElement === $("input")) field.focus();
}

function speak(text) {
  $("spoken").textContent = text.slice(0, 4000);
}

function say(text, parent = null) {
  if (!text.trim() || runs.has(chat.id) || server.model === null) return;
  const open = views.at(-1);
  if (parent === null && open?.fields) addResults(open.typed());
  chat.title ||= text.trim().split("\n")[0].slice(0, 60);
  const at = store.add(chat, { role: "user", content: text }, parent ?? chat.leaf);
  answer(at);
}

const addResults = (results) => results.forEach(([id, content]) => store.add(chat, { role: "tool", tool_call_id: id, content }));

function giveResults(results) {
  addResults(results);
  $("input").focus();
  answer(chat.leaf);
}

function askForKey(parent) {
  $("key").value = key() ?? "";
  $("key-dialog").showModal();
  $("key-dialog").onclose = () => {
    if ($("key-dialog").returnValue !== "use" || !$("key").value) return;
    setKey($("key").value);
    answer(parent);
  };
}

async function watchServer() {
  let wait = 1000, state = "lost", text = "server not reachable";
  try {
    const health = await get("health");
    state = health.status;
    text = state === "ready" ? health.model : `${health.model}: ${state}`;
    server = { model: state === "ready" ? health.model : null, context: health.context_length || server.context };
    if (state === "ready") wait = 15000;
  } catch (problem) {
    if (problem.status) text = "loading";
  }
  $("status").className = state;
  $("status-text").textContent = text;
  showState();
  setTimeout(watchServer, wait);
}

// --- conversations ----------------------------------------------------------------------------------------------

function listChats() {
  const focused = document.activeElement?.closest?.("#chats li")?.dataset.id;
  $("chats").replaceChildren(...store.newestFirst().map((other) => {
    const open = button(other.title || "Untitled", () => open.isConnected && go(other), "open");
    if (other.id === chat.id) open.setAttribute("aria-current", "page");
    const rename = button("", () => renaming(row, other), "icon"), away = button("", () => drop(other), "icon");
    rename.append(icon("pen"));
    away.append(icon("bin"));
    rename.setAttribute("aria-label", `Rename ${other.title}`);
    away.setAttribute("aria-label", `Delete ${other.title}`);
    const row = element("li", runs.has(other.id) ? "busy" : "", open, rename, away);
    row.dataset.id = other.id;
    return row;
  }));
  if (focused) $("chats").querySelector(`[data-id="${focused}"] .open`)?.focus();
}

function go(next) {
  showSide(false);
  show(next);
  toEnd();
  $("input").focus();
}

const startChat = () => go(store.newChat({ system: chat.system, tools: chat.tools }));

function renaming(row, other) {
  const field = element("input");
  field.value = other.title;
  field.setAttribute("aria-label", "New name");
  const end = (isKept) => {
    field.onblur = null;
    if (isKept && field.value.trim()) {
      other.title = field.value.trim().slice(0, 200);
      keep(other);
    }
    show();
    $("chats").querySelector(`[data-id="${other.id}"] .open`)?.focus();
  };
  field.onblur = () => end(true);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") end(event.key === "Enter");
    event.stopPropagation();
  });
  row.replaceChildren(field);
  field.select();
}

function drop(other) {
  runs.get(other.id)?.controller.abort();
  store.remove(other.id);
  if (other.id === chat.id) startChat();
  else listChats();
  toast("Conversation deleted.", "Undo", () => {
    keep(other);
    go(other);
  });
}

function exportChats() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  link.download = "pelagos-conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function importChats(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    const found = store.imported(await file.text());
    toast(`${found} conversation${found === 1 ? "" : "s"} imported.`);
  } catch (problem) {
    toast(problem instanceof RangeError ? problem.message : "This file is no export of this page.");
  }
  listChats();
}

// --- controls ---------------------------------------------------------------------------------------------------

function showSide(isOpen) {
  document.body.classList.toggle("side-open", isOpen);
  $("side-open").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("new").focus();
}

function readSettings() {
  try {
    settings = { ...DEFAULTS, ...JSON.parse(localStorage.getItem("pelagos.settings")) };
  } catch { /* the defaults */ }
  for (const name of Object.keys(DEFAULTS)) $(name).value = settings[name];
}

function openSettings() {
  $("system").value = chat.system;
  $("tools").value = chat.tools;
  $("settings").showModal();
  $("tools").dispatchEvent(new Event("input"));
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
  showState();
}

const stop = () => runs.get(chat.id)?.controller.abort();

for (const name of Object.keys(DEFAULTS)) {
  $(name).addEventListener("change", () => {
    if ($(name).checkValidity()) settings[name] = $(name).value;
    try {
      localStorage.setItem("pelagos.settings", JSON.stringify(settings));
    } catch { /* for this page only */ }
  });
}
$("system").addEventListener("input", () => { chat.system = $("system").value; });
$("tools").addEventListener("input", () => {
  chat.tools = $("tools").value;
  const { problem = "" } = toolsOf(chat.tools);
  $("tools-problem").textContent = problem;
  $("tools").setAttribute("aria-invalid", String(Boolean(problem)));
  showState();
});
$("settings").addEventListener("close", () => chat.nodes.length && keep());
$("reset").addEventListener("click", () => {
  for (const name of Object.keys(DEFAULTS)) {
    $(name).value = DEFAULTS[name];
    $(name).dispatchEvent(new Event("change"));
  }
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (runs.has(chat.id) || server.model === null || !text.trim()) return;
  $("input").value = "";
  fitInput();
  say(text);
});
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !$("input").value) {
    event.preventDefault();
    views.findLast((view) => view.edit)?.edit();
  }
});
$("stop").addEventListener("click", () => {
  stop();
  $("input").focus();
});
for (const [id, act] of Object.entries({
  "new": startChat, "side-open": () => showSide(true), "side-close": () => showSide(false), "settings-open": openSettings,
  "tools-chip": openSettings, "help-open": () => $("help").showModal(), "export": exportChats, "import": () => $("file").click(),
  "down": toEnd,
})) $(id).addEventListener("click", act);
$("file").addEventListener("change", importChats);
$("log").addEventListener("scroll", () => { $("down").hidden = isAtEnd(); });
for (const example of document.querySelectorAll("#examples button")) {
  example.addEventListener("click", () => say(example.textContent));
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // a click beside it
}
document.addEventListener("keydown", (event) => {
  const isCommand = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && document.body.classList.contains("side-open")) showSide(false);
  else if (event.key === "Escape" && runs.has(chat.id)) stop();
  else if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") startChat();
  else if (isCommand && event.key === ",") openSettings();
  else if (isCommand && event.key === "/") $("help").showModal();
  else if (event.key === "/" && !event.target.closest("input, textarea, select")) $("input").focus();
  else return;
  event.preventDefault();
});
addEventListener("storage", ({ key: name }) => {
  if (!name?.startsWith("pelagos.chat.")) return;
  store.load(name);
  const other = store.chats.get(chat.id);
  if (other && name.endsWith(chat.id) && !runs.has(chat.id)) show(other);
  else listChats();
});
addEventListener("pagehide", () => {
  isLeaving = true;
  for (const id of runs.keys()) if (store.chats.has(id)) store.save(store.chats.get(id));
});
addEventListener("pageshow", (event) => event.persisted && location.reload()); // its streams are gone

store.load();
readSettings();
show(store.chats.get(location.hash.slice(1)) ?? chat);
toEnd();
watchServer();
