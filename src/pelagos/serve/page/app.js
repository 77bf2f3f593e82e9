// The chat page: the conversation on show, answers under way, and every control.
import { fold, get, key, requestBody, setKey, streamed, toolsOf } from "./api.js";
import { button, element } from "./markdown.js";
import * as store from "./store.js";
import { AnswerTurn, userTurn } from "./turns.js";

const $ = (id) => document.getElementById(id);
const icon = (name) => $("icons").content.querySelector(`[data-icon="${name}"]`).cloneNode(true);
const DEFAULTS = { effort: "high", temperature: "1", top_p: "1", max_tokens: "", seed: "" };
const SAVE_MS = 500; // between copies of a growing answer in storage
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format;
const runs = new Map(); // id of a conversation -> its answer under way: {node, controller, start, turn}
let chat = store.newChat(); // on show
let last = null; // answer on show
let editing = null; // message that the message box replaces, as an index
const settings = { ...DEFAULTS, ...store.held("pelagos.settings") };
let server = { model: null, context: 0 };
let toldUntil = 0; // timer of the toast
let isLeaving = false;

const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => $("log").scrollTo(0, $("log").scrollHeight);

function inView(change) {
  const follow = isAtEnd();
  change();
  if (follow) toEnd();
}

function turnOf(at) {
  const node = chat.nodes[at], { parent, role } = node;
  const all = [...chat.nodes.keys()].filter((other) => chat.nodes[other].parent === parent && chat.nodes[other].role === role);
  const choose = (other) => {
    store.choose(chat, other);
    keep();
    show();
  };
  if (role === "user") return userTurn(node, { at, all, choose }, () => edit(at));
  last = new AnswerTurn(node, { at, all, choose }, { onAgain: () => answer(parent), onResults: giveResults });
  return last.turn;
}

function show(next = chat) {
  const path = store.path(next), turns = [], answers = [];
  [chat, last] = [next, null];
  for (const at of path) {
    const { role, tool_call_id: id, content } = chat.nodes[at];
    if (role === "tool") last?.results.set(id, content);
    else turns.push(turnOf(at));
    if (role === "assistant") answers.push(last);
  }
  const run = runs.get(chat.id), hadFocus = $("turns").contains(document.activeElement);
  const live = run && answers.find((view) => view.node === run.node); // its branch may be off show
  if (live) run.turn = live;
  $("turns").replaceChildren(...turns);
  if (hadFocus) $("log").focus();
  for (const view of answers) view.draw(view === live ? run.start : undefined);
  $("welcome").hidden = turns.length > 0;
  $("title").textContent = chat.title || "New chat";
  document.title = chat.title ? `${chat.title} \u00b7 Pelagos` : "Pelagos";
  history.replaceState(null, "", chat.nodes.length ? `#${chat.id}` : location.pathname);
  edit(null);
  listChats();
}

function showState() {
  const isRunning = runs.has(chat.id), tools = toolsOf(chat.tools).tools.length;
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("send").disabled = !$("input").value.trim() || server.model === null;
  $("tools-chip").hidden = !tools;
  $("tools-chip").textContent = `${tools} tool${tools === 1 ? "" : "s"}`;
  const used = store.path(chat).map((at) => chat.nodes[at].meta.usage).findLast(Boolean);
  $("context").hidden = !used || !server.context;
  if ($("context").hidden) return;
  const total = used.prompt_tokens + used.completion_tokens;
  Object.assign($("context-meter"), { max: server.context, high: server.context * 0.9, value: total });
  $("context-text").textContent = `${compact(total)} of ${compact(server.context)}`;
}

function keep(kept = chat) {
  if (!store.save(kept)) toast("This browser's storage is full: the conversation is not kept. Export and delete older ones.");
}

function toast(text) {
  clearTimeout(toldUntil);
  $("toast").textContent = text;
  toldUntil = setTimeout(() => { $("toast").textContent = ""; }, 8000);
}

// Ask for an answer to the message at `parent` of the conversation on show, beside those that are there.
async function answer(parent) {
  const asked = chat, messages = store.path(asked, parent).map((at) => asked.nodes[at]);
  if (runs.has(asked.id) || server.model === null) return;
  const body = requestBody(server.model, asked, messages, settings), meta = { finish: "cut off when the page closed" };
  const node = asked.nodes[store.add(asked, { role: "assistant", content: "", reasoning_content: "", meta }, parent)];
  const run = { node, controller: new AbortController(), start: performance.now() };
  const draw = () => runs.has(asked.id) && run.turn.turn.isConnected && inView(() => run.turn.draw(run.start));
  const touch = () => { run.frame ??= requestAnimationFrame(() => [delete run.frame, draw()]); };
  const elapsed = () => (performance.now() - run.start) / 1000, ticking = setInterval(touch, 1000);
  let saved = performance.now(), isKeyWanted = false;
  runs.set(asked.id, run);
  keep();
  show();
  toEnd();
  try {
    for await (const { choices: [choice], usage } of streamed(body, run.controller.signal)) {
      if (usage) meta.usage = usage;
      if (!choice) continue;
      fold(node, choice.delta);
      meta.finish = choice.finish_reason || meta.finish;
      const isAnswering = node.content || node.tool_calls;
      if (isAnswering || node.reasoning_content) meta.first ??= elapsed();
      if (isAnswering && node.reasoning_content) meta.thought ??= elapsed();
      touch();
      if (performance.now() - saved > SAVE_MS) {
        saved = performance.now();
        store.save(asked);
      }
    }
  } catch (problem) {
    if (isLeaving) return; // what came is kept as an answer that was cut
    meta.finish = problem.name === "AbortError" ? "stopped" : "error";
    if (meta.finish === "error") meta.error = problem.message;
    isKeyWanted = problem.status === 401;
  }
  clearInterval(ticking);
  runs.delete(asked.id);
  if (node.reasoning_content) meta.thought ??= elapsed();
  if (meta.usage && elapsed() > meta.first + 0.1) meta.speed = (meta.usage.completion_tokens - 1) / (elapsed() - meta.first);
  if (!store.chats.has(asked.id)) return; // deleted meanwhile
  keep(asked);
  listChats();
  if (chat !== asked) return;
  inView(() => run.turn.draw());
  showState();
  $("spoken").textContent = (meta.error || node.content || "The answer calls a tool.").slice(0, 4000);
  const [field] = run.turn.fields.values();
  if (isKeyWanted) openSettings("key", () => answer(parent));
  else if (field && document.activeElement === $("input")) field.focus();
}

function addResults(results) {
  for (const [id, content] of results) store.add(chat, { role: "tool", tool_call_id: id, content });
}

function giveResults(results) {
  addResults(results);
  answer(chat.leaf);
}

function say(text) {
  if (!text.trim() || runs.has(chat.id) || server.model === null) return;
  if (editing === null && last) addResults(last.typed());
  chat.title ||= text.trim().split("\n")[0].slice(0, 60);
  const parent = editing === null ? chat.leaf : chat.nodes[editing].parent;
  $("input").value = "";
  answer(store.add(chat, { role: "user", content: text }, parent));
}

// Put a message of the user's into the message box, to be sent again in its place; null: a new one.
function edit(at) {
  if (at !== null || editing !== null) $("input").value = at === null ? "" : chat.nodes[at].content;
  editing = at;
  $("editing").hidden = at === null;
  if (at !== null) $("input").focus();
  fitInput();
}

async function watchServer() {
  const { status, model = "", context_length: context = 0 } = await get("health").catch(() => ({ status: "lost" }));
  const isReady = status === "ready";
  server = { model: isReady ? model : null, context };
  $("status").className = status;
  $("status-text").textContent = isReady ? model : status === "lost" ? "server not reachable" : `${model}: ${status}`;
  showState();
  setTimeout(watchServer, isReady ? 15000 : 1000);
}

function listChats() {
  const focused = document.activeElement.closest("#chats li")?.dataset.id;
  $("chats").replaceChildren(...store.newestFirst().map((other) => {
    const row = element("li", runs.has(other.id) ? "busy" : ""), open = button(other.title, () => go(other), "open");
    const act = (name, shape, onClick) =>
      Object.assign(button(icon(shape), onClick, "icon"), { ariaLabel: `${name} ${other.title}` });
    if (other.id === chat.id) open.ariaCurrent = "page";
    row.dataset.id = other.id;
    row.append(open, act("Rename", "pen", () => rename(other)), act("Delete", "bin", () => drop(other)));
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

const startChat = () => go(store.newChat(chat));

function rename(other) {
  other.title = prompt("New name of the conversation", other.title)?.trim().slice(0, 200) || other.title;
  keep(other);
  show();
}

function drop(other) {
  if (!confirm(`Delete \u201c${other.title}\u201d?`)) return;
  runs.get(other.id)?.controller.abort();
  store.remove(other.id);
  if (other.id === chat.id) startChat();
  else listChats();
}

function exportChats() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  link.download = "pelagos-conversations.json";
  link.click();
}

async function importChats({ target }) {
  try {
    toast(`${store.imported(await target.files[0].text())} imported.`);
  } catch {
    toast("This file is no export of this page.");
  }
  target.value = "";
  listChats();
}

function showSide(isOpen) {
  document.body.classList.toggle("side-open", isOpen);
  $("side-open").ariaExpanded = String(isOpen);
  if (isOpen) $("new").focus();
}

// Open the settings at a field; `onKey` is done if they are closed with another key.
function openSettings(focus = "system", onKey = null) {
  const values = { ...settings, system: chat.system, tools: chat.tools, key: key() };
  for (const [name, value] of Object.entries(values)) $(name).value = value;
  $("settings").className = focus === "key" ? "key-only" : "";
  $("settings").showModal();
  $(focus).focus();
  $("settings").onclose = () => {
    const isOther = $("key").value !== key();
    setKey($("key").value);
    if (chat.nodes.length) keep();
    if (isOther) onKey?.();
  };
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
  showState();
}

const stop = () => runs.get(chat.id)?.controller.abort();

const CLICKS = {
  "new": startChat, "side-open": () => showSide(true), "side-close": () => showSide(false), "down": toEnd, "stop": stop,
  "settings-open": () => openSettings(), "tools-chip": () => openSettings("tools"), "editing": () => edit(null),
  "export": exportChats, "import": () => $("file").click(),
};
for (const [id, act] of Object.entries(CLICKS)) $(id).addEventListener("click", act);
for (const name of Object.keys(DEFAULTS)) {
  $(name).addEventListener("change", () => {
    if ($(name).checkValidity()) settings[name] = $(name).value;
    store.hold("pelagos.settings", settings);
  });
}
$("system").addEventListener("input", () => { chat.system = $("system").value; });
$("tools").addEventListener("input", () => {
  chat.tools = $("tools").value;
  $("tools-problem").textContent = toolsOf(chat.tools).problem;
  showState();
});
$("file").addEventListener("change", importChats);
$("log").addEventListener("scroll", () => { $("down").hidden = isAtEnd(); });
$("input").addEventListener("input", fitInput);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  say($("input").value);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) $("composer").requestSubmit();
  else if (event.key === "ArrowUp" && !$("input").value) edit(store.path(chat).findLast((at) => chat.nodes[at].role === "user") ?? null);
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  const isCommand = event.ctrlKey || event.metaKey;
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") [() => showSide(false), () => edit(null), stop].forEach((act) => act());
  else if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") startChat();
  else if (isCommand && event.key === ",") openSettings();
  else if (event.key === "/" && !event.target.closest("input, textarea, select")) $("input").focus();
  else return;
  event.preventDefault();
});
addEventListener("pagehide", () => {
  isLeaving = true;
  for (const id of runs.keys()) if (store.chats.has(id)) store.save(store.chats.get(id));
});
addEventListener("pageshow", (event) => event.persisted && location.reload()); // its streams are gone

store.load();
$("effort").value = settings.effort;
show(store.chats.get(location.hash.slice(1)));
toEnd();
watchServer();
