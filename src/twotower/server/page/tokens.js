// How tokens look: what cannot be seen is made visible, and confidence is a colour.

// Dark violet to pale green, each step lighter than the one before: read in order without telling hues apart.
const RAMP = [
  [0.0, [78, 63, 128]],
  [0.3, [70, 96, 158]],
  [0.6, [66, 141, 158]],
  [0.8, [104, 182, 147]],
  [0.95, [168, 216, 156]],
  [1.0, [213, 235, 178]],
];

/** The ground for a confidence from 0 to 1, and the ink that is readable on it. */
export function colours(confidence) {
  const sure = Math.min(Math.max(confidence ?? 0, 0), 1);
  const above = Math.max(1, RAMP.findIndex(([at]) => sure <= at));
  const [low, a] = RAMP[above - 1];
  const [high, b] = RAMP[above];
  const share = (sure - low) / (high - low);
  const rgb = a.map((part, i) => Math.round(part + (b[i] - part) * share));
  const [r, g, blue] = rgb.map((part) => (part / 255) ** 2.2);
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * blue;
  return { ground: `rgb(${rgb.join(" ")})`, ink: light > 0.19 ? "#06080c" : "#ffffff" };
}

/** A token's text without anything invisible. */
export function visible(text) {
  if (text.startsWith("bytes:")) return "·"; // a part of a character
  const signs = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };
  return text.replace(/[\u0000-\u001f\u007f-\u00a0\u200b-\u200f\u2028-\u202f\ufeff\ufffd]/g, (c) => signs[c] ?? "·") || "·";
}

/** A token in a sentence about it. */
export function named(text) {
  return `“${visible(text).trim() || "␣"}”`;
}

const SAID = { final: "final", guess: "as a guess", draft: "as a draft", rejected: "not kept" };

/** A token as an element. kind: "final", "guess" (what the denoiser would put at a mask), "draft" (to be checked),
 * "rejected", "plain". */
export function chip(cell, kind) {
  const span = document.createElement("span");
  span.className = `token ${kind}${cell.fresh ? " fresh" : ""}`;
  span.textContent = cell.empty ? "  " : visible(cell.text);
  if (/^<[^ >]+>$/.test(cell.text)) span.classList.add("special");
  if (cell.confidence != null && !cell.empty && kind !== "plain") {
    const { ground, ink } = colours(cell.confidence);
    span.style.setProperty("--ground", ground);
    span.style.setProperty("--ink", ink);
    span.title = `${named(cell.text)} ${SAID[kind]}, confidence ${cell.confidence.toFixed(2)}`;
  }
  if ((kind === "final" || kind === "plain") && cell.text?.endsWith("\n")) span.append(document.createElement("br"));
  return span;
}

/** What the colours mean, and the looks. */
export function legend(root) {
  const stops = Array.from({ length: 21 }, (_, i) => colours(i / 20).ground);
  root.replaceChildren(
    el("span", { class: "legend-scale" }, [
      "confidence 0 ",
      el("span", { class: "ramp", style: `--ramp: linear-gradient(90deg, ${stops.join(", ")})`, role: "img", "aria-label": "from dark violet to pale green" }),
      " 1",
    ]),
    el("span", {}, [chip({ text: "word", confidence: 0.98 }, "final"), " final"]),
    el("span", {}, [chip({ text: "word", confidence: 0.98, fresh: true }, "final"), " by this pass"]),
    el("span", {}, [chip({ text: "word", confidence: 0.6 }, "guess"), " masked: a guess"]),
    el("span", {}, [chip({ text: "word", confidence: 0.8 }, "draft"), " drafted"]),
    el("span", {}, [chip({ text: "word" }, "rejected"), " not kept"]),
  );
}

/** An element in one line. */
export function el(name, attributes = {}, children = []) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") element.style.cssText = value; // through the object model: the policy allows no style in markup
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...[children].flat());
  return element;
}
