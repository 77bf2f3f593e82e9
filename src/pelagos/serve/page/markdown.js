// Markdown to DOM nodes: text of a model becomes text nodes and the elements made here, nothing else.
const FENCE = /^ *(`{3,}|~{3,}) *([^`\s]*)(?:\s[^`]*)?$/;
const HEADING = /^ {0,3}(#{1,6}) +(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +(?=\S)|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const DEEPEST = 8; // of lists and quotes; what is deeper is plain text
const INLINE = new RegExp([
  String.raw`(?<math>\$\$[^]{1,1000}?\$\$|\\\([^]{1,500}?\\\)|\\\[[^]{1,1000}?\\\]|\$(?=[^$\n]{0,200}[\\^_])[^$\n]{1,200}\$)`,
  String.raw`\\(?<escaped>[!-\/:-@[-\x60{-~])`,
  String.raw`(?<!\x60)(?<ticks>\x60{1,8})(?!\x60)(?<code>[^]{1,2000}?)(?<!\x60)\k<ticks>(?!\x60)`,
  String.raw`!?\[(?<label>(?:[^\[\]\\]|\\.|\[[^\[\]]{0,200}\]){0,1000})\]\( *(?<target>[^\s()]{1,2000}(?:\([^\s()]{0,500}\)[^\s()]{0,500}){0,3})(?: +"[^"]{0,500}")? *\)`,
  String.raw`<(?<auto>(?:https?:|mailto:)[^\s<>]{1,2000})>`,
  String.raw`(?<!\w)(?<bare>https?:\/\/[^\s<>"\x60|*]{1,2000})`,
  String.raw`\*\*\*(?!\s)(?<both>[^*]{1,1000}?)(?<!\s)\*\*\*`,
  String.raw`\*\*(?!\s)(?<strong>(?:\*[^*]{1,500}\*|[^*]){1,1000}?)(?<!\s)\*\*`,
  String.raw`(?<!\w)__(?!\s)(?<strong2>(?:[^_]|_(?!_)){1,1000}?)(?<!\s)__(?!\w)`,
  String.raw`\*(?![\s*])(?<em>(?:\*\*[^*]{1,500}\*\*|[^*]){1,1000}?)(?<!\s)\*(?!\*)`,
  String.raw`(?<!\w)_(?![\s_])(?<em2>(?:[^_]|(?<=\w)_(?=\w)){1,1000}?)(?<!\s)_(?!\w)`,
  String.raw`~~(?!\s)(?<del>[^~]{1,1000}?)~~`,
].join("|"), "g");
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

export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text); // absent on plain http from elsewhere
  const field = element("textarea", "sr");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

export function copyButton(text) {
  return button("Copy", async (event) => {
    const node = event.currentTarget;
    await copy(text());
    node.textContent = "Copied";
    setTimeout(() => { node.textContent = "Copy"; }, 1500);
  });
}

// --- lines ------------------------------------------------------------------------------------------------------

function link(target, children) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(target)) return element("span", "", ...children);
  const node = element("a", "", ...children);
  Object.assign(node, { href: target, title: target, target: "_blank", rel: "noopener noreferrer" });
  return node;
}

function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    const part = found.groups;
    if (found.index > at) nodes.push(text.slice(at, found.index));
    at = found.index + found[0].length;
    const tag = Object.keys(TAGS).find((name) => part[name] !== undefined);
    if (tag) nodes.push(element(TAGS[tag], "", ...inline(part[tag], depth + 1)));
    else if (part.both) nodes.push(element("strong", "", element("em", "", ...inline(part.both, depth + 1))));
    else if (part.code) nodes.push(element("code", "", part.code.replace(/^ (.*\S.*) $/s, "$1")));
    else if (part.math) nodes.push(element("span", "math", part.math));
    else if (part.escaped) nodes.push(part.escaped);
    else if (part.target) nodes.push(link(part.target, inline(part.label || part.target, depth + 1)));
    else if (part.auto) nodes.push(link(part.auto, [part.auto]));
    else {
      let url = part.bare; // punctuation after an address is not of it
      while (/[.,;:!?'\])]$/.test(url) && !(url.endsWith(")") && url.split("(").length >= url.split(")").length)) url = url.slice(0, -1);
      nodes.push(link(url, [url]), part.bare.slice(url.length));
    }
  }
  return [...nodes, text.slice(at)];
}

// --- code -------------------------------------------------------------------------------------------------------

const PLAIN = /^(|text|txt|plain|plaintext|markdown|md|output|log|diff)$/;
const COMMENTS = [
  [/^(py|python|sh|bash|zsh|shell|console|rb|ruby|ya?ml|toml|r|perl|make(file)?|dockerfile|ini|conf|elixir|julia)$/, "#[^\\n]*"],
  [/^(sql|lua|haskell|hs|ada|elm)$/, "--[^\\n]*"],
  [/^(html|xml|svg|vue)$/, "<!--[^]*?(?:-->|$)"],
  [/^json$/, "(?!)"],
  [/./, "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)"],
];
const KEYWORDS = new Set((
  "abstract and as assert async await begin bool break case catch char class const continue create def default defer " +
  "del delete do double elif else end enum except export extends false final finally float fn for from func function " +
  "global go group if impl implements import in insert instanceof int interface into is join lambda let local long " +
  "loop match module mut namespace new nil none nonlocal not null nullptr of or order package pass private protected " +
  "pub public raise return select self set static string struct super switch table then this throw throws trait true " +
  "try type typedef typeof union unsafe until update use using values var virtual void when where while with yield"
).split(" "));

export function coloured(code, language) {
  language = language.toLowerCase();
  if (PLAIN.test(language) || code.length > 30000) return [code];
  const comment = COMMENTS.find(([names]) => names.test(language))[1];
  const text = String.raw`"""[^]*?(?:"""|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|\x60(?:[^\x60\\]|\\[^])*\x60?`;
  const parts = new RegExp(`(${comment})|(${text})|\\b(\\d[\\w.]*)|\\b([A-Za-z_]\\w*)`, "g");
  const nodes = [];
  let at = 0;
  for (const found of code.matchAll(parts)) {
    const kind = found[1] ? "c" : found[2] ? "s" : found[3] ? "n" : KEYWORDS.has(found[4].toLowerCase()) ? "k" : "";
    if (!kind) continue;
    nodes.push(code.slice(at, found.index), element("span", kind, found[0]));
    at = found.index + found[0].length;
  }
  return [...nodes, code.slice(at)];
}

function codeBlock(lines) {
  const [, ticks, language] = lines[0].match(FENCE), indent = lines[0].search(/\S/);
  const isClosed = lines.length > 1 && closes(lines.at(-1), ticks);
  const code = lines.slice(1, isClosed ? -1 : undefined).map((line) => line.slice(Math.min(indent, line.search(/\S|$/)))).join("\n");
  return codeFigure(code, language);
}

export function codeFigure(code, language) {
  const block = element("pre", "", element("code", "", ...coloured(code, language)));
  block.tabIndex = 0;
  return element("figure", "code", element("figcaption", "", element("span", "", language || "text"), copyButton(() => code)), block);
}

// --- blocks -----------------------------------------------------------------------------------------------------

const closes = (line, ticks) => line.trim().length >= ticks.length && !line.trim().replaceAll(ticks[0], "");
const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].length < 2000 && TABLE_RULE.test(lines[at + 1]);
const opens = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);

function endOfFence(lines, at) {
  const ticks = lines[at].match(FENCE)[1];
  for (at += 1; at < lines.length; at += 1) if (closes(lines[at], ticks)) return at + 1;
  return at;
}

function endOfList(lines, at) {
  const [, indent, mark] = lines[at].match(ITEM), isOrdered = mark.length > 1;
  for (at += 1; at < lines.length; at += 1) {
    const line = lines[at], item = line.match(ITEM);
    if (!line.trim()) continue;
    if (line.search(/\S/) >= indent.length + 2) {
      if (FENCE.test(line)) at = endOfFence(lines, at) - 1;
    } else if (RULE.test(line) || (item ? item[2].length > 1 !== isOrdered : opens(line) || !lines[at - 1].trim())) break;
  }
  while (!lines[at - 1].trim()) at -= 1;
  return at;
}

// Yields {kind, lines} of each block; a fence still open at the end is a block already.
function* blocks(lines) {
  for (let at = 0, start = 0; at < lines.length; start = at) {
    const line = lines[at];
    at += 1;
    let kind = "p";
    if (!line.trim()) continue;
    if (FENCE.test(line)) [kind, at] = ["code", endOfFence(lines, start)];
    else if (RULE.test(line)) kind = "rule";
    else if (HEADING.test(line)) kind = "heading";
    else if (QUOTE.test(line)) {
      kind = "quote";
      while (at < lines.length && QUOTE.test(lines[at])) at += 1;
    } else if (ITEM.test(line)) [kind, at] = ["list", endOfList(lines, start)];
    else if (isTable(lines, start)) {
      kind = "table";
      while (at < lines.length && lines[at].includes("|")) at += 1;
    } else while (at < lines.length && lines[at].trim() && !opens(lines[at]) && !ITEM.test(lines[at]) && !isTable(lines, at)) at += 1;
    yield { kind, lines: lines.slice(start, at) };
  }
}

function list(lines, depth) {
  const [, indent, mark] = lines[0].match(ITEM);
  const node = element(mark.length > 1 ? "ol" : "ul");
  if (mark.length > 1) node.start = parseInt(mark, 10);
  const items = [];
  for (let at = 0; at < lines.length; at += 1) {
    const line = lines[at], found = line.match(ITEM), inside = line.search(/\S|$/);
    if (found && inside < indent.length + 2) items.push([line.slice(found[0].length)]);
    else {
      const end = FENCE.test(line) ? endOfFence(lines, at) : at + 1;
      const cut = found || FENCE.test(line) ? indent.length + 2 : inside;
      for (; at < end; at += 1) items.at(-1).push(lines[at].slice(Math.min(cut, lines[at].search(/\S|$/))));
      at -= 1;
    }
  }
  for (const item of items) {
    while (item.length > 1 && !item.at(-1).trim()) item.pop();
    const box = item[0].match(/^\[([ xX])\] /);
    if (box) item[0] = `${box[1] === " " ? "\u2610" : "\u2611"} ${item[0].slice(4)}`;
    node.append(element("li", "", ...rendered(item, depth + 1, !item.includes(""))));
  }
  return node;
}

function table(lines) {
  const rows = lines.map((line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|")));
  const sides = rows[1].map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (cells, tag) => element("tr", "", ...cells.slice(0, sides.length).map((cell, at) => element(tag, sides[at], ...inline(cell))));
  const body = element("tbody", "", ...rows.slice(2).map((cells) => row(cells, "td")));
  const box = element("div", "table", element("table", "", element("thead", "", row(rows[0], "th")), body));
  box.tabIndex = 0; // it may scroll
  return box;
}

function built({ kind, lines }, depth) {
  if (kind === "code") return codeBlock(lines);
  if (kind === "rule") return element("hr");
  if (kind === "table") return table(lines);
  if (kind === "heading") {
    const [, marks, title] = lines[0].match(HEADING);
    return element(`h${Math.min(6, marks.length + 2)}`, "", ...inline(title.replace(/ +#+ *$/, "")));
  }
  if (kind === "list" && depth < DEEPEST) return list(lines, depth);
  if (kind === "quote" && depth < DEEPEST) {
    return element("blockquote", "", ...rendered(lines.map((line) => line.replace(QUOTE, "")), depth + 1));
  }
  return element("p", "", ...inline(lines.map((line) => line.trim()).join("\n")));
}

function rendered(lines, depth, isTight = false) {
  return [...blocks(lines)].flatMap((block) => {
    const node = built(block, depth);
    return isTight && block.kind === "p" ? [...node.childNodes] : [node];
  });
}

// A node that shows a growing text; blocks that have not changed keep their nodes.
export class Markdown {
  constructor(className) {
    this.node = element("div", `md ${className}`);
    this.text = "";
    this.sources = [];
  }

  show(text) {
    if (text === this.text) return;
    this.text = text;
    const even = text.replaceAll("\r\n", "\n").replace(/^\t+(?=[-*+] |\d+[.)] )/gm, (tabs) => "    ".repeat(tabs.length));
    const found = [...blocks(even.split("\n"))];
    const sources = found.map(({ lines }) => lines.join("\n"));
    const same = sources.findIndex((source, at) => source !== this.sources[at]);
    const kept = same < 0 ? sources.length : same;
    while (this.node.childNodes.length > kept) this.node.lastChild.remove();
    this.node.append(...found.slice(kept).map((block) => built(block, 0)));
    this.sources = sources;
  }
}
