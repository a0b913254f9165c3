// One side of the race: a text coming about, and its figures.

import { chip, el } from "./tokens.js";

const NUMBERS = [
  ["time", "time"],
  ["tokens", "tokens"],
  ["passes", "passes"],
  ["rate", "tokens / pass"],
];

export class Lane {
  constructor(root, title) {
    this.root = root;
    this.title = root.querySelector("h3");
    this.title.textContent = title;
    this.numbers = Object.fromEntries(NUMBERS.map(([name]) => [name, el("dd", { class: name }, "–")]));
    this.step = el("p", { class: "step" });
    this.prompt = el("span", { class: "prompt" });
    this.settled = el("span");
    this.open = el("span");
    this.body = el("div", { class: "text", "aria-hidden": "true" }, [this.prompt, this.settled, this.open]);
    this.plain = el("p", { class: "whole hidden" }); // the same for who does not look: final text only, at the end
    root.append(
      el("dl", { class: "numbers" }, NUMBERS.map(([name, label]) => el("div", {}, [el("dt", {}, label), this.numbers[name]]))),
      this.step,
      this.body,
      this.plain,
    );
    this.clear("");
  }

  /** Nothing yet. */
  clear(prompt) {
    this.recording = this.frame = null;
    this.prompt.textContent = prompt;
    this.settled.replaceChildren();
    this.open.replaceChildren();
    this.plain.textContent = "";
    this.step.textContent = prompt ? "waiting for its turn" : "Press Run: tokens appear here as they become final.";
    for (const number of Object.values(this.numbers)) number.textContent = "–";
    this.root.classList.remove("ended");
    this.body.style.minHeight = "";
  }

  /** Stays as tall as the whole text is, so that nothing moves under the pointer while it is replayed. */
  hold() {
    this.body.style.minHeight = `${this.body.offsetHeight}px`;
  }

  /** What there was `t` ms after the request was sent. */
  show(recording, t) {
    if (this.recording !== recording) {
      this.clear(recording.asked.prompt);
      this.recording = recording;
    }
    const frame = recording.at(t);
    const ended = frame.what === "end";
    this.root.classList.toggle("ended", ended);
    const clock = Math.min(Math.max(t, 0), recording.end ? recording.length : t) / 1000;
    const counted = ended ? recording.end.usage : null; // the server's own figures, once there are any
    const written = counted?.completion_tokens ?? frame.written;
    const passes = counted?.passes ?? frame.passes;
    const rate = passes ? written / passes : null;
    this.numbers.time.textContent = `${clock.toFixed(3)} s`;
    this.numbers.tokens.textContent = written;
    this.numbers.passes.textContent = passes;
    this.numbers.rate.textContent = rate === null ? "–" : rate.toFixed(2);
    if (frame === this.frame) return;
    this.frame = frame;
    this.step.textContent = says(frame, recording);
    this.plain.textContent = ended ? recording.text : "";
    this.write(recording, frame);
  }

  write(recording, frame) {
    const looks = recording.tokens[0]?.confidence == null ? "plain" : "final";
    while (this.settled.childNodes.length > frame.settled) this.settled.lastChild.remove();
    for (let i = this.settled.childNodes.length; i < frame.settled; i += 1) {
      this.settled.append(chip(recording.tokens[i], looks));
    }
    if (looks === "plain") {
      this.settled.querySelector(".newest")?.classList.remove("newest");
      if (frame.what !== "end") this.settled.lastChild?.classList.add("newest");
    }
    const block = frame.block ?? [];
    this.open.replaceChildren(
      ...block.map((cell) => chip(cell, cell.masked ? "guess" : frame.draft ? "draft" : "final")),
      ...frame.rejected.map((text) => chip({ text }, "rejected")),
    );
  }
}

/** The step counter, in words. */
function says(frame, recording) {
  switch (frame.what) {
    case "start":
      return frame.block ? `block 1: ${frame.block.length} masks` : "the prompt is read";
    case "pass": {
      const left = frame.block.filter((cell) => cell.masked).length;
      if (frame.draft) return `round ${frame.number}: ${frame.block.length - left} of ${frame.block.length} tokens drafted, to be checked`;
      const of = frame.steps ? ` of at most ${frame.steps}` : "";
      return `block ${frame.number}, step ${frame.step + 1}${of}: ${left ? `${left} still masked` : "nothing masked"}`;
    }
    case "commit":
      if (frame.block) return `the context tower reads the block; block ${frame.number}: ${frame.block.length} masks`;
      if (frame.kept === null) return "the context tower wrote a token without a draft";
      return `the context tower kept ${frame.kept} drafted token${frame.kept === 1 ? "" : "s"} and added its own`;
    case "token":
      return "one token a pass, left to right";
    default: {
      const { reason } = recording.end;
      return reason === "length" ? "done: as many tokens as were asked for" : "done: the text ended";
    }
  }
}
