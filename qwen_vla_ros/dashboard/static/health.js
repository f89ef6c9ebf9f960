// How late, how old, how well: latencies, ages, and what every node says of itself.

import { $, el, icon, LEVEL_ICONS, mark, milliseconds, say, seconds, show } from "/static/dom.js";

const PARTS = [
  ["image_age", "image age"], ["decode", "decode"], ["preprocess", "preprocess"], ["backbone", "backbone"],
  ["denoise", "denoise"], ["queue", "server queue"], ["transport", "transport"], ["inference", "look to chunk"],
  ["observation_to_chunk", "observation to chunk"],
];
const KIND_WORDS = { camera: "camera", state: "state", command: "command", policy: "" };

class Meter {
  constructor(name) {
    this.fill = el("span", { className: "fill" });
    this.tail = el("span", { className: "tail" });
    this.limit = el("span", { className: "limit", hidden: true });
    this.value = el("span", { className: "value" });
    this.element = el("div", { className: "meter" }, el("span", { className: "name" }, name),
      el("span", { className: "track" }, this.tail, this.fill, this.limit), this.value);
  }

  set(share, text, { tail = 0, limit = null, level = "ok" } = {}) {
    width(this.fill, share);
    width(this.tail, Math.max(share, tail));
    show(this.limit, limit !== null);
    if (limit !== null) this.limit.style.left = `${(100 * Math.min(1, limit)).toFixed(1)}%`;
    say(this.value, text);
    mark(this.element, "level", level);
  }
}

function width(element, share) {
  const text = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;
  if (element.style.width !== text) element.style.width = text;
}

export class Timing {
  constructor(about) {
    this.about = about;
    this.latency = new Map();
    this.ages = new Map();
    this.loop = { period: new Meter("period, 99 % within"), rate: new Meter("plan rate") };
    $("#loop").append(this.loop.period.element, this.loop.rate.element);
    this.none = el("p", { className: "hint" }, "No chunk has been made yet.");
    $("#latency").append(this.none);
  }

  update(state, sections) {
    if (sections.status) {
      this.policy(state.status.policy);
      this.controller(state.status.controller);
    }
    if (sections.ages) this.age(sections.ages.topics);
  }

  policy(policy) {
    const values = policy?.values ?? {};
    const found = PARTS.map(([key, name]) => [name, Number(values[`${key}_p50_ms`]), Number(values[`${key}_p95_ms`])])
      .filter(([, p50]) => Number.isFinite(p50));
    show(this.none, found.length === 0);
    const limit = this.about.max_observation_age_ms;
    const scale = Math.max(limit * 0.5, ...found.map(([, , p95]) => p95 * 1.1));
    for (const [name, p50, p95] of found) {
      if (!this.latency.has(name)) {
        this.latency.set(name, new Meter(name));
        $("#latency").append(this.latency.get(name).element);
      }
      const whole = name === "observation to chunk";
      this.latency.get(name).set(p50 / scale, `${milliseconds(p50)} · 95 % ${milliseconds(p95)}`,
        { tail: p95 / scale, limit: whole && limit <= scale ? limit / scale : null, level: whole && p95 > limit ? "warn" : "ok" });
    }
  }

  controller(controller) {
    const values = controller?.values ?? {};
    const wanted = 1000 / this.about.controller_rate_hz;
    const p99 = Number(values["period_ms.p99"]);
    if (Number.isFinite(p99)) {
      const late = p99 > 1.5 * wanted;
      this.loop.period.set(p99 / (3 * wanted), `${milliseconds(p99)} of ${milliseconds(wanted)}${late ? " · late" : ""}`,
        { limit: 1 / 3, level: late ? "warn" : "ok" });
    }
    const rate = Number(values.plan_rate);
    if (Number.isFinite(rate)) {
      this.loop.rate.set(rate, rate >= 0.999 ? "full speed" : `slowed to ${Math.round(100 * rate)} %`, { level: rate < 0.999 ? "warn" : "ok" });
    }
  }

  age(topics) {
    for (const row of topics) {
      const key = `${row.kind} ${row.topic}`;
      if (!this.ages.has(key)) {
        const meter = new Meter(`${KIND_WORDS[row.kind]} ${row.name}`.trim());
        meter.element.title = row.topic;
        this.ages.set(key, meter);
        $("#ages").append(meter.element);
      }
      const limit = row.limit_ms ?? 1000;
      const meter = this.ages.get(key);
      if (row.age_ms === null) {
        meter.set(0, row.publishers === 0 ? "no publisher" : "nothing heard", { level: row.limit_ms ? "warn" : "stale" });
      } else {
        const late = row.limit_ms !== null && row.age_ms > row.limit_ms;
        const word = row.publishers === 0 ? " · publisher gone" : late ? " · too old" : "";
        const rate = row.age_ms > 3000 ? "" : ` · ${row.hz.toFixed(row.hz < 10 ? 1 : 0)} Hz`;
        meter.set(row.age_ms / (1.5 * limit), `${milliseconds(row.age_ms)}${rate}${word}`,
          { limit: row.limit_ms === null ? null : 1 / 1.5, level: late ? "error" : row.publishers === 0 ? "warn" : "ok" });
      }
    }
  }
}

export class Nodes {
  constructor(silentS) {
    this.silentS = silentS;
    this.nodes = new Map();
  }

  update(state, sections) {
    for (const [name, status] of Object.entries(state.status ?? {})) {
      const node = this.node(name);
      const age = state.ages?.status?.[name];
      const silent = age !== undefined && age > this.silentS;
      const level = silent ? "stale" : status.level;
      if (node.level !== level) {
        node.level = level;
        mark(node.element, "level", level);
        node.symbol.replaceChildren(icon(LEVEL_ICONS[level] ?? "stale"), silent ? "silent" : level);
      }
      say(node.message, silent ? `silent for ${seconds(age)}; last: ${status.message}` : status.message);
      if (sections.status && node.element.open) this.table(node, status.values);
    }
  }

  node(name) {
    if (!this.nodes.has(name)) {
      const symbol = el("span", { className: "level" });
      const message = el("span", { className: "message" });
      const table = el("dl");
      const element = el("details", { "data-node": name }, el("summary", {}, symbol, el("b", {}, name), message), table);
      this.nodes.set(name, { element, symbol, message, table, level: "", values: new Map() });
      $("#nodes .list").append(element);
    }
    return this.nodes.get(name);
  }

  table(node, values) {
    for (const [key, value] of Object.entries(values)) {
      if (!node.values.has(key)) {
        const cell = el("dd");
        node.values.set(key, cell);
        node.table.append(el("dt", {}, key), cell);
      }
      say(node.values.get(key), value === "" ? "–" : value);
    }
  }
}
