// How one message looks: the user's bubble, and an answer with its thinking, its text and its tool calls.
import { Markdown, button, codeFigure, copyButton, element } from "./markdown.js";

const count = new Intl.NumberFormat("en").format;
const rounded = (value) => value.toFixed(value < 10 ? 1 : 0);
const seconds = (value) => (value < 60 ? `${rounded(value)} s` : `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`);

// The small row under a message; `versions` are the messages beside it: {at, all, choose}.
function actionRow(buttons, { at, all, choose }) {
  const here = all.indexOf(at);
  const step = (ariaLabel, sign, other) =>
    Object.assign(button(sign, () => choose(other)), { ariaLabel, disabled: other === undefined });
  const place = [step("Version before", "\u2039", all[here - 1]), element("span", "", `${here + 1} of ${all.length}`),
    step("Next version", "\u203a", all[here + 1])];
  return element("div", "actions", ...buttons, ...(all.length > 1 ? [element("span", "versions", ...place)] : []));
}

export function userTurn(node, versions, onEdit) {
  const actions = actionRow([button("Edit", onEdit), copyButton(() => node.content)], versions);
  return Object.assign(element("article", "user", element("div", "bubble", node.content), actions), { ariaLabel: "You" });
}

// An answer on show. `draw` brings the document up to the message, as often as it likes, and once when the answer has
// ended; `results` are those of its calls by id, and the user can type what is missing.
export class AnswerTurn {
  constructor(node, versions, { onAgain, onResults }) {
    Object.assign(this, { node, versions, onAgain, onResults, cards: [], shown: [], results: new Map(), fields: new Map() });
    this.text = new Markdown("text");
    this.turn = Object.assign(element("article", "answer", this.text.node), { ariaLabel: "Answer" });
  }

  // `since` is when the answer under way was asked for (performance.now); without it the answer has ended.
  draw(since) {
    const { content, meta, tool_calls: calls = [] } = this.node, isLive = since !== undefined;
    this.turn.classList.toggle("busy", isLive);
    if (this.node.reasoning_content) this.drawThinking(isLive && !content && !calls.length, since);
    this.text.show(content);
    calls.forEach((call, at) => this.drawCall(call, at, isLive && at === calls.length - 1));
    if (isLive) return;
    const foot = element("footer"), again = button("Regenerate", this.onAgain);
    for (const [at, { id, function: { name } }] of calls.entries()) this.drawResult(this.cards[at], id, name);
    if (this.fields.size) foot.append(button("Send results", () => this.onResults(this.typed()), "primary"));
    if (meta.error) {
      foot.append(element("div", "problem", element("p", "", meta.error), button("Try again", this.onAgain, "quiet")));
    }
    const actions = actionRow([copyButton(() => content || this.node.reasoning_content), again], this.versions);
    actions.append(element("span", "note", this.note()));
    foot.append(actions);
    this.turn.append(foot);
  }

  drawThinking(isLive, since) {
    if (!this.fold) {
      this.thought = new Markdown("thought");
      this.fold = element("details", "thinking", element("summary"), this.thought.node);
      this.turn.prepend(this.fold);
    }
    const { thought } = this.node.meta, box = this.thought.node;
    const over = thought ? `Thought for ${seconds(thought)}` : "Thought";
    this.fold.firstChild.textContent = isLive ? `Thinking\u2026 ${Math.floor((performance.now() - since) / 1000)} s` : over;
    if (isLive !== this.wasLive) this.fold.open = isLive; // once each; else as the reader has it
    this.wasLive = isLive;
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    this.thought.show(this.node.reasoning_content);
    if (isLive && isAtEnd) box.scrollTop = box.scrollHeight;
  }

  drawCall({ id, function: { name, arguments: written } }, at, isLive) {
    if (!this.cards[at]) {
      const summary = element("summary", "", element("span", "name", name), element("span", "state"));
      this.cards[at] = element("details", "tool", summary, element("div"));
      this.cards[at].open = true;
      this.turn.append(this.cards[at]);
    }
    let pretty = written;
    try {
      pretty = JSON.stringify(JSON.parse(written), null, 2);
    } catch { /* not whole yet, or cut: as it is */ }
    const [summary, body] = this.cards[at].children;
    summary.lastChild.textContent = this.results.has(id) ? "answered" : isLive ? "writing\u2026" : "wants a result";
    if (this.shown[at] !== written) body.replaceChildren(codeFigure(pretty, "json"));
    this.shown[at] = written;
  }

  drawResult(card, id, name) {
    const result = this.results.get(id), field = result === undefined ? element("textarea") : element("pre", "", result);
    if (result === undefined && this.node.meta.finish !== "tool_calls") return; // the call was cut
    if (result === undefined) this.fields.set(id, field);
    field.tabIndex = 0;
    card.append(element(result === undefined ? "label" : "div", "result", `Result of ${name}`, field));
  }

  // [id, text] of each result typed so far.
  typed() {
    return [...this.fields].map(([id, field]) => [id, field.value || "(no output)"]);
  }

  note() {
    const { usage, speed, first, finish } = this.node.meta, parts = [];
    if (["stopped", "cut off when the page closed"].includes(finish)) parts.push(finish);
    if (finish === "length") parts.push("cut at the longest answer");
    if (usage) parts.push(`${count(usage.completion_tokens)} tokens`);
    if (speed) parts.push(`${rounded(speed)} tok/s`);
    if (first) parts.push(`first after ${seconds(first)}`);
    if (usage) parts.push(`prompt ${count(usage.prompt_tokens)}, ${count(usage.prompt_cache_hit_tokens || 0)} from cache`);
    return parts.join(" \u00b7 ");
  }
}
