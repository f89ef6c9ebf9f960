// The page: says hello, opens the connection, hands what arrives to its parts.

import { $, pill, say, seconds, show } from "/static/dom.js";
import { Link } from "/static/link.js";
import { Cameras } from "/static/cameras.js";
import { Controls } from "/static/controls.js";
import { Joints } from "/static/joints.js";
import { Nodes, Timing } from "/static/health.js";
import { Rollouts } from "/static/rollouts.js";
import { Chunks } from "/static/chunks.js";
import { askToken } from "/static/login.js";

const MODES = {
  running: ["play", "ok", "running"],
  idle: ["stop", "stale", "idle"],
  holding: ["pause", "warn", "holding"],
  estopped: ["hand", "error", "EMERGENCY STOP"],
  fault: ["error", "error", "fault"],
};
const SILENT_NODE_S = 2.5; // every node tells its status at least once a second

async function main() {
  let about = null;
  for (;;) {
    try {
      about = await Link.hello();
      break;
    } catch (error) {
      lost(`The dashboard does not answer: ${error.message}`);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  if (about === null) {
    await askToken();
    about = await Link.hello();
  }
  start(about);
}

function start(about) {
  say($("#robot-name"), about.name);
  document.title = `${about.name} – Qwen-VLA dashboard`;
  say($("#about"), `${about.description} ${about.simulated ? "Simulated or mock robot." : ""}`);
  show($("#read-only"), about.read_only);
  if (about.read_only) document.querySelectorAll(".writes, #estop").forEach((element) => element.remove());
  const state = {};
  const cameras = new Cameras(about.cameras, (wanted) => link.send({ views: wanted }));
  const rollouts = new Rollouts(about);
  const controls = about.read_only ? null : new Controls(() => rollouts.refresh());
  const chunks = new Chunks(about, (channel) => link.choose(channel));
  const parts = [cameras, controls, new Joints(about.channels), chunks, new Timing(about), new Nodes(SILENT_NODE_S)];
  parts.push(rollouts);

  const link = new Link({
    state(sections) {
      Object.assign(state, sections);
      for (const part of parts) part?.update(state, sections);
      summary(state);
    },
    picture: (camera, blob, done) => cameras.picture(camera, blob, done),
    connection(kind, text, silent) {
      pill($("#connection"), kind === "live" ? "ok" : kind === "connecting" ? "stale" : "error",
        kind === "live" ? "ok" : kind === "connecting" ? "stale" : "error", text);
      document.body.classList.toggle("offline", kind !== "live");
      if (kind === "lost") lost(`Connection lost: what you see is ${seconds(silent / 1000)} old. Trying again …`);
      else if (kind === "silent") lost(`Nothing new for ${seconds(silent / 1000)}: what you see may not be true.`);
      else show($("#lost"), false);
    },
  });
  link.open();
}

function lost(text) {
  const banner = $("#lost");
  say(banner, text);
  show(banner, true);
}

/** Mode and recording, and whether the controller still says anything at all. */
function summary(state) {
  const controller = state.status?.controller;
  const age = state.ages?.status?.controller;
  const latched = state.estopped === true;
  document.body.classList.toggle("estopped", latched);
  if (!controller || age === undefined || age > SILENT_NODE_S) {
    pill($("#mode"), "error", "error", controller ? `controller silent for ${seconds(age ?? 0)}` : "no controller");
  } else {
    const mode = controller.values.mode ?? "unknown";
    const [symbol, level, word] = MODES[mode] ?? ["stale", "stale", mode];
    pill($("#mode"), symbol, level, word);
  }
  const banner = $("#latched");
  if (latched) say(banner, `The emergency stop is latched: ${controller?.values.reason ?? ""}. The robot stays where it is until it is reset.`);
  show(banner, latched);

  const recorder = state.status?.recorder;
  const known = recorder && (state.ages?.status?.recorder ?? 99) <= SILENT_NODE_S;
  show($("#recording"), Boolean(recorder));
  if (recorder && !known) pill($("#recording"), "error", "error", "recorder silent");
  else if (recorder?.level === "error") pill($("#recording"), "error", "error", "not recording");
  else if (recorder) {
    const on = recorder.values.state === "recording";
    pill($("#recording"), on ? "record" : "stale", on ? "record" : "stale", on ? "recording" : "recorder waits");
  }
}

main();
