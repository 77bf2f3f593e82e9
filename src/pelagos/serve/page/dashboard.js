// The dashboard: asks /stats each second while it is looked at, and draws what changed between two answers.
import { get } from "./api.js";
import { element } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const POINTS = 120; // seconds in a chart
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 }).format;
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format;
const rate = (value) => (value < 10 ? value.toFixed(1) : whole(value));
const share = (value) => `${value.toFixed(1)} %`;
const percent = (part, all) => (all > 0 ? (100 * part) / all : null);
const bytes = (value) => `${(value / 2 ** 20).toFixed(1)} MiB`;

// Title, point, its format, unit, small print, and the figure where that is not the point. `s` are the statistics,
// `per(name)` is a counter's change a second; a point of null draws nothing.
const CHARTS = [
  ["Generated", (s, per) => per("generated_tokens"), rate, () => "tok/s", (s) => `${short(s.generated_tokens)} tokens in all`],
  ["Prompts", (s, per) => per("computed_tokens"), rate, () => "tok/s", (s) => `${short(s.prompt_tokens)} tokens in all`],
  ["Steps", (s, per) => per("steps"), rate, () => "per s", (s) => `${rate(s.generated_tokens / (s.steps || 1))} tokens a step`],
  ["Running", (s) => s.requests_running, whole, () => "requests", (s) => `${whole(s.requests_done)} done`],
  ["Queue", (s) => s.requests_waiting, whole, () => "waiting", (s) => `${whole(s.preemptions)} preempted, ${whole(s.swaps)} swapped`],
  ["Prefix hits", (s, per) => percent(per("cached_tokens"), per("prompt_tokens")), share, () => "since the start",
    (s) => `${short(s.cached_tokens)} prompt tokens reused`, (s) => percent(s.cached_tokens, s.prompt_tokens)],
  ["Accepted drafts", (s, per) => percent(per("accepted_drafts"), per("drafted_tokens")), share, () => "since the start",
    (s) => `${short(s.accepted_drafts)} tokens`, (s) => percent(s.accepted_drafts, s.drafted_tokens)],
  ["Pages", (s) => s.pages_in_use, whole, (s) => `of ${whole(s.pages_total)}`,
    (s) => `${whole(s.pages_cached)} keep prefixes, ${whole(s.evicted_pages)} evicted`],
  ["Slots", (s) => s.slots_in_use, whole, (s) => `of ${whole(s.slots_total)}`, () => "sequences side by side"],
  ["Kept states", (s) => s.states_cached, whole, (s) => bytes(s.state_bytes_cached), (s) => `${whole(s.evicted_states)} evicted`],
].map(([title, ...spec]) => {
  const node = $("chart").content.cloneNode(true).firstElementChild;
  node.firstElementChild.textContent = node.querySelector("svg").ariaLabel = title;
  $("panels").append(node);
  return { title, spec, node, points: [] };
});
const TABLES = [["Disk cache", "disk"], ["Memory planned", "bytes_planned"]].map(([title, name]) => {
  const rows = element("table"), node = element("article", "panel", element("h2", "", title), rows);
  $("panels").append(node);
  return { node, rows, name };
});
let last = null; // {stats, at}
let timer = 0;

function drawChart({ title, spec: [now, format, unit, more, all], node, points }, stats, per) {
  const [, value, svg, hint] = node.children, point = now(stats, per), figure = all ? all(stats) : point;
  value.replaceChildren(figure === null ? "\u2013" : format(figure), element("small", "", unit(stats)));
  hint.textContent = more(stats);
  if (point === null) return;
  points.splice(0, points.push(point) - POINTS);
  const top = Math.max(...points, 1e-9) * 1.1, left = POINTS - points.length;
  const curve = points.map((at, index) => `${left + index} ${(39 - (38 * at) / top).toFixed(2)}`).join("L");
  svg.querySelector(".curve").setAttribute("d", `M${curve}`);
  svg.querySelector(".area").setAttribute("d", `M${left} 40L${curve}L${POINTS - 1} 40Z`);
  svg.ariaLabel = `${title}: now ${format(point)}, highest ${format(Math.max(...points))} in ${points.length} s`;
}

function drawTable({ node, rows, name }, stats) {
  const entries = Object.entries(stats[name] ?? {});
  node.hidden = !entries.length;
  rows.replaceChildren(...entries.map(([counter, value]) => {
    const head = element("th", "", counter.replaceAll("_", " "));
    head.scope = "row";
    return element("tr", "", head, element("td", "", (/bytes$/.test(counter) ? bytes : whole)(value)));
  }));
}

function say(state, text) {
  $("status").className = state;
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
}

async function tick() {
  clearTimeout(timer);
  if (document.hidden) {
    last = null;
    return say("", "paused");
  }
  try {
    const stats = await get("stats"), at = performance.now(), before = last;
    const per = (name) => before && (Math.max(0, stats[name] - before.stats[name]) / (at - before.at)) * 1000;
    for (const chart of CHARTS) drawChart(chart, stats, per);
    for (const table of TABLES) drawTable(table, stats);
    last = { stats, at };
    say("ready", `${stats.model}, up ${Math.floor(stats.uptime_seconds / 60)} min`);
  } catch (problem) {
    last = null;
    say("lost", problem.status === 401 ? `${problem.message} Give it in the settings of the chat.` : problem.message);
  }
  timer = setTimeout(tick, 1000);
}

document.addEventListener("visibilitychange", tick);
tick();
