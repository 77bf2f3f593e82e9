// How one message looks: the user's bubble, and an answer with its thinking, its text and its tool calls.
import { Markdown, button, codeFigure, copyButton, element } from "./markdown.js";

const count = new Intl.NumberFormat("en");
const seconds = (value) => (value < 60 ? `${value < 10 ? value.toFixed(1) : value.toFixed(0)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`);

// The small row under a message; `versions` are the messages beside this one, {at, all}.
function actionRow(buttons, versions, onChoose) {
  const row = element("div", "actions", ...buttons);
  if (versions.all.length < 2) return row;
  const here = versions.all.indexOf(versions.at);
  const step = (label, sign, name) => {
    const node = button(sign, () => onChoose(versions.all[here + name]));
    node.setAttribute("aria-label", label);
    node.disabled = versions.all[here + name] === undefined;
    return node;
  };
  const place = element("span", "", `${here + 1} of ${versions.all.length}`);
  row.append(element("span", "versions", step("Version before", "\u2039", -1), place, step("Next version", "\u203a", 1)));
  return row;
}

export function userTurn(node, versions, { onEdit, onChoose }) {
  const bubble = element("div", "bubble", node.content), turn = element("article", "user", bubble);
  turn.setAttribute("aria-label", "You");
  const edit = () => {
    const field = element("textarea", "bubble");
    field.value = node.content;
    field.setAttribute("aria-label", "Edit your message");
    const close = () => turn.replaceChildren(bubble, actions);
    const send = () => {
      if (field.value.trim()) onEdit(field.value);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
        actions.firstChild.focus();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    turn.replaceChildren(field, element("div", "actions shown", button("Send", send), button("Cancel", close)));
    field.rows = Math.min(12, node.content.split("\n").length + 1);
    field.focus();
  };
  const actions = actionRow([button("Edit", edit), copyButton(() => node.content)], versions, onChoose);
  turn.append(actions);
  return { turn, edit };
}

// An answer on show. `draw` brings the document up to the message, as often as it likes.
export class AnswerTurn {
  constructor(node, versions, { onAgain, onChoose, onResults }) {
    Object.assign(this, { node, versions, onAgain, onChoose, onResults, cards: [], results: new Map() });
    this.turn = element("article", "answer");
    this.turn.setAttribute("aria-label", "Answer");
    this.text = new Markdown("text");
    this.turn.append(this.text.node);
  }

  // `since` is when the answer under way was asked for (performance.now); without it the answer has ended.
  draw(since) {
    const { content, meta, tool_calls: calls = [] } = this.node, isLive = since !== undefined;
    this.turn.classList.toggle("busy", isLive);
    this.turn.classList.toggle("writing", isLive && !calls.length && Boolean(content || !this.node.reasoning_content));
    if (this.node.reasoning_content) this.drawThinking(isLive, since);
    this.text.show(content);
    calls.forEach((call, at) => this.drawCall(call, at, isLive));
    if (isLive) return;
    this.foot?.remove();
    this.foot = element("footer");
    if (calls.length) this.drawResults(calls);
    if (meta.error) {
      const problem = element("div", "problem", element("p", "", meta.error), button("Try again", this.onAgain, "quiet"));
      problem.setAttribute("role", "alert");
      this.foot.append(problem);
    }
    const again = button("Regenerate", this.onAgain);
    const actions = actionRow([copyButton(() => content || this.node.reasoning_content || ""), again], this.versions, this.onChoose);
    actions.append(element("span", "note", this.note()));
    this.foot.append(actions);
    this.turn.append(this.foot);
  }

  drawThinking(isLive, since) {
    const { content, meta, reasoning_content: thinking, tool_calls: calls } = this.node;
    const isOver = !isLive || Boolean(content || calls?.length);
    if (!this.fold) {
      this.label = element("summary");
      this.thought = new Markdown("thought");
      this.fold = element("details", "thinking", this.label, this.thought.node);
      this.fold.open = !isOver;
      this.label.addEventListener("click", () => { this.folded = true; }); // from now on as the reader has it
      this.fold.addEventListener("toggle", () => this.fold.open && this.thought.show(this.node.reasoning_content));
      this.turn.prepend(this.fold);
    }
    const time = isOver ? meta.thought : (performance.now() - since) / 1000;
    this.label.textContent = isOver ? (time ? `Thought for ${seconds(time)}` : "Thought") : `Thinking\u2026 ${Math.floor(time)} s`;
    this.fold.classList.toggle("live", !isOver);
    if (isOver && !this.wasOver && !this.folded) this.fold.open = false;
    this.wasOver = isOver;
    if (!this.fold.open) return;
    const box = this.thought.node, isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    this.thought.show(thinking);
    if (!isOver && isAtEnd) box.scrollTop = box.scrollHeight;
  }

  drawCall({ id, function: { name, arguments: written } }, at, isLive) {
    const card = this.cards[at] ??= this.newCard(name);
    const isDone = !isLive || at < this.node.tool_calls.length - 1, result = this.results.get(id);
    card.state.textContent = result !== undefined ? "answered" : isDone ? "wants a result" : "writing\u2026";
    if (card.shown === written + isDone) return;
    card.shown = written + isDone;
    let pretty = written;
    try {
      pretty = JSON.stringify(JSON.parse(written), null, 2);
    } catch { /* not whole yet, or cut: as it is */ }
    card.body.replaceChildren(codeFigure(pretty, "json"));
  }

  newCard(name) {
    const state = element("span", "state"), body = element("div");
    const card = element("details", "tool", element("summary", "", element("span", "name", name), state), body);
    card.open = true;
    this.turn.append(card);
    return { card, state, body };
  }

  // The results of calls: those that are there, or fields to type them in.
  drawResults(calls) {
    this.fields = new Map();
    calls.forEach(({ id, function: { name } }, at) => {
      const { card } = this.cards[at], result = this.results.get(id);
      card.querySelector(".result")?.remove();
      const body = result === undefined ? element("textarea") : element("pre", "", result);
      body.tabIndex = 0;
      if (result === undefined) Object.assign(body, { rows: 2, placeholder: "What the tool gives back" });
      if (result === undefined && this.onResults) this.fields.set(id, body);
      if (result === undefined && !this.onResults) return;
      card.append(element(result === undefined ? "label" : "div", "result", element("span", "", `Result of ${name}`), body));
    });
    if (!this.fields.size) return;
    const label = this.fields.size > 1 ? "Send results" : "Send result";
    this.foot.append(button(label, () => this.onResults(this.typed()), "primary"));
  }

  // [id, text] of each result typed so far.
  typed() {
    return [...(this.fields ?? [])].map(([id, field]) => [id, field.value || "(no output)"]);
  }

  note() {
    const { usage, speed, first, finish, wasCut } = this.node.meta, parts = [];
    if (wasCut) parts.push("cut off when the page closed");
    if (finish === "stopped") parts.push("stopped");
    if (finish === "length") parts.push("cut at the longest answer");
    if (usage) parts.push(`${count.format(usage.completion_tokens)} tokens`);
    if (speed) parts.push(`${speed < 10 ? speed.toFixed(1) : speed.toFixed(0)} tok/s`);
    if (first) parts.push(`first after ${seconds(first)}`);
    if (usage) parts.push(`prompt ${count.format(usage.prompt_tokens)}, ${count.format(usage.prompt_cache_hit_tokens || 0)} from cache`);
    return parts.join(" \u00b7 ");
  }
}
