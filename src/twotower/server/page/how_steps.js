// The steps of "How it works", built from the recording of one block (how.json).
//
// Fields of a step:
//
// - title, words: the text.
// - context, denoiser: whether the tower runs.
// - links: kinds of layers whose connection is active.
// - cache: the cache to show: null, "before" or "after".
// - cells: the block, or null.
// - rows: the passes so far, one block each.

import { quoted } from "./tokens.js";

export const LAYER_NAMES = { M: "Mamba-2", "*": "attention", "-": "MLP", E: "mixture of experts" };
const DETAILED_PASSES = 2; // passes that take two steps each; later passes take one

export function buildSteps(trace) {
  const defaults = { context: false, denoiser: false, links: "", cache: "before", cells: null, rows: [] };
  const size = trace.block.length;
  const promptTokens = trace.context.length;
  const masks = Array.from({ length: size }, () => ({ state: "mask" }));
  const steps = [
    {
      title: "Prefill: the context tower reads the prompt",
      words:
        "The context tower is an autoregressive language model: it reads from left to right. It has read the " +
        `${promptTokens} tokens of the prompt. A second network of the same shape, the denoiser, will generate the ` +
        "next block.",
      context: true,
      cache: null,
    },
    {
      title: "The cache of the context tower",
      words:
        `An attention layer caches the keys and values of all ${promptTokens} tokens. A Mamba layer caches a state ` +
        "of fixed size and its last three inputs; the bars show the norm of the state in each head. MLP and expert " +
        "layers cache nothing.",
      context: true,
    },
    {
      title: `A block of ${size} mask tokens`,
      words:
        `The next ${size} positions are masked. The fraction of masked positions, t, is 1. The denoiser gets t as an ` +
        "input, which shifts and scales its layers.",
      cells: masks,
    },
    {
      title: "Attention: the prompt and the whole block",
      words:
        "Each layer of the denoiser reads the cache of the context layer beside it. In an attention layer, each " +
        "position of the block attends to the prompt and to all positions of the block, left and right.",
      denoiser: true,
      links: "*",
      cells: masks,
    },
    {
      title: "Mamba: initialized with the state",
      words:
        "A Mamba layer runs through the block from left to right. It starts from the state that the context layer " +
        "has at the end of the prompt. It never changes that state.",
      denoiser: true,
      links: "M",
      cells: masks,
    },
    {
      title: "For comparison: Mamba states set to zero",
      words:
        "The same first pass with the Mamba states set to zero. Attention still reads the prompt, but the " +
        "predictions are wrong. The number under a prediction is the confidence of the denoiser.",
      denoiser: true,
      links: "*",
      cells: trace.unseeded.texts.map((text, i) => prediction(text, trace.unseeded.confidence[i])),
    },
  ];
  trace.passes.forEach((pass, at) => steps.push(...passSteps(trace, pass, at)));
  const rows = trace.passes.map((pass) => cellsOf(trace, pass, true));
  const passes = trace.passes.length;
  const final = finalCells(trace);
  steps.push(
    {
      title: "The context tower reads the block",
      words:
        `No position is masked. The context tower reads the ${size} tokens in one pass. Its keys and values now ` +
        `cover ${promptTokens + size} tokens, and its Mamba states are those after the block. The keys, values and states ` +
        "of the denoiser are discarded.",
      context: true,
      cache: "after",
      cells: final,
      rows,
    },
    {
      title: `${size} tokens in ${passes} passes`,
      words:
        "The number under a token is the pass that committed it; the order is not left to right. Autoregressive " +
        `decoding needs ${size} passes for this text. Here the denoiser made ${passes} passes and the context tower ` +
        "made one. The next block starts with mask tokens.",
      cache: "after",
      rows,
      cells: final.map((cell) => ({ ...cell, note: `pass ${cell.pass + 1}` })),
    },
  );
  return steps.map((step) => ({ ...defaults, ...step }));
}

function passSteps(trace, pass, at) {
  const masked = pass.masked.filter(Boolean).length;
  const committed = pass.texts.map((_, i) => i).filter((i) => pass.commit[i]);
  const earlier = trace.passes.slice(0, at).map((other) => cellsOf(trace, other, true));
  const figure = (afterCommit) => {
    const cells = cellsOf(trace, pass, afterCommit);
    return { cells, rows: [...earlier, cells] };
  };
  const title = `Pass ${at + 1}`;
  const commits = `${title}: ${committed.length} token${committed.length === 1 ? "" : "s"} committed`;
  const start =
    masked === pass.texts.length
      ? `All ${masked} positions are masked (t = 1). `
      : `${masked} of ${pass.texts.length} positions are masked (t = ${pass.t.toFixed(2)}). `;
  const work = { denoiser: true, links: "M*" };
  if (at < DETAILED_PASSES) {
    const predicts = "In one pass the denoiser predicts a token for each of them, with a confidence.";
    return [
      { title: `${title}: predictions`, words: start + predicts + changes(trace, pass, at), ...work, ...figure(false) },
      { title: commits, words: commitReason(trace, pass, committed), ...figure(true) },
    ];
  }
  const words = start + commitReason(trace, pass, committed) + changes(trace, pass, at);
  return [{ title: commits, words, ...work, ...figure(true) }];
}

function prediction(text, confidence) {
  return { state: "prediction", text, confidence };
}

/** The cells of the block in a pass, before or after the pass commits tokens. */
function cellsOf(trace, pass, afterCommit) {
  const final = finalCells(trace);
  return pass.texts.map((text, i) => {
    const confidence = pass.confidence[i];
    if (!pass.masked[i]) return final[i];
    return pass.commit[i] && afterCommit
      ? { state: "final", text, confidence, fresh: true }
      : prediction(text, confidence);
  });
}

/** Why the pass committed these positions. */
function commitReason(trace, pass, committed) {
  const above = committed.filter((i) => pass.confidence[i] > trace.threshold);
  if (!above.length) {
    const [i] = committed;
    return (
      `No confidence is above γ = ${trace.threshold}. The token with the highest confidence, ` +
      `${quoted(pass.texts[i])} with ${pass.confidence[i].toFixed(2)}, is committed: each pass commits at least one.`
    );
  }
  const list = above.map((i) => quoted(pass.texts[i])).join(", ");
  const are = above.length === 1 ? "is" : "are";
  return (
    `The confidence of ${list} is above γ = ${trace.threshold}, so the ` +
    `${above.length === 1 ? "token" : "tokens"} ${are} final and never masked again. The other positions stay masked.`
  );
}

/** Which predictions differ from those of the pass before. */
function changes(trace, pass, at) {
  const previous = trace.passes[at - 1];
  if (!previous) return "";
  const changed = pass.texts.map((_, i) => i).filter((i) => pass.masked[i] && pass.texts[i] !== previous.texts[i]);
  if (!changed.length) return "";
  const [i] = changed;
  const more = changed.length - 1;
  const others = more ? ` The prediction also changed at ${more} other position${more > 1 ? "s" : ""}.` : "";
  return ` The prediction ${quoted(previous.texts[i])} is now ${quoted(pass.texts[i])}.${others}`;
}

/** The finished block: each token with its pass, and its confidence in that pass. */
function finalCells(trace) {
  return trace.block.map((text, i) => {
    const pass = trace.passes.findIndex((other) => other.commit[i]);
    return { state: "final", text, confidence: trace.passes[pass].confidence[i], pass };
  });
}
