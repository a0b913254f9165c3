// "How it works": shows the tale step by step. It needs nothing but this folder's files.

import { KINDS, story } from "./story.js";
import { chip, colours, el, visible } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";

export class How {
  constructor(root) {
    this.root = root;
    this.active = false; // whether the keys are this part's
    this.at = 0;
    document.addEventListener("keydown", (event) => this.key(event));
  }

  /** Reads the recording when it is first wanted. */
  async open() {
    this.opened ??= this.load();
    await this.opened;
  }

  async load() {
    try {
      const answer = await fetch("how.json");
      if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
      this.trace = await answer.json();
    } catch {
      this.opened = null;
      this.root.replaceChildren(el("p", { class: "error" }, "The recording, how.json, cannot be read. Is the server still there?"));
      return;
    }
    this.steps = story(this.trace);
    this.build();
    this.go(0);
  }

  build() {
    this.title = el("h3");
    this.words = el("p", { class: "words" });
    this.count = el("span", { class: "soft small" });
    this.back = el("button", { type: "button", id: "how-back" }, "◀ Back");
    this.next = el("button", { type: "button", id: "how-next", class: "main" }, "Next ▶");
    this.slider = el("input", { type: "range", id: "how-step", min: 0, max: this.steps.length - 1, value: 0, "aria-label": "Step" });
    this.back.addEventListener("click", () => this.go(this.at - 1));
    this.next.addEventListener("click", () => this.go(this.at + 1));
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    this.towers = el("div", { class: "towers", role: "img" });
    this.said = el("div", { class: "said" }, this.trace.context.map((text) => chip({ text }, "plain")));
    this.cells = el("ol", { class: "cells", "aria-label": "The block" });
    this.history = el("div", { class: "history", "aria-hidden": "true" });
    this.figures = el("p", { class: "figures" });
    this.root.replaceChildren(
      el("div", { class: "tale card" }, [
        el("div", { "aria-live": "polite" }, [this.title, this.words]),
        el("div", { class: "stepper" }, [this.back, this.next, this.slider, this.count]),
      ]),
      (this.figure = el("div", { class: "figure" }, [
        el("div", { class: "card" }, this.towers),
        el("div", { class: "side card blocks" }, [
          el("h4", {}, "The prompt"),
          this.said,
          el("h4", {}, "The block"),
          this.cells,
          this.figures,
          el("h4", {}, "Pass by pass"),
          this.history,
        ]),
      ])),
      el("p", { class: "soft small" }, [
        "Recorded from the bundled model (2 × 2.5 M parameters, greedy), nothing invented: ",
        el("code", {}, this.trace.made_by),
        " makes it again.",
      ]),
    );
  }

  go(step) {
    this.at = Math.min(Math.max(step, 0), this.steps.length - 1);
    const now = this.steps[this.at];
    this.title.textContent = now.title;
    this.words.textContent = now.words;
    this.count.textContent = `${this.at + 1} of ${this.steps.length} · arrow keys`;
    this.slider.value = this.at;
    this.slider.setAttribute("aria-valuetext", now.title);
    this.back.disabled = this.at === 0;
    this.next.disabled = this.at === this.steps.length - 1;
    this.figure.classList.toggle("early", !now.rows.length); // where there is one column, the towers come first
    this.said.classList.toggle("active", now.context && now.kept !== "after");
    this.drawTowers(now);
    this.drawBlock(now);
  }

  drawTowers(now) {
    const kept = now.kept && this.trace[now.kept];
    const rows = [...this.trace.pattern].map((kind, i) => {
      const linked = now.links.includes(kind);
      return [
        this.layer(kind, now.context, !now.context && !linked, kept && remembered(kept[i], this.largest)),
        link(kind, linked),
        this.layer(kind, now.denoiser, !now.denoiser, null),
      ];
    });
    this.towers.replaceChildren(
      el("div", { class: "head" }, "context tower"),
      el("div"),
      el("div", { class: "head" }, "denoiser"),
      ...rows.flat(),
    );
    const work = [now.context && "the context tower is at work", now.denoiser && "the denoiser is at work"].filter(Boolean);
    const reads = { M: "Mamba layers start from the context's states", "*": "attention reads the context's keys and values" };
    const said = [...work, ...[...now.links].map((kind) => reads[kind])].join("; ") || "neither is at work";
    this.towers.setAttribute("aria-label", `Two towers of ${this.trace.pattern.length} layers: ${said}.`);
  }

  layer(kind, active, idle, kept) {
    return el("div", { class: `layer${active ? " active" : ""}${idle ? " idle" : ""}` }, [
      el("span", {}, KINDS[kind]),
      ...(kept ? [el("span", { class: "kept" }, kept)] : []),
    ]);
  }

  /** The largest norm of a head's state, before or after: both are drawn on one scale. */
  get largest() {
    return Math.max(...[...this.trace.before, ...this.trace.after].flatMap((layer) => layer.heads?.length ? layer.heads : [0]));
  }

  drawBlock(now) {
    const cells = now.cells ?? [];
    this.cells.replaceChildren(...cells.map(drawCell));
    const left = this.trace.passes.length - now.rows.length; // their places are kept, so that nothing jumps
    const empty = Array.from({ length: left }, () => this.trace.block.map(() => null));
    const rows = [...now.rows, ...empty].map((row, i) => [el("span", {}, String(i + 1)), ...row.map(drawSmall)]);
    this.history.replaceChildren(...rows.flat());
    const masked = cells.filter((cell) => cell.look !== "final").length;
    this.figures.replaceChildren(
      ...(cells.length
        ? [
            el("span", {}, ["still masked ", el("b", {}, `${masked} of ${cells.length}`)]),
            el("span", {}, ["t ", el("b", {}, (masked / cells.length).toFixed(2))]),
          ]
        : ["There is none yet."]),
    );
  }

  key(event) {
    if (!this.active || !this.steps || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target === this.slider || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: this.steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.go(to);
  }
}

/** What a layer of the context tower keeps, in a few words. */
function remembered(layer, largest) {
  if (layer.kind === "*") return [`K/V of ${layer.tokens} tokens`];
  if (layer.kind !== "M") return ["nothing"];
  const strip = layer.heads.map((norm) => {
    const head = el("i", { title: `norm ${norm.toFixed(2)}` });
    head.style.setProperty("--share", `${Math.round(100 * (norm / largest) ** 0.4)}%`);
    return head;
  });
  return [el("span", { class: "strip" }, strip), "state"];
}

/** The connection from a context layer to the denoiser layer beside it; none where nothing is kept. */
function link(kind, active) {
  const words = { M: "state", "*": "K/V" }[kind];
  if (!words) return el("div", { class: "link" });
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 70 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", "M4 20H65M58 14l8 6l-8 6");
  svg.append(path);
  return el("div", { class: `link${active ? " active" : ""}` }, [svg, el("span", {}, words)]);
}

function drawCell(cell, i) {
  const words = { mask: "masked", guess: "masked, a guess", final: "final" }[cell.look];
  const item = el("li", { class: `cell ${cell.look}${cell.fresh ? " fresh" : ""}`, "aria-label": `${i + 1}: ${cell.text ? visible(cell.text) : ""} ${words}` }, [
    el("span", { class: "what" }, cell.text === undefined ? "mask" : visible(cell.text).trim() || "␣"),
    el("span", { class: "sure" }, cell.note ?? (cell.sure === undefined ? "\u00a0" : cell.sure.toFixed(2))),
  ]);
  if (cell.sure !== undefined) {
    const { ground, ink } = colours(cell.sure);
    item.style.setProperty("--ground", ground);
    item.style.setProperty("--ink", ink);
  }
  return item;
}

/** A cell of the passes so far. */
function drawSmall(cell) {
  if (!cell) return el("i");
  const { ground, ink } = colours(cell.sure);
  const item = el("i", { class: `${cell.look}${cell.fresh ? " fresh" : ""}` }, visible(cell.text).trim() || "␣");
  item.style.setProperty("--ground", ground);
  item.style.setProperty("--ink", ink);
  return item;
}
