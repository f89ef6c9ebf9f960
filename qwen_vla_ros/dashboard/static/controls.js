// The buttons. Every press is answered by the node it reached, and the answer is shown.

import { $, $$, el, say, show } from "/static/dom.js";
import { post } from "/static/link.js";

const NOTE_WRITTEN_MS = [300, 1500]; // the recorder writes it when the bag is closed
const SHOWN_MS = { ok: 4000, bad: 12000 };

export class Controls {
  /** @param onJudged called when an episode has been closed, and once more when its note has been written */
  constructor(onJudged) {
    this.onJudged = onJudged;
    this.busy = new Set();
    show($("#estop"), true);
    $("#estop").addEventListener("click", () => this.act("estop", "", $("#estop")));
    // Escape stops the robot wherever the focus is: no dialog of this page needs that key.
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.repeat) return;
      event.preventDefault();
      this.act("estop", "", $("#estop"));
    }, { capture: true });
    for (const [id, action] of [["start", "start"], ["stop", "stop"], ["reset", "reset"], ["robot-reset", "robot_reset"]]) {
      $(`#${id}`).addEventListener("click", () => this.act(action, "", $(`#${id}`)));
    }
    $("#pause").addEventListener("click", () => this.act("instruction", "", $("#pause")));
    $("#instruct").addEventListener("submit", (event) => {
      event.preventDefault();
      this.instruct($("#instruction").value);
    });
    for (const button of $$("#judge [data-outcome]")) {
      button.addEventListener("click", () => this.judge(button));
    }
    $("#judge").addEventListener("submit", (event) => event.preventDefault());
  }

  async instruct(text) {
    if (!text.trim()) {
      toast(false, "Write an instruction first; Pause withdraws the present one.");
      return;
    }
    await this.act("instruction", text, $("#send"));
  }

  async judge(button) {
    const answer = await this.act(button.dataset.outcome, $("#note").value, button);
    if (!answer?.ok) return;
    $("#note").value = "";
    for (const wait of NOTE_WRITTEN_MS) setTimeout(this.onJudged, wait);
  }

  async act(action, text, button) {
    // A stop is always sent again: an earlier one may hang in a broken network.
    if (action !== "estop" && this.busy.has(action)) return undefined;
    this.busy.add(action);
    button.classList.add("busy");
    const answer = await post("/api/act", { action, text });
    this.busy.delete(action);
    button.classList.remove("busy");
    toast(answer.ok, answer.message);
    return answer;
  }

  update(state, sections) {
    const services = state.services ?? {};
    const estopped = state.estopped === true;
    enable($("#start"), services.start && !estopped, estopped ? "latched: reset first" : "no controller");
    enable($("#stop"), services.stop, "no controller");
    enable($("#reset"), services.reset, "no controller");
    $("#reset").classList.toggle("urgent", estopped);
    show($("#robot-reset"), Boolean(services.robot_reset));
    say($("#estop .label"), estopped ? "Emergency stop latched" : "Emergency stop");
    const recording = state.status?.recorder?.values.state === "recording";
    for (const button of $$("#judge [data-outcome]")) {
      enable(button, recording && services[button.dataset.outcome], "no episode is being recorded");
    }
    say($("#episode-hint"), recording ? "(being recorded)" : "(none is being recorded: it begins with an instruction)");
    if (sections.instruction) this.history(sections.instruction);
  }

  history({ now, earlier }) {
    say($("#current-instruction"), now || "none – the policy waits");
    $("#earlier").replaceChildren(...earlier.map((text) => el("option", { value: text })));
    const chips = earlier.slice(0, 6).map((text) =>
      el("button", { type: "button", className: "chip", title: "Send again", on: { click: () => this.fill(text) } }, text));
    $("#history").replaceChildren(...chips);
  }

  /** A chip only fills the box: nothing moves before Send. */
  fill(text) {
    $("#instruction").value = text;
    $("#instruction").focus();
  }
}

function enable(button, on, why) {
  if (button.disabled === Boolean(on)) button.disabled = !on;
  const title = on ? button.dataset.title ?? "" : why;
  if (button.dataset.title === undefined) button.dataset.title = button.title;
  if (button.title !== title) button.title = title;
}

export function toast(ok, text) {
  const line = el("p", { className: ok ? "good" : "bad", role: ok ? "status" : "alert" }, text || (ok ? "done" : "refused"));
  $("#toasts").append(line);
  setTimeout(() => line.remove(), ok ? SHOWN_MS.ok : SHOWN_MS.bad);
  while ($("#toasts").children.length > 4) $("#toasts").firstChild.remove();
}
