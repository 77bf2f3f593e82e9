// Markdown to DOM nodes: text of a model becomes text nodes and the elements made here, nothing else.
const FENCE = /^ *(`{3,}|~{3,}) *([^`\s]*)(?:\s[^`]*)?$/;
const HEADING = /^ {0,3}(#{1,6}) +(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +(?=\S)|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const DEEPEST = 8; // of what is nested; deeper is plain text
const INLINE = new RegExp([
  String.raw`(?<math>\$\$[^]{1,1000}?\$\$|\\\([^]{1,500}?\\\)|\\\[[^]{1,1000}?\\\]|`,
  String.raw`\$(?=[^$\n]{0,200}[\\^_])[^$\n]{1,200}\$)|`,
  String.raw`\\(?<escaped>[!-\/:-@[-\x60{-~])|`,
  String.raw`(?<!\x60)(?<ticks>\x60{1,8})(?!\x60)(?<code>[^]{1,2000}?)(?<!\x60)\k<ticks>(?!\x60)|`,
  String.raw`!?\[(?<label>(?:[^\[\]\\]|\\.|\[[^\[\]]{0,200}\]){0,1000})\]`,
  String.raw`\( *(?<target>[^\s()]{1,2000}(?:\([^\s()]{0,500}\)[^\s()]{0,500}){0,3})(?: +"[^"]{0,500}")? *\)|`,
  String.raw`(?<!\w)(?<bare>https?:\/\/(?:[^\s<>"\x60|*()]|\([^\s()]{0,500}\)){1,2000}(?<![.,;:!?'\]]))|`,
  String.raw`\*\*(?!\s)(?<strong>(?:\*[^*]{1,500}\*|[^*]){1,1000}?)(?<!\s)\*\*|`,
  String.raw`(?<!\w)__(?!\s)(?<strong2>(?:[^_]|_(?!_)){1,1000}?)(?<!\s)__(?!\w)|`,
  String.raw`\*(?![\s*])(?<em>(?:\*\*[^*]{1,500}\*\*|[^*]){1,1000}?)(?<!\s)\*(?!\*)|`,
  String.raw`(?<!\w)_(?![\s_])(?<em2>(?:[^_]|(?<=\w)_(?=\w)){1,1000}?)(?<!\s)_(?!\w)|`,
  String.raw`~~(?!\s)(?<del>[^~]{1,1000}?)~~`,
].join(""), "g");
const TAGS = { strong: "strong", strong2: "strong", em: "em", em2: "em", del: "del" };

export function element(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

export function button(label, onClick, className = "link") {
  const node = element("button", className, label);
  node.type = "button";
  node.addEventListener("click", onClick);
  return node;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text); // absent on plain http from elsewhere
  const field = element("textarea", "sr");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

export const copyButton = (text) => button("Copy", async ({ currentTarget }) => {
  await copy(text());
  currentTarget.textContent = "Copied";
  setTimeout(() => { currentTarget.textContent = "Copy"; }, 1500);
});

function link(target, children) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(target)) return element("span", "", ...children);
  const node = element("a", "", ...children);
  return Object.assign(node, { href: target, title: target, target: "_blank", rel: "noopener noreferrer" });
}

function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const nodes = [], inner = (part) => inline(part, depth + 1);
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    const part = found.groups, tag = Object.keys(TAGS).find((name) => part[name]);
    nodes.push(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (tag) nodes.push(element(TAGS[tag], "", ...inner(part[tag])));
    else if (part.code) nodes.push(element("code", "", part.code.replace(/^ (.*\S.*) $/s, "$1")));
    else if (part.math) nodes.push(element("span", "math", part.math));
    else if (part.target) nodes.push(link(part.target, inner(part.label || part.target)));
    else if (part.bare) nodes.push(link(part.bare, [part.bare]));
    else nodes.push(part.escaped);
  }
  return [...nodes, text.slice(at)].filter(Boolean);
}

// Comments, strings, numbers and words of most languages, well enough to colour by.
const TOKENS = new RegExp([
  String.raw`((?<!\S)(?:#|\/\/|--)(?:\s[^\n]*|$)|\/\*[^]*?(?:\*\/|$)|<!--[^]*?(?:-->|$))`,
  String.raw`("""[^]*?(?:"""|$)|"(?:[^"\\\n]|\\.)*"?|(?<!\w)'(?:[^'\\\n]|\\.)*'?|\x60(?:[^\x60\\]|\\[^])*\x60?)`,
  String.raw`\b(\d[\w.]*)`,
  String.raw`\b[A-Za-z_]\w*`,
].join("|"), "g");
const KEYWORDS = new Set((
  "and as async await bool break case catch char class const continue def default delete do double elif else enum except " +
  "export extends false finally float fn for from func function global go if impl import in int interface is lambda let " +
  "local long loop match module mut new nil none not null or package pass private protected pub public raise return select " +
  "self static string struct super switch then this throw true try type typeof until use var void where while with yield"
).split(" "));

function coloured(code, language) {
  if (/^(|te?xt|plaintext|markdown|md)$/i.test(language) || code.length > 30000) return [code];
  const nodes = [];
  let at = 0;
  for (const found of code.matchAll(TOKENS)) {
    const kind = ["c", "s", "n"].find((_, group) => found[group + 1]) ?? (KEYWORDS.has(found[0].toLowerCase()) && "k");
    if (!kind) continue;
    nodes.push(code.slice(at, found.index), element("span", kind, found[0]));
    at = found.index + found[0].length;
  }
  return [...nodes, code.slice(at)];
}

export function codeFigure(code, language) {
  const block = element("pre", "", element("code", "", ...coloured(code, language)));
  block.tabIndex = 0; // it may scroll
  const caption = element("figcaption", "", element("span", "", language || "text"), copyButton(() => code));
  return element("figure", "code", caption, block);
}

const indentOf = (line) => line.search(/\S|$/);
const shifted = (line, by) => line.slice(Math.min(by, indentOf(line)));
const closes = (line, ticks) => line.trim().length >= ticks.length && !line.trim().replaceAll(ticks[0], "");
const isTable = ([row, rule = ""]) => row.includes("|") && rule.length < 2000 && TABLE_RULE.test(rule);

function endOfFence(lines, at) {
  const ticks = lines[at].match(FENCE)[1];
  for (at += 1; at < lines.length; at += 1) if (closes(lines[at], ticks)) return at + 1;
  return at;
}

function codeBlock(lines) {
  const [, ticks, language] = lines[0].match(FENCE), isClosed = lines.length > 1 && closes(lines.at(-1), ticks);
  const code = lines.slice(1, isClosed ? -1 : undefined).map((line) => shifted(line, indentOf(lines[0])));
  return codeFigure(code.join("\n"), language);
}

function heading([line]) {
  const [, marks, title] = line.match(HEADING);
  return element(`h${Math.min(6, marks.length + 2)}`, "", ...inline(title.replace(/ +#+ *$/, "")));
}

function endOfList(lines, at) {
  const [, indent, mark] = lines[at].match(ITEM), isOrdered = mark.length > 1;
  for (at += 1; at < lines.length; at += 1) {
    const line = lines[at], item = line.match(ITEM);
    if (!line.trim()) continue;
    if (indentOf(line) >= indent.length + 2) {
      if (FENCE.test(line)) at = endOfFence(lines, at) - 1;
    } else if (item ? RULE.test(line) || item[2].length > 1 !== isOrdered : kindOf(line) !== PARAGRAPH || !lines[at - 1].trim()) break;
  }
  while (!lines[at - 1].trim()) at -= 1;
  return at;
}

function list(lines, depth) {
  const [, indent, mark] = lines[0].match(ITEM), items = [], nested = indent.length + 2;
  for (let at = 0; at < lines.length;) {
    const found = lines[at].match(ITEM), isFence = FENCE.test(lines[at]);
    const end = isFence ? endOfFence(lines, at) : at + 1, by = found || isFence ? nested : indentOf(lines[at]);
    if (found && indentOf(lines[at]) < nested) items.push([lines[at].slice(found[0].length)]);
    else items.at(-1).push(...lines.slice(at, end).map((line) => shifted(line, by)));
    at = end;
  }
  const node = element(mark.length > 1 ? "ol" : "ul");
  if (mark.length > 1) node.start = parseInt(mark, 10);
  for (const item of items) {
    while (item.length > 1 && !item.at(-1).trim()) item.pop();
    const inside = rendered(item, depth + 1), isTight = !item.includes("");
    node.append(element("li", "", ...inside.flatMap((part) => (isTight && part.localName === "p" ? [...part.childNodes] : [part]))));
  }
  return node;
}

function table(lines) {
  const rows = lines.map((line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/));
  const sides = rows[1].map((mark) => (/: *$/.test(mark) ? (/^ *:/.test(mark) ? "center" : "right") : ""));
  const cell = (text, tag, at) => element(tag, sides[at], ...inline(text.trim().replaceAll("\\|", "|")));
  const row = (cells, tag) => element("tr", "", ...cells.slice(0, sides.length).map((text, at) => cell(text, tag, at)));
  const body = element("tbody", "", ...rows.slice(2).map((cells) => row(cells, "td")));
  const box = element("div", "table", element("table", "", element("thead", "", row(rows[0], "th")), body));
  box.tabIndex = 0;
  return box;
}

const whileAll = (test) => (lines, at) => {
  do at += 1; while (at < lines.length && test(lines[at], lines[at + 1]));
  return at;
};
// What a block begins with, where it ends, what becomes of its lines; the last one takes what no other does.
const KINDS = [
  { begins: (line) => FENCE.test(line), end: endOfFence, made: codeBlock },
  { begins: (line) => RULE.test(line), end: (_, at) => at + 1, made: () => element("hr") },
  { begins: (line) => HEADING.test(line), end: (_, at) => at + 1, made: heading },
  { begins: (line, _, depth) => depth < DEEPEST && QUOTE.test(line), end: whileAll((line) => QUOTE.test(line)),
    made: (lines, depth) => element("blockquote", "", ...rendered(lines.map((line) => line.replace(QUOTE, "")), depth + 1)) },
  { begins: (line, _, depth) => depth < DEEPEST && ITEM.test(line), end: endOfList, made: list },
  { begins: (line, next) => isTable([line, next]), end: whileAll((line) => line.includes("|")), made: table },
  { begins: () => true, end: whileAll((line, next) => line.trim() && kindOf(line, next) === PARAGRAPH),
    made: (lines) => element("p", "", ...inline(lines.map((line) => line.trim()).join("\n"))) },
];
const PARAGRAPH = KINDS.at(-1);
const kindOf = (line, next, depth = 0) => KINDS.find((kind) => kind.begins(line, next, depth));

// [kind, its lines] of each block; a fence still open at the end is a block already.
function blocks(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    const start = at, kind = lines[at].trim() ? kindOf(lines[at], lines[at + 1], depth) : null;
    at = kind ? kind.end(lines, at) : at + 1;
    if (kind) found.push([kind, lines.slice(start, at)]);
  }
  return found;
}

const rendered = (lines, depth) => blocks(lines, depth).map(([kind, own]) => kind.made(own, depth));

// A node that shows a growing text; blocks that have not changed keep their nodes.
export class Markdown {
  constructor(className) {
    this.node = element("div", `md ${className}`);
    this.sources = [];
  }

  show(text) {
    if (text === this.text) return;
    this.text = text;
    const even = text.replace(/\r\n/g, "\n").replace(/^\t+(?=[-*+] |\d+[.)] )/gm, (tabs) => "    ".repeat(tabs.length));
    const found = blocks(even.split("\n"), 0), sources = found.map(([, lines]) => lines.join("\n"));
    const same = sources.findIndex((source, at) => source !== this.sources[at]), kept = same < 0 ? sources.length : same;
    while (this.node.childNodes.length > kept) this.node.lastChild.remove();
    this.node.append(...found.slice(kept).map(([kind, lines]) => kind.made(lines, 0)));
    this.sources = sources;
  }
}
