// Conversations in localStorage, one key each. A conversation is a tree of messages, so that an edited question or
// another answer loses nothing: `leaf` is the end of the branch on show, `parent` is -1 at a root.
const PREFIX = "pelagos.chat.";
const MOST = 200; // conversations kept
const ROLES = new Set(["user", "assistant", "tool"]);
const text = (value) => (typeof value === "string" ? value : "");

export const chats = new Map(); // by id

export function newChat(settings = {}) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), system: "", tools: "", ...settings, nodes: [], leaf: -1 };
}

// A message from storage or an import, with nothing in it but what the page knows.
function cleanNode(node, at) {
  const { parent, role, meta } = node;
  if (!ROLES.has(role) || !Number.isInteger(parent) || parent < -1 || parent >= at) throw new TypeError("not a message");
  const kept = { parent, role, content: text(node.content), meta: meta && typeof meta === "object" ? meta : {} };
  if (role === "tool") kept.tool_call_id = text(node.tool_call_id);
  if (role === "assistant") kept.reasoning_content = text(node.reasoning_content);
  if (role === "assistant" && Array.isArray(node.tool_calls)) {
    kept.tool_calls = node.tool_calls.map((call) => (
      { id: text(call.id), type: "function", function: { name: text(call.function.name), arguments: text(call.function.arguments) } }));
  }
  return kept;
}

function clean(chat) {
  const nodes = chat.nodes.map(cleanNode);
  const leaf = Number.isInteger(chat.leaf) && chat.leaf >= -1 && chat.leaf < nodes.length ? chat.leaf : nodes.length - 1;
  const id = /^\w{1,40}$/.test(chat.id) ? chat.id : newChat().id;
  return { id, title: text(chat.title).slice(0, 200), updated: Number(chat.updated) || Date.now(), system: text(chat.system), tools: text(chat.tools), nodes, leaf };
}

// Read one conversation as another tab left it, or all of them.
export function load(key) {
  try {
    for (const name of key ? [key] : Object.keys(localStorage)) {
      if (!name.startsWith(PREFIX)) continue;
      const held = localStorage.getItem(name);
      try {
        if (held === null) chats.delete(name.slice(PREFIX.length));
        else chats.set(name.slice(PREFIX.length), clean(JSON.parse(held)));
      } catch (problem) {
        console.warn(`${name} is no conversation of this page and is left alone`, problem);
      }
    }
  } catch { /* storage is forbidden: conversations live as long as the page */ }
}

// Returns what to tell the user when it cannot be kept, or null.
export function save(chat) {
  chats.set(chat.id, chat);
  for (const old of newestFirst().slice(MOST)) remove(old.id);
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
    return null;
  } catch (problem) {
    if (problem.name !== "QuotaExceededError") return null;
    return "This browser's storage is full, so the conversation is not kept. Export and delete older ones.";
  }
}

export function remove(id) {
  chats.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch { /* it was never stored */ }
}

export const newestFirst = () => [...chats.values()].sort((a, b) => b.updated - a.updated);

export const exported = () => JSON.stringify({ format: "pelagos-conversations", version: 1, conversations: newestFirst() }, null, 1);

// Adds the conversations of an exported file; one that is here already comes in as a copy. Returns how many.
export function imported(content) {
  const { format, conversations } = JSON.parse(content);
  if (format !== "pelagos-conversations" || !Array.isArray(conversations)) throw new TypeError("not an export");
  const cleaned = conversations.slice(0, MOST).map(clean);
  for (const chat of cleaned.reverse()) {
    const here = chats.get(chat.id);
    if (here && JSON.stringify(here) === JSON.stringify(chat)) continue;
    const problem = save(here ? { ...chat, id: newChat().id } : chat);
    if (problem) throw new RangeError(problem);
  }
  return cleaned.length;
}

// --- the tree ---------------------------------------------------------------------------------------------------

export function path(chat, leaf = chat.leaf) {
  const found = [];
  for (let at = leaf; at >= 0; at = chat.nodes[at].parent) found.push(at);
  return found.reverse();
}

export function add(chat, message, parent = chat.leaf) {
  chat.leaf = chat.nodes.push({ parent, meta: {}, ...message }) - 1;
  chat.updated = Date.now();
  return chat.leaf;
}

export const siblings = (chat, at) =>
  chat.nodes.flatMap((node, other) => (node.parent === chat.nodes[at].parent && node.role === chat.nodes[at].role ? [other] : []));

// Show the branch through a message, down to the newest of what follows it.
export function choose(chat, at) {
  for (chat.leaf = at; ; chat.leaf = at) {
    at = chat.nodes.findLastIndex((node) => node.parent === chat.leaf);
    if (at < 0) return;
  }
}
