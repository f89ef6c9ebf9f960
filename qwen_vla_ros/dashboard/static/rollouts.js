// Recorded episodes: their list, a film of each, and a label given afterwards.

import { $, el, icon, mark, OUTCOME_ICONS, say, seconds, show } from "/static/dom.js";
import { post } from "/static/link.js";
import { toast } from "/static/controls.js";

const EVERY_MS = 15000;
const ASK_AGAIN_MS = 500;
const WORDS = { success: "success", partial: "partial", failure: "failure", aborted: "aborted", unfinished: "unfinished" };

export class Rollouts {
  constructor(about) {
    this.about = about;
    this.rows = [];
    this.shown = "";
    this.items = new Map(); // name → its row as text, its element
    this.playing = "";
    this.editing = "";
    this.bags = "";
    this.askedAt = 0;
    for (const outcome of [...about.outcomes, "unfinished"]) $("#filter").append(el("option", { value: outcome }, outcome));
    $("#filter").addEventListener("change", () => this.draw(true));
    $("#close-film").addEventListener("click", () => this.close());
    $("#film").addEventListener("error", () => {
      if ($("#film").hasAttribute("src")) say($("#film-state"), "This browser cannot play the film.");
    });
    this.refresh();
  }

  update(state, sections) {
    const values = sections.status ? state.status.recorder?.values : undefined;
    const bags = values ? `${values.bags} ${values.state}` : this.bags;
    if (bags !== this.bags || (!document.hidden && performance.now() - this.askedAt > EVERY_MS)) {
      this.bags = bags;
      this.refresh();
    }
  }

  async refresh() {
    this.askedAt = performance.now();
    try {
      const answer = await fetch("/api/rollouts", { cache: "no-store" });
      if (!answer.ok) throw new Error(await answer.text());
      this.rows = await answer.json();
      this.draw();
    } catch (error) {
      say($("#tally"), `The list of rollouts cannot be read: ${error.message}`);
    }
  }

  draw(force = false) {
    const text = JSON.stringify(this.rows);
    if (!force && (text === this.shown || this.editing)) return;
    this.shown = text;
    const counts = new Map();
    for (const row of this.rows) counts.set(row.outcome, (counts.get(row.outcome) ?? 0) + 1);
    const parts = [...counts].map(([outcome, count]) => `${count} ${WORDS[outcome] ?? outcome}`);
    say($("#tally"), this.rows.length ? `${this.rows.length} recorded: ${parts.join(", ")}` : "Nothing has been recorded yet.");
    const wanted = $("#filter").value;
    const rows = this.rows.filter((row) => !wanted || row.outcome === wanted);
    const list = $("#rollouts .list");
    const wantedItems = rows.map((row) => this.item(row));
    const kept = new Set(wantedItems);
    for (const item of [...list.children]) if (!kept.has(item)) item.remove();
    // An element that is in its place is not touched: a focused button keeps the focus.
    wantedItems.forEach((item, index) => {
      if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
    });
  }

  item(row) {
    const text = JSON.stringify(row);
    const known = this.items.get(row.name);
    if (known?.text === text) return known.element;
    const element = this.row(row);
    this.items.set(row.name, { text, element });
    return element;
  }

  row(row) {
    const outcome = el("span", { className: "outcome" }, icon(OUTCOME_ICONS[row.outcome] ?? "stale"), row.recording ? "recording" : WORDS[row.outcome]);
    mark(outcome, "outcome", row.outcome);
    const facts = [
      row.name, when(row.started), row.seconds === null ? "" : seconds(row.seconds), size(row.size),
      row.seed === null ? "" : `seed ${row.seed}`, row.judged_by ? `by ${row.judged_by}` : "",
    ].filter(Boolean).join(" · ");
    const film = el("button", { type: "button", className: "film", disabled: row.recording || !row.readable, on: { click: () => this.open(row) } },
      icon("film"), "Film", el("span", { className: "sr" }, ` of ${row.name}`));
    const item = el("li", { "data-name": row.name },
      el("div", { className: "what" }, outcome, el("strong", {}, row.instruction || "(no instruction)")),
      el("p", { className: "facts" }, facts),
      row.note ? el("p", { className: "note" }, `“${row.note}”`) : "",
      row.reason ? el("p", { className: "hint" }, row.reason) : "",
      row.problem ? el("p", { className: "problem" }, row.problem) : "");
    const buttons = el("div", { className: "buttons" }, film);
    if (!this.about.read_only && !row.recording) {
      const change = el("button", { type: "button", className: "relabel" }, "Label …", el("span", { className: "sr" }, ` ${row.name}`));
      change.addEventListener("click", () => this.edit(item, row, change));
      buttons.append(change);
    }
    item.append(buttons);
    return item;
  }

  edit(item, row, button) {
    if (this.editing) return;
    this.editing = row.name;
    button.disabled = true;
    const id = "label-outcome";
    const select = el("select", { id }, ...this.about.outcomes.map((outcome) => el("option", { value: outcome, selected: outcome === row.outcome }, outcome)));
    const note = el("input", { id: "label-note", maxLength: 500, value: row.note, autocomplete: "off" });
    const form = el("form", { className: "label" },
      el("label", { htmlFor: id }, "Outcome"), select, el("label", { htmlFor: "label-note" }, "Note"), note,
      el("div", { className: "buttons" }, el("button", { className: "primary" }, "Save"),
        el("button", { type: "button", on: { click: () => this.done() } }, "Cancel")));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const answer = await post("/api/label", { name: row.name, outcome: select.value, note: note.value });
      toast(answer.ok, answer.message);
      if (answer.ok) this.done();
    });
    item.append(form);
    select.focus();
  }

  done() {
    this.items.delete(this.editing); // drawn anew, without the form
    this.editing = "";
    this.shown = "";
    this.refresh();
  }

  async open(row) {
    this.playing = row.name;
    const video = $("#film");
    video.removeAttribute("src");
    video.load();
    say($("#film-title"), `${row.name}: ${row.instruction || "(no instruction)"}`);
    say($("#film-state"), "Making the film …");
    show($("#player"), true);
    show(video, false);
    $("#player").scrollIntoView({ block: "nearest" });
    const address = `/api/rollouts/${row.name.split("/").map(encodeURIComponent).join("/")}/film`;
    while (this.playing === row.name) {
      const answer = await fetch(address, { method: "HEAD", cache: "no-store" }).catch(() => null);
      if (answer?.status === 200) {
        say($("#film-state"), "");
        show(video, true);
        video.src = `${address}?${Date.now()}`;
        video.play().catch(() => {}); // a browser may want a click first
        return;
      }
      if (answer?.status !== 202) {
        const told = await fetch(address, { cache: "no-store" }).then((reply) => reply.json()).catch(() => null);
        say($("#film-state"), told?.message ?? "The film cannot be had.");
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, ASK_AGAIN_MS));
    }
  }

  close() {
    this.playing = "";
    const video = $("#film");
    video.pause();
    video.removeAttribute("src");
    video.load();
    show($("#player"), false);
  }
}

function when(iso) {
  const time = new Date(iso);
  return Number.isNaN(time.getTime()) ? "" : time.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}
