// The chunk timeline: every chunk as a lane, what of it was executed, and one channel's curve through all of them.

import { $, el, say } from "/static/dom.js";

const PAST_S = 3;
const LANES = 5;
const LANE = 15; // px
const TOP = 20;
const CURVE = 120;

export class Chunks {
  constructor(about, onChannel) {
    this.about = about;
    this.canvas = $("#timeline");
    this.ahead = Math.max(0.6, about.horizon * about.period_s);
    this.data = null;
    this.now = 0;
    this.heardAt = 0;
    const select = $("#channel");
    this.onChannel = onChannel;
    this.travel = about.channels.map(() => 0);
    this.before = null;
    this.chosenAt = -8000;
    select.append(el("option", { value: "auto" }, "what moves most"));
    about.channels.forEach((channel, index) => select.append(el("option", { value: String(index) }, channel.name)));
    select.addEventListener("change", () => (select.value === "auto" ? this.follow(0) : onChannel(Number(select.value))));
    this.canvas.style.height = `${TOP + LANES * LANE + 12 + CURVE + 22}px`;
    this.wordsAt = 0;
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Shows the channel whose command has moved most, as a share of its range, lately; looked at every some seconds. */
  follow(everyMs) {
    if ($("#channel").value !== "auto" || performance.now() - this.chosenAt < everyMs) return;
    const most = this.travel.indexOf(Math.max(...this.travel));
    if (this.travel[most] < 0.02) return;
    this.chosenAt = performance.now();
    this.travel.fill(0);
    this.onChannel(most);
  }

  moved(command) {
    command.forEach((value, index) => {
      const [before, channel] = [this.before?.[index], this.about.channels[index]];
      if (value !== null && typeof before === "number") this.travel[index] += Math.abs(value - before) / (channel.upper - channel.lower || 1);
    });
    this.before = command;
    this.follow(8000);
  }

  update(state, sections) {
    if (sections.channels) this.moved(sections.channels.command);
    if (sections.timeline) this.data = sections.timeline;
    if (!sections.ages || !this.data) return;
    this.now = sections.ages.now;
    this.draw();
    if (performance.now() - this.wordsAt > 1000) {
      this.wordsAt = performance.now();
      const words = this.words();
      say($("#plan-words"), words);
      this.canvas.setAttribute("aria-label", `Timeline of action chunks. ${words}`);
    }
  }

  words() {
    const newest = this.data.chunks.at(-1);
    if (!newest) return "No chunk has arrived yet.";
    const size = newest.values.length;
    const age = this.now - newest.stamp;
    const late = 1000 * (newest.received - newest.stamp);
    const left = newest.stamp + size * newest.period - this.now;
    const rest = left > 0 ? `reaches ${left.toFixed(1)} s ahead` : `ended ${(-left).toFixed(1)} s ago`;
    const plan = this.data.plan ? "" : " The plan is empty: the robot holds.";
    return `Newest chunk: seen ${age.toFixed(1)} s ago, arrived ${late.toFixed(0)} ms after that, ` +
      `${newest.consumed} of ${size} actions consumed, ${rest}.${plan}`;
  }

  draw() {
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const paint = canvas.getContext("2d");
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.clearRect(0, 0, width, height);
    const colour = colours(canvas);
    const x = (t) => 4 + (width - 8) * (t - this.now + PAST_S) / (PAST_S + this.ahead);
    this.axis(paint, colour, x, width, height);
    if (!this.data) return;
    this.lanes(paint, colour, x);
    this.curves(paint, colour, x, width);
    paint.setLineDash([4, 3]);
    line(paint, colour.text, 1.2, [[x(this.now), 14], [x(this.now), height - 18]]);
    paint.setLineDash([]);
  }

  axis(paint, colour, x, width, height) {
    paint.font = "11px system-ui, sans-serif";
    paint.textBaseline = "alphabetic";
    paint.textAlign = "center";
    for (let second = -Math.floor(PAST_S); second <= this.ahead; second += 1) {
      const at = x(this.now + second);
      line(paint, colour.grid, 1, [[at, 14], [at, height - 18]]);
      paint.fillStyle = colour.muted;
      if (at > 16 && at < width - 16) paint.fillText(second === 0 ? "now" : `${second > 0 ? "+" : ""}${second} s`, at, height - 5);
    }
  }

  lanes(paint, colour, x) {
    const shown = this.data.chunks.slice(-LANES);
    shown.forEach((chunk, index) => {
      const newest = index === shown.length - 1;
      const y = TOP + index * LANE;
      const due = (action) => x(chunk.stamp + action * chunk.period);
      const end = chunk.values.length;
      paint.globalAlpha = newest ? 1 : 0.75;
      box(paint, newest ? colour.fresh : colour.old, due(0), y, due(end) - due(0), LANE - 5, newest);
      if (chunk.consumed > 0) {
        hatch(paint, newest ? colour.fresh : colour.used, due(0), y, due(chunk.consumed) - due(0), LANE - 5);
      }
      paint.globalAlpha = 1;
      // From the look (a dot) to the arrival (a bar): the time that the chunk was late by when it came.
      line(paint, colour.text, 1, [[x(chunk.stamp), y + 5], [x(chunk.received), y + 5]]);
      dot(paint, colour.text, x(chunk.stamp), y + 5, 2.2);
      line(paint, colour.text, 1.4, [[x(chunk.received), y], [x(chunk.received), y + LANE - 5]]);
    });
  }

  curves(paint, colour, x, width) {
    const { chunks, plan, measured, channel } = this.data;
    const about = this.about.channels[channel];
    const all = [...chunks.flatMap((chunk) => chunk.values), ...(plan?.values ?? []), ...measured.values];
    if (all.length === 0) return;
    const middle = (Math.min(...all) + Math.max(...all)) / 2;
    const half = Math.max((Math.max(...all) - Math.min(...all)) / 2, 0.02 * (about.upper - about.lower), 1e-3);
    const top = TOP + LANES * LANE + 12;
    const y = (value) => top + CURVE / 2 - (value - middle) / half * (CURVE / 2 - 6);
    paint.save();
    paint.beginPath();
    paint.rect(0, top, width, CURVE);
    paint.clip();
    for (const limit of [about.lower, about.upper]) {
      paint.setLineDash([2, 3]);
      line(paint, colour.danger, 1.2, [[0, y(limit)], [width, y(limit)]]);
      paint.setLineDash([]);
    }
    chunks.forEach((chunk, index) => {
      const newest = index === chunks.length - 1;
      const points = chunk.values.map((value, i) => [x(chunk.stamp + (i + 1) * chunk.period), y(value)]);
      line(paint, newest ? colour.fresh : colour.old, newest ? 2 : 1, points);
      for (const point of points.slice(0, chunk.consumed)) dot(paint, newest ? colour.fresh : colour.used, ...point, newest ? 2.6 : 1.8);
    });
    if (plan) {
      const period = chunks.at(-1)?.period ?? this.about.period_s;
      paint.setLineDash([6, 3]);
      line(paint, colour.plan, 2, plan.values.map((value, i) => [x(plan.t + i * period), y(value)]));
      paint.setLineDash([]);
    }
    line(paint, colour.measured, 2, measured.t.map((t, i) => [x(t), y(measured.values[i])]));
    paint.restore();
    caption(paint, colour, `${about.name}  ${(middle + half).toFixed(2)} ${about.unit}`, 4, top + 10);
    caption(paint, colour, `${(middle - half).toFixed(2)} ${about.unit}`, 4, top + CURVE - 3);
  }
}

function colours(element) {
  const style = getComputedStyle(element);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    text: read("text"), muted: read("muted"), grid: read("grid"), fresh: read("accent"), old: read("old"), used: read("used"),
    card: read("card"), plan: read("plan"), measured: read("measured"), danger: read("danger"),
  };
}

function line(paint, colour, width, points) {
  if (points.length < 2) return;
  paint.strokeStyle = colour;
  paint.lineWidth = width;
  paint.lineJoin = "round";
  paint.beginPath();
  points.forEach(([x, y], index) => (index ? paint.lineTo(x, y) : paint.moveTo(x, y)));
  paint.stroke();
}

/** Text that can be read over lines. */
function caption(paint, colour, text, x, y) {
  paint.textAlign = "left";
  paint.fillStyle = colour.card;
  paint.fillRect(x - 2, y - 10, paint.measureText(text).width + 4, 13);
  paint.fillStyle = colour.muted;
  paint.fillText(text, x, y);
}

function dot(paint, colour, x, y, radius) {
  paint.fillStyle = colour;
  paint.beginPath();
  paint.arc(x, y, radius, 0, 7);
  paint.fill();
}

function box(paint, colour, x, y, width, height, strong) {
  paint.strokeStyle = colour;
  paint.lineWidth = strong ? 2 : 1.2;
  paint.strokeRect(x, y, Math.max(1, width), height);
}

/** Filled with a slant, so that "consumed" does not hang on a colour. */
function hatch(paint, colour, x, y, width, height) {
  paint.save();
  paint.beginPath();
  paint.rect(x, y, width, height);
  paint.clip();
  paint.globalAlpha *= 0.35;
  paint.fillStyle = colour;
  paint.fillRect(x, y, width, height);
  paint.globalAlpha /= 0.35;
  paint.strokeStyle = colour;
  paint.lineWidth = 1.4;
  paint.beginPath();
  const first = Math.floor((x - height) / 6) * 6;
  for (let at = first; at < x + width; at += 6) {
    paint.moveTo(at, y + height);
    paint.lineTo(at + height, y);
  }
  paint.stroke();
  paint.restore();
}
