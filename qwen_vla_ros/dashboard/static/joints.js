// Every channel between its limits: what is commanded (a line), what is measured (a bar).

import { $, el, mark, say } from "/static/dom.js";

const NEAR = 0.01; // of the range: so near a limit it is said

export class Joints {
  constructor(channels) {
    this.rows = [];
    const groups = new Map();
    for (const channel of channels) {
      const bar = el("span", { className: "fill" });
      const line = el("span", { className: "command" });
      const zero = el("span", { className: "zero" });
      const value = el("span", { className: "value" });
      const tag = el("span", { className: "tag" });
      const track = el("span", { className: "track", title: `${channel.lower} … ${channel.upper} ${channel.unit}` }, zero, bar, line);
      const row = el("div", { className: "joint" }, el("span", { className: "name" }, channel.name), track, value, tag);
      place(zero, share(channel, 0));
      if (!groups.has(channel.group)) groups.set(channel.group, []);
      groups.get(channel.group).push(row);
      this.rows.push({ channel, bar, line, value, tag, row });
    }
    for (const [name, rows] of groups) {
      $("#joints .groups").append(el("div", { className: "group" }, el("h3", {}, name), ...rows));
    }
  }

  update(_state, sections) {
    if (!sections.channels) return;
    const { command, measured } = sections.channels;
    this.rows.forEach(({ channel, bar, line, value, tag, row }, index) => {
      const [told, is] = [command[index], measured[index]];
      line.hidden = told === null;
      if (told !== null) place(line, share(channel, told));
      bar.hidden = is === null;
      if (is !== null) span(bar, share(channel, 0), share(channel, is));
      const shown = is ?? told;
      say(value, shown === null ? "–" : `${shown.toFixed(3)} ${channel.unit}`);
      const limit = [told, is].map((number) => atLimit(channel, number)).find(Boolean) ?? "";
      say(tag, limit);
      mark(row, "limit", limit ? "yes" : "no");
    });
  }
}

function share(channel, value) {
  const range = channel.upper - channel.lower || 1;
  return Math.min(1, Math.max(0, (value - channel.lower) / range));
}

function place(element, at) {
  const left = `${(100 * at).toFixed(1)}%`;
  if (element.style.left !== left) element.style.left = left;
}

/** A bar from zero (or the limit nearest to it) to the value. */
function span(element, from, to) {
  place(element, Math.min(from, to));
  const width = `${Math.max(0.8, 100 * Math.abs(to - from)).toFixed(1)}%`;
  if (element.style.width !== width) element.style.width = width;
}

/** Fingers are at a limit whenever they are open or closed: that is no news. */
function atLimit(channel, value) {
  if (value === null || channel.kind === "gripper" || channel.kind === "hand" || channel.upper - channel.lower <= 0) return "";
  const near = NEAR * (channel.upper - channel.lower);
  if (value >= channel.upper - near) return "at upper limit";
  if (value <= channel.lower + near) return "at lower limit";
  return "";
}
