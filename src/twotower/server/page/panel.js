// One side of the comparison: a text while it is generated, and its figures.

import { chip, el } from "./tokens.js";

const FIGURES = [
  ["time", "time"],
  ["tokens", "tokens"],
  ["passes", "passes"],
  ["rate", "tokens / pass"],
];

export class Panel {
  constructor(root, title) {
    this.root = root;
    this.title = root.querySelector("h3");
    this.title.textContent = title;
    this.figures = Object.fromEntries(FIGURES.map(([name]) => [name, el("dd", { class: name }, "–")]));
    this.progress = el("p", { class: "step" });
    this.prompt = el("span", { class: "prompt" });
    this.final = el("span");
    this.block = el("span");
    this.body = el("div", { class: "text", "aria-hidden": "true" }, [this.prompt, this.final, this.block]);
    this.plain = el("p", { class: "whole hidden" }); // for screen readers: the final text only
    root.append(
      el("dl", { class: "numbers" }, FIGURES.map(([name, label]) => this.figure(name, label))),
      this.progress,
      this.body,
      this.plain,
    );
    this.clear("");
  }

  figure(name, label) {
    return el("div", {}, [el("dt", {}, label), this.figures[name]]);
  }

  /** Shows the prompt alone. */
  clear(prompt) {
    this.recording = this.frame = null;
    this.prompt.textContent = prompt;
    this.final.replaceChildren();
    this.block.replaceChildren();
    this.plain.textContent = "";
    this.progress.textContent = prompt ? "waiting" : "Press Run. Tokens appear here when they are final.";
    for (const figure of Object.values(this.figures)) figure.textContent = "–";
    this.root.classList.remove("ended");
    this.body.style.minHeight = "";
  }

  /** Marks the panel after an error or a stop. */
  interrupt() {
    if (!this.recording?.end) this.progress.textContent = this.recording ? "stopped" : "not run";
  }

  /** Keeps the height of the complete text, so that the page does not move during a replay. */
  lockHeight() {
    this.body.style.minHeight = `${this.body.offsetHeight}px`;
  }

  /** Shows the recording as it was `t` ms after the request was sent. */
  show(recording, t) {
    if (this.recording !== recording) {
      this.clear(recording.request.prompt);
      this.recording = recording;
    }
    const frame = recording.frameAt(t);
    const ended = frame.event === "end";
    this.root.classList.toggle("ended", ended);
    const clock = Math.min(Math.max(t, 0), recording.end ? recording.length : t) / 1000;
    const usage = ended ? recording.end.usage : null; // the server's counts, once they have arrived
    const generated = usage?.completion_tokens ?? frame.generated;
    const passes = usage?.passes ?? frame.passes;
    const rate = passes ? generated / passes : null;
    this.figures.time.textContent = `${clock.toFixed(3)} s`;
    this.figures.tokens.textContent = generated;
    this.figures.passes.textContent = passes;
    this.figures.rate.textContent = rate === null ? "–" : rate.toFixed(2);
    if (frame === this.frame) return;
    this.frame = frame;
    this.progress.textContent = describeFrame(frame, recording);
    this.plain.textContent = ended ? recording.text : "";
    this.draw(recording, frame);
  }

  draw(recording, frame) {
    const kind = recording.tokens[0]?.confidence == null ? "plain" : "final";
    while (this.final.childNodes.length > frame.final) this.final.lastChild.remove();
    for (let i = this.final.childNodes.length; i < frame.final; i += 1) {
      this.final.append(chip(recording.tokens[i], kind));
    }
    if (kind === "plain") {
      this.final.querySelector(".newest")?.classList.remove("newest");
      if (frame.event !== "end") this.final.lastChild?.classList.add("newest");
    }
    const block = frame.block ?? [];
    this.block.replaceChildren(
      ...block.map((cell) => chip(cell, cell.masked ? "prediction" : frame.draft ? "draft" : "final")),
      ...frame.rejected.map((text) => chip({ text }, "rejected")),
    );
  }
}

/** The line of progress above the text. */
function describeFrame(frame, recording) {
  switch (frame.event) {
    case "start":
      return frame.block ? `block 1: ${frame.block.length} masked positions` : "prefill of the prompt";
    case "pass": {
      const masked = frame.block.filter((cell) => cell.masked).length;
      const size = frame.block.length;
      if (frame.draft) return `draft ${frame.number}: ${size - masked} of ${size} tokens drafted, not yet verified`;
      const of = frame.steps ? ` of at most ${frame.steps}` : "";
      const left = `${masked || "no"} position${masked === 1 ? "" : "s"} masked`;
      return `block ${frame.number}, step ${frame.step + 1}${of}: ${left}`;
    }
    case "commit":
      if (frame.block) {
        return `the context tower reads the block; block ${frame.number}: ${frame.block.length} masked positions`;
      }
      if (frame.accepted === null) return "the context tower generated a token without a draft";
      return frame.accepted === 1
        ? "1 drafted token accepted, one added by the context tower"
        : `${frame.accepted} drafted tokens accepted, one added by the context tower`;
    case "token":
      return "one token per pass, left to right";
    default:
      return recording.end.reason === "length"
        ? "finished: the requested number of tokens"
        : "finished: the model ended the text";
  }
}
