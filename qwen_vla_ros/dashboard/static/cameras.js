// Live pictures. The next one is only asked for when this one is on the screen.

import { $, el, mark, milliseconds, say, show } from "/static/dom.js";

export class Cameras {
  constructor(cameras, onViews) {
    this.cameras = cameras;
    this.views = cameras.map((camera) => {
      const canvas = el("canvas", { role: "img", "aria-label": `camera ${camera.view}`, width: camera.size[0], height: camera.size[1] });
      const problem = el("p", { className: "problem", hidden: true });
      const facts = el("span", { className: "facts" });
      const button = el("button", { type: "button", className: "enlarge", "aria-pressed": "false", title: "Larger" },
        canvas, el("span", { className: "sr" }, `enlarge ${camera.view}`));
      const figure = el("figure", {}, button, problem, el("figcaption", {}, el("b", {}, camera.view), facts));
      button.addEventListener("click", () => this.enlarge(figure, button));
      canvas.style.aspectRatio = `${camera.size[0]} / ${camera.size[1]}`;
      return { figure, canvas, problem, facts, drawn: 0 };
    });
    $("#cameras .views").append(...this.views.map((view) => view.figure));
    $("#cameras .views").dataset.count = String(cameras.length);
    this.onViews = onViews;
  }

  enlarge(figure, button) {
    const larger = !figure.classList.contains("larger");
    for (const view of this.views) {
      view.figure.classList.remove("larger");
      view.figure.querySelector("button").setAttribute("aria-pressed", "false");
    }
    figure.classList.toggle("larger", larger);
    button.setAttribute("aria-pressed", String(larger));
  }

  async picture(index, blob, done) {
    const view = this.views[index];
    try {
      const bitmap = await createImageBitmap(blob);
      if (view.canvas.width !== bitmap.width || view.canvas.height !== bitmap.height) {
        view.canvas.width = bitmap.width;
        view.canvas.height = bitmap.height;
        view.canvas.style.aspectRatio = `${bitmap.width} / ${bitmap.height}`;
      }
      view.canvas.getContext("2d").drawImage(bitmap, 0, 0);
      bitmap.close();
      view.drawn += 1;
      view.canvas.dataset.drawn = String(view.drawn);
    } catch {
      // A picture that cannot be drawn: the next one may.
    } finally {
      done();
    }
  }

  update(state) {
    const rows = (state.ages?.topics ?? []).filter((row) => row.kind === "camera");
    rows.forEach((row, index) => {
      const view = this.views[index];
      if (!view) return;
      const late = row.age_ms === null || row.age_ms > row.limit_ms;
      mark(view.figure, "state", late || row.problem ? "stale" : "ok");
      say(view.facts, row.age_ms === null ? "" : `${row.hz.toFixed(1)} Hz · ${milliseconds(row.age_ms)}`);
      show(view.problem, late || Boolean(row.problem));
      if (row.problem) say(view.problem, row.problem);
      else if (row.publishers === 0) say(view.problem, `nobody publishes ${row.topic}`);
      else if (row.age_ms === null) say(view.problem, "no picture yet");
      else if (late) say(view.problem, `stale: last picture ${milliseconds(row.age_ms)} ago`);
    });
  }
}
