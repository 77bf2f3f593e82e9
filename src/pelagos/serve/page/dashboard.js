// The dashboard: asks /stats each second while it is looked at, and draws what changed between two answers.
import { get, setKey } from "./api.js";
import { element } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const POINTS = 120; // seconds in a chart
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const rate = (value) => (value < 10 ? value.toFixed(1) : whole.format(value));
const percent = (part, all) => (all > 0 ? (100 * part) / all : null);
const share = (value) => (value === null ? "\u2013" : `${value.toFixed(value < 99.95 && value > 0 ? 1 : 0)} %`);
const words = (name) => name.replaceAll("_", " ");
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

function bytes(value) {
  let unit = 0;
  for (; value >= 1024 && unit < UNITS.length - 1; unit += 1) value /= 1024;
  return `${unit ? value.toFixed(1) : value} ${UNITS[unit]}`;
}

// Title -> {now(stats, per), show(value), more(stats)}; `per(name)` is a counter's change a second.
const CHARTS = {
  "Generated": { unit: "tok/s", now: (_, per) => per("generated_tokens"), show: rate, more: (s) => `${short.format(s.generated_tokens)} tokens in all` },
  "Prompts computed": { unit: "tok/s", now: (_, per) => per("computed_tokens"), show: rate, more: (s) => `${short.format(s.computed_tokens)} of ${short.format(s.prompt_tokens)} tokens` },
  "Steps": { unit: "per s", now: (_, per) => per("steps"), show: rate, more: (s) => (s.steps ? `${(s.generated_tokens / s.steps).toFixed(2)} tokens a step` : "none yet") },
  "Requests running": { now: (s) => s.requests_running, show: whole.format, more: (s) => `${whole.format(s.requests_done)} done` },
  "Queue": { unit: "waiting", now: (s) => s.requests_waiting, show: whole.format, more: (s) => `${whole.format(s.preemptions)} preempted, ${whole.format(s.swaps)} of them swapped` },
  "Prefix hits": { now: (_, per) => percent(per("cached_tokens"), per("prompt_tokens")), holds: true, all: (s) => percent(s.cached_tokens, s.prompt_tokens), show: share, more: (s) => `${short.format(s.cached_tokens)} prompt tokens reused` },
  "Accepted drafts": { now: (_, per) => percent(per("accepted_drafts"), per("drafted_tokens")), holds: true, all: (s) => percent(s.accepted_drafts, s.drafted_tokens), show: share, more: (s) => (s.drafted_tokens ? `${short.format(s.accepted_drafts)} of ${short.format(s.drafted_tokens)} tokens` : "no drafts") },
};
const POOLS = {
  "Pages": (s) => [s.pages_in_use, s.pages_total, `${whole.format(s.pages_cached)} more keep prefixes, ${whole.format(s.evicted_pages)} evicted`],
  "Slots": (s) => [s.slots_in_use, s.slots_total, "sequences that can run side by side"],
  "Kept states": (s) => [s.states_cached, null, `${bytes(s.state_bytes_cached)}, ${whole.format(s.evicted_states)} evicted`],
};

class Chart {
  constructor(title, { unit = "" }) {
    this.node = $("chart").content.cloneNode(true).firstElementChild;
    [this.heading, this.value, this.svg, this.hint] = this.node.children;
    this.heading.textContent = this.title = title;
    this.number = element("span");
    this.value.append(this.number, element("small", "", unit));
    this.points = [];
    $("charts").append(this.node);
  }

  add(point, text, more) {
    this.points = [...this.points, point].slice(-POINTS);
    this.number.textContent = text;
    this.hint.textContent = more;
    const top = Math.max(...this.points, 1e-9) * 1.1, left = POINTS - this.points.length;
    const curve = this.points.map((value, at) => `${left + at} ${(39 - (38 * value) / top).toFixed(2)}`).join("L");
    this.svg.querySelector(".curve").setAttribute("d", `M${curve}`);
    this.svg.querySelector(".area").setAttribute("d", `M${left} 40L${curve}L${POINTS - 1} 40Z`);
    this.svg.setAttribute("aria-label", `${this.title}: now ${text}, highest ${rate(Math.max(...this.points))} in ${this.points.length} s`);
  }
}

const charts = Object.entries(CHARTS).map(([title, spec]) => [new Chart(title, spec), spec]);
let last = null; // {stats, at}
let timer = 0;

function draw(stats, at) {
  const span = last && stats.uptime_seconds >= last.stats.uptime_seconds ? (at - last.at) / 1000 : 0;
  const per = (name) => (span ? (stats[name] - last.stats[name]) / span : 0);
  for (const [chart, { now, all, holds, show, more }] of charts) {
    const value = now(stats, per) ?? (holds ? chart.points.at(-1) : null) ?? 0;
    chart.add(value, show(all ? all(stats) : value), more(stats));
  }
  $("pools").replaceChildren(...Object.entries(POOLS).flatMap(([title, pool]) => {
    const [used, total, more] = pool(stats);
    if (total === 0) return [];
    const parts = [element("h2", "", title), element("p", "value", whole.format(used))];
    if (total) {
      const meter = element("meter");
      Object.assign(meter, { max: total, high: total * 0.9, value: used, ariaLabel: `${title} in use` });
      parts[1].append(element("small", "", `of ${whole.format(total)}`));
      parts.push(meter);
    }
    return [element("article", "panel", ...parts, element("p", "hint", more))];
  }));
  const table = (title, values, format) => {
    const rows = Object.entries(values ?? {}).map(([name, value]) => {
      const head = element("th", "", words(name));
      head.scope = "row";
      return element("tr", "", head, element("td", "", (format ?? (/bytes/.test(name) ? bytes : whole.format))(value)));
    });
    return rows.length ? [element("article", "panel", element("h2", "", title), element("table", "", element("tbody", "", ...rows)))] : [];
  };
  $("tables").replaceChildren(...table("Disk cache", stats.disk), ...table("Memory planned", stats.bytes_planned, bytes));
  last = { stats, at };
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
  const begun = performance.now();
  try {
    const stats = await get("stats");
    draw(stats, performance.now());
    const minutes = Math.floor(stats.uptime_seconds / 60);
    say(stats.status ?? "ready", `${stats.model}, up ${minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`}`);
    $("key-form").hidden = true;
  } catch (problem) {
    last = null;
    say("lost", problem.message);
    if (problem.status === 401) $("key-form").hidden = false;
  }
  timer = setTimeout(tick, Math.max(200, 1000 - (performance.now() - begun)));
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  tick();
});
document.addEventListener("visibilitychange", tick);
tick();
