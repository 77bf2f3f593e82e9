// Conversations in localStorage, one key each. A conversation is a tree of messages, so that an edited question or
// another answer loses nothing: `leaf` is the end of the branch on show, `parent` is -1 at a root.
const PREFIX = "pelagos.chat.", FORMAT = "pelagos-conversations";
const MOST = 200; // conversations kept
const text = (value) => (typeof value === "string" ? value : "");

export const chats = new Map(); // by id

// The result, or null where storage is forbidden or full, or what is in it damaged.
function allowed(act) {
  try {
    return act();
  } catch {
    return null;
  }
}

export const held = (name, area = "localStorage") => allowed(() => JSON.parse(window[area].getItem(name)));

// Whether there was room for it.
export const hold = (name, value, area = "localStorage") =>
  allowed(() => [window[area].setItem(name, JSON.stringify(value))]) !== null;

export function newChat({ system = "", tools = "" } = {}) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), system, tools, nodes: [], leaf: -1 };
}

// Numbers and texts of a figure list, one level deep.
const figures = (given) => Object.fromEntries(Object.entries({ ...given }).flatMap(([name, value]) => (
  Number.isFinite(value) || (typeof value === "string" && ["finish", "error"].includes(name)) ? [[name, value]]
    : name === "usage" && Number.isFinite(value?.prompt_tokens) && Number.isFinite(value.completion_tokens) ? [[name, figures(value)]]
      : [])));

// A conversation from storage or an import, with nothing in it but what the page knows; throws for what is none.
function clean(chat) {
  const nodes = chat.nodes.map(({ parent, role, content, reasoning_content, tool_call_id, tool_calls, meta }, at) => {
    const isKnown = ["user", "assistant", "tool"].includes(role) && Number.isInteger(parent) && parent >= -1 && parent < at;
    if (!isKnown) throw new TypeError("not a message");
    const node = { parent, role, content: text(content), meta: figures(meta) };
    if (role === "tool") node.tool_call_id = text(tool_call_id);
    if (role === "assistant") node.reasoning_content = text(reasoning_content);
    if (role === "assistant" && tool_calls) node.tool_calls = tool_calls.map(({ id, function: { name, arguments: given } }) => (
      { id: text(id), type: "function", function: { name: text(name), arguments: text(given) } }));
    return node;
  });
  const kept = { ...newChat({ system: text(chat.system), tools: text(chat.tools) }), title: text(chat.title).slice(0, 200), nodes };
  if (/^\w{1,40}$/.test(chat.id)) kept.id = chat.id;
  return { ...kept, updated: Number(chat.updated) || kept.updated, leaf: chat.leaf in nodes ? chat.leaf : nodes.length - 1 };
}

export function load() {
  for (const name of allowed(() => Object.keys(localStorage)) ?? []) {
    const found = name.startsWith(PREFIX) && allowed(() => clean(held(name)));
    if (found) chats.set(found.id, found); // what is no conversation of this page is left alone
  }
}

// Whether it is kept; the oldest conversations make way for it.
export function save(chat) {
  chats.set(chat.id, chat);
  for (const old of newestFirst().slice(MOST)) remove(old.id);
  return hold(PREFIX + chat.id, chat);
}

export function remove(id) {
  chats.delete(id);
  allowed(() => localStorage.removeItem(PREFIX + id));
}

export const newestFirst = () => [...chats.values()].sort((a, b) => b.updated - a.updated);
export const exported = () => JSON.stringify({ format: FORMAT, version: 1, conversations: newestFirst() }, null, 1);

// Adds the conversations of an exported file, as copies where one is here already. Returns how many; throws for no export.
export function imported(content) {
  const { format, conversations } = JSON.parse(content);
  if (format !== FORMAT) throw new TypeError("not an export");
  const cleaned = conversations.slice(0, MOST).map(clean);
  return cleaned.filter((chat) => save(chats.has(chat.id) ? { ...chat, id: newChat().id } : chat)).length;
}

// The messages of a branch from its root, as indexes.
export function path(chat, leaf = chat.leaf) {
  const found = [];
  for (let at = leaf; at >= 0; at = chat.nodes[at].parent) found.unshift(at);
  return found;
}

export function add(chat, message, parent = chat.leaf) {
  chat.leaf = chat.nodes.push({ parent, meta: {}, ...message }) - 1;
  chat.updated = Date.now();
  return chat.leaf;
}

// Show the branch through a message, down to the newest of what follows it.
export function choose(chat, at) {
  for (; at >= 0; at = chat.nodes.findLastIndex((node) => node.parent === chat.leaf)) chat.leaf = at;
}
