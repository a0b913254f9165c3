// How tokens are drawn: invisible characters get a sign, and the colour shows the confidence.

// Dark violet to pale green. Each colour is lighter than the one before, so the order does not depend on the hue.
const RAMP = [
  [0.0, [78, 63, 128]],
  [0.3, [70, 96, 158]],
  [0.6, [66, 141, 158]],
  [0.8, [104, 182, 147]],
  [0.95, [168, 216, 156]],
  [1.0, [213, 235, 178]],
];

/** The background colour of a confidence from 0 to 1, and a text colour with enough contrast. */
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

/** A token's text with signs for its invisible characters. */
export function visible(text) {
  if (text.startsWith("bytes:")) return "·"; // a part of a character
  const signs = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };
  const invisible = /[\u0000-\u001f\u007f-\u00a0\u200b-\u200f\u2028-\u202f\ufeff\ufffd]/g;
  return text.replace(invisible, (character) => signs[character] ?? "·") || "·";
}

/** A token's text in quotation marks, for sentences. */
export function quoted(text) {
  return `“${visible(text).trim() || "␣"}”`;
}

const STATE_LABELS = { final: "final", prediction: "predicted", draft: "drafted", rejected: "rejected" };

/** A token as an element. kind: "final", "prediction" (of the denoiser, at a masked position), "draft" (not yet
 * verified), "rejected" or "plain" (without confidence). */
export function chip(cell, kind) {
  const span = document.createElement("span");
  span.className = `token ${kind}${cell.fresh ? " fresh" : ""}`;
  span.textContent = cell.empty ? "  " : visible(cell.text);
  if (/^<[^ >]+>$/.test(cell.text)) span.classList.add("special");
  if (cell.confidence != null && !cell.empty && kind !== "plain") {
    const { ground, ink } = colours(cell.confidence);
    span.style.setProperty("--ground", ground);
    span.style.setProperty("--ink", ink);
    span.title = `${quoted(cell.text)} ${STATE_LABELS[kind]}, confidence ${cell.confidence.toFixed(2)}`;
  }
  if ((kind === "final" || kind === "plain") && cell.text?.endsWith("\n")) span.append(document.createElement("br"));
  return span;
}

/** The legend: the colour scale and the kinds of tokens. */
export function legend(root) {
  const stops = Array.from({ length: 21 }, (_, i) => colours(i / 20).ground);
  root.replaceChildren(
    el("span", { class: "legend-scale" }, [
      "confidence 0 ",
      el("span", {
        class: "ramp",
        style: `--ramp: linear-gradient(90deg, ${stops.join(", ")})`,
        role: "img",
        "aria-label": "from dark violet to pale green",
      }),
      " 1",
    ]),
    el("span", {}, [chip({ text: "word", confidence: 0.98 }, "final"), " final"]),
    el("span", {}, [chip({ text: "word", confidence: 0.98, fresh: true }, "final"), " committed in this pass"]),
    el("span", {}, [chip({ text: "word", confidence: 0.6 }, "prediction"), " masked: prediction"]),
    el("span", {}, [chip({ text: "word", confidence: 0.8 }, "draft"), " drafted"]),
    el("span", {}, [chip({ text: "word" }, "rejected"), " rejected"]),
  );
}

/** Creates an element. */
export function el(name, attributes = {}, children = []) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") element.style.cssText = value;
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...[children].flat());
  return element;
}
