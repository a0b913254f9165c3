// The section "How it works": shows the steps of `how_steps.js`. It needs the files of this folder, and no server.

import { LAYER_NAMES, buildSteps } from "./how_steps.js";
import { chip, colours, el, visible } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";
const LOAD_ERROR = "how.json could not be loaded. Check that the server is running, then reload the page.";

export class How {
  constructor(root) {
    this.root = root;
    this.active = false; // whether arrow keys belong to this section
    this.current = 0;
    document.addEventListener("keydown", (event) => this.key(event));
  }

  /** Loads the recording at the first call. */
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
      this.root.replaceChildren(el("p", { class: "error" }, LOAD_ERROR));
      return;
    }
    this.steps = buildSteps(this.trace);
    this.build();
    this.go(0);
  }

  build() {
    this.title = el("h3");
    this.words = el("p", { class: "words" });
    this.count = el("span", { class: "soft small" });
    this.back = el("button", { type: "button", id: "how-back" }, "◀ Back");
    this.next = el("button", { type: "button", id: "how-next", class: "main" }, "Next ▶");
    const range = { min: 0, max: this.steps.length - 1, value: 0 };
    this.slider = el("input", { type: "range", id: "how-step", "aria-label": "Step", ...range });
    this.back.addEventListener("click", () => this.go(this.current - 1));
    this.next.addEventListener("click", () => this.go(this.current + 1));
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    this.towers = el("div", { class: "towers", role: "img" });
    this.prompt = el("div", { class: "prompt-tokens" }, this.trace.context.map((text) => chip({ text }, "plain")));
    this.cells = el("ol", { class: "cells", "aria-label": "Block" });
    this.history = el("div", { class: "history", "aria-hidden": "true" });
    this.figures = el("p", { class: "figures" });
    this.root.replaceChildren(
      el("div", { class: "explanation card" }, [
        el("div", { "aria-live": "polite" }, [this.title, this.words]),
        el("div", { class: "stepper" }, [this.back, this.next, this.slider, this.count]),
      ]),
      (this.figure = el("div", { class: "figure" }, [
        el("div", { class: "card" }, this.towers),
        el("div", { class: "side card blocks" }, [
          el("h4", {}, "Prompt"),
          this.prompt,
          el("h4", {}, "Block"),
          this.cells,
          this.figures,
          el("h4", {}, "Passes so far"),
          this.history,
        ]),
      ])),
      el("p", { class: "soft small" }, [
        "Recorded from the bundled model (two towers of 2.5 M parameters each, fp32, greedy decoding) with ",
        el("code", {}, this.trace.made_by),
        ".",
      ]),
    );
  }

  go(index) {
    this.current = Math.min(Math.max(index, 0), this.steps.length - 1);
    const step = this.steps[this.current];
    this.title.textContent = step.title;
    this.words.textContent = step.words;
    this.count.textContent = `${this.current + 1} of ${this.steps.length} · arrow keys`;
    this.slider.value = this.current;
    this.slider.setAttribute("aria-valuetext", step.title);
    this.back.disabled = this.current === 0;
    this.next.disabled = this.current === this.steps.length - 1;
    this.figure.classList.toggle("early", !step.rows.length); // on narrow screens: the towers above the block
    this.prompt.classList.toggle("active", step.context && step.cache !== "after");
    this.drawTowers(step);
    this.drawBlock(step);
  }

  drawTowers(step) {
    const cache = step.cache && this.trace[step.cache];
    const rows = [...this.trace.pattern].map((kind, i) => {
      const linked = step.links.includes(kind);
      return [
        this.layer(kind, step.context, !step.context && !linked, cache && cacheContents(cache[i], this.largestNorm)),
        link(kind, linked),
        this.layer(kind, step.denoiser, !step.denoiser, null),
      ];
    });
    this.towers.replaceChildren(
      el("div", { class: "head" }, "context tower"),
      el("div"),
      el("div", { class: "head" }, "denoiser"),
      ...rows.flat(),
    );
    const active = [
      step.context && "the context tower runs",
      step.denoiser && "the denoiser runs",
      step.links.includes("M") && "Mamba layers of the denoiser start from the states of the context tower",
      step.links.includes("*") && "attention layers of the denoiser read the keys and values of the context tower",
    ].filter(Boolean);
    const summary = active.join("; ") || "no tower runs";
    this.towers.setAttribute("aria-label", `Two towers of ${this.trace.pattern.length} layers: ${summary}.`);
  }

  layer(kind, active, idle, cache) {
    return el("div", { class: `layer${active ? " active" : ""}${idle ? " idle" : ""}` }, [
      el("span", {}, LAYER_NAMES[kind]),
      ...(cache ? [el("span", { class: "cache" }, cache)] : []),
    ]);
  }

  /** The largest norm of a head's SSM state before or after the block: one scale for both. */
  get largestNorm() {
    const layers = [...this.trace.before, ...this.trace.after];
    return Math.max(...layers.flatMap((layer) => (layer.heads?.length ? layer.heads : [0])));
  }

  drawBlock(step) {
    const cells = step.cells ?? [];
    this.cells.replaceChildren(...cells.map(drawCell));
    const left = this.trace.passes.length - step.rows.length; // empty rows keep the height
    const empty = Array.from({ length: left }, () => this.trace.block.map(() => null));
    const rows = [...step.rows, ...empty].map((row, i) => [el("span", {}, String(i + 1)), ...row.map(drawSmall)]);
    this.history.replaceChildren(...rows.flat());
    const masked = cells.filter((cell) => cell.state !== "final").length;
    this.figures.replaceChildren(
      ...(cells.length
        ? [
            el("span", {}, ["masked ", el("b", {}, `${masked} of ${cells.length}`)]),
            el("span", {}, ["t ", el("b", {}, (masked / cells.length).toFixed(2))]),
          ]
        : ["No block yet."]),
    );
  }

  key(event) {
    if (!this.active || !this.steps || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target === this.slider || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const { current, steps } = this;
    const to = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.go(to);
  }
}

/** What a layer of the context tower has in the cache. */
function cacheContents(layer, largest) {
  if (layer.kind === "*") return [`K/V of ${layer.tokens} tokens`];
  if (layer.kind !== "M") return ["no cache"];
  const strip = layer.heads.map((norm) => {
    const head = el("i", { title: `norm ${norm.toFixed(2)}` });
    head.style.setProperty("--share", `${Math.round(100 * (norm / largest) ** 0.4)}%`);
    return head;
  });
  return [el("span", { class: "strip" }, strip), "state"];
}

/** The connection from a context layer to the denoiser layer beside it; empty for layers without a cache. */
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
  const label = { mask: "masked", prediction: "masked, predicted", final: "final" }[cell.state];
  const text = cell.text === undefined ? "" : visible(cell.text);
  const confidence = cell.confidence === undefined ? "\u00a0" : cell.confidence.toFixed(2);
  const classes = `cell ${cell.state}${cell.fresh ? " fresh" : ""}`;
  const item = el("li", { class: classes, "aria-label": `${i + 1}: ${text} ${label}` }, [
    el("span", { class: "what" }, cell.text === undefined ? "mask" : text.trim() || "␣"),
    el("span", { class: "confidence" }, cell.note ?? confidence),
  ]);
  if (cell.confidence !== undefined) {
    const { ground, ink } = colours(cell.confidence);
    item.style.setProperty("--ground", ground);
    item.style.setProperty("--ink", ink);
  }
  return item;
}

/** A cell in the rows of passes. */
function drawSmall(cell) {
  if (!cell) return el("i");
  const { ground, ink } = colours(cell.confidence);
  const item = el("i", { class: `${cell.state}${cell.fresh ? " fresh" : ""}` }, visible(cell.text).trim() || "␣");
  item.style.setProperty("--ground", ground);
  item.style.setProperty("--ink", ink);
  return item;
}
