// "How it works" as data: the steps of the tale, made from the recording of one real block.
//
// A step: title, words, and what the figure shows. context, denoiser: whether that tower is at work; links: the kinds of
// layers whose connection is; kept: which state to show (null, "before", "after"); cells: the block, or null; rows: the
// passes so far, a block each.

import { named } from "./tokens.js";

export const KINDS = { M: "Mamba-2", "*": "attention", "-": "MLP", E: "mixture of experts" };
const IN_FULL = 2; // passes that are shown in two steps; the later ones take one each

export function story(trace) {
  const nothing = { context: false, denoiser: false, links: "", kept: "before", cells: null, rows: [] };
  const size = trace.block.length;
  const read = trace.context.length;
  const masks = Array.from({ length: size }, () => ({ look: "mask" }));
  const steps = [
    {
      title: "A model that has read the prompt",
      words:
        `The context tower is an ordinary language model: it reads left to right. It has read ${read} tokens of prompt. ` +
        "A second network of the same shape, the denoiser, stands beside it and will write the next block.",
      context: true,
      kept: null,
    },
    {
      title: "What the context tower remembers",
      words:
        `An attention layer keeps keys and values of all ${read} tokens. A Mamba layer keeps a state of fixed size, and its ` +
        "last three inputs; the strips show how large the state is in each head. The other layers keep nothing.",
      context: true,
    },
    {
      title: `A block of ${size} masks`,
      words:
        `The next ${size} positions are all masked. The share still masked, t, is 1; the denoiser is told it, ` +
        "and scales its layers by it.",
      cells: masks,
    },
    {
      title: "Attention: the prompt, and the whole block",
      words:
        "Each layer of the denoiser reads the layer beside it. In attention, a position of the block sees the keys and values " +
        "of the prompt, and every other position of the block, to its left and to its right.",
      denoiser: true,
      links: "*",
      cells: masks,
    },
    {
      title: "Mamba: seeded with the state",
      words:
        "A Mamba layer runs through the block from left to right. It starts from the state that the context tower's layer " +
        "had at the end of the prompt, so that it knows what came before. It never changes that state.",
      denoiser: true,
      links: "M",
      cells: masks,
    },
    {
      title: "Without the seed, for comparison",
      words:
        "The same first pass with those states set to zero: attention still sees the prompt, and yet the guesses fall apart. " +
        "The number under a guess is the denoiser's confidence in it.",
      denoiser: true,
      links: "*",
      cells: trace.unseeded.texts.map((text, i) => ({ look: "guess", text, sure: trace.unseeded.confidence[i] })),
    },
  ];
  trace.passes.forEach((pass, at) => steps.push(...passSteps(trace, pass, at)));
  const rows = trace.passes.map((pass) => cellsOf(trace, pass, true));
  const last = trace.passes.length;
  const final = finalCells(trace);
  steps.push(
    {
      title: "Commit: the context tower reads the block",
      words:
        `Nothing is masked any more. The context tower reads the ${size} tokens in one pass: its keys and values now cover ` +
        `${read + size} tokens, and its Mamba states have moved on. The denoiser's own are thrown away.`,
      context: true,
      kept: "after",
      cells: final,
      rows,
    },
    {
      title: `${size} tokens in ${last} passes`,
      words:
        `The numbers say which pass made each token final: not from left to right. One token at a time would have taken ${size} passes; ` +
        `here it was ${last} of the denoiser and one of the context tower. The next block begins with masks again.`,
      kept: "after",
      rows,
      cells: final.map((cell) => ({ ...cell, note: `pass ${cell.pass + 1}` })),
    },
  );
  return steps.map((step) => ({ ...nothing, ...step }));
}

function passSteps(trace, pass, at) {
  const open = pass.masked.filter(Boolean).length;
  const chosen = pass.texts.map((_, i) => i).filter((i) => pass.commit[i]);
  const earlier = trace.passes.slice(0, at).map((one) => cellsOf(trace, one, true));
  const shown = (committed) => {
    const cells = cellsOf(trace, pass, committed);
    return { cells, rows: [...earlier, cells] };
  };
  const title = `Pass ${at + 1}`;
  const seen =
    open === pass.texts.length
      ? `All ${open} positions are masked (t = 1). `
      : `${open} of ${pass.texts.length} positions are masked (t = ${pass.t.toFixed(2)}). `;
  const guessing = `${seen}In one pass the denoiser says for all of them what it would put there, and how sure it is.`;
  const work = { denoiser: true, links: "M*" };
  if (at < IN_FULL) {
    return [
      { title: `${title}: guesses`, words: guessing + changes(trace, pass, at), ...work, ...shown(false) },
      { title: `${title}: ${become(chosen.length)}`, words: verdict(trace, pass, chosen), ...shown(true) },
    ];
  }
  const words = seen + verdict(trace, pass, chosen) + changes(trace, pass, at);
  return [{ title: `${title}: ${become(chosen.length)}`, words, ...work, ...shown(true) }];
}

function become(count) {
  return count === 1 ? "one token becomes final" : `${count} tokens become final`;
}

/** The block as a pass leaves it; before the choice of what is final, unless that is `committed`. */
function cellsOf(trace, pass, committed) {
  const final = finalCells(trace);
  return pass.texts.map((text, i) => {
    const sure = pass.confidence[i];
    if (!pass.masked[i]) return final[i];
    return pass.commit[i] && committed ? { look: "final", text, sure, fresh: true } : { look: "guess", text, sure };
  });
}

/** Why these were chosen. */
function verdict(trace, pass, chosen) {
  const surer = chosen.filter((i) => pass.confidence[i] > trace.threshold);
  if (!surer.length) {
    const [i] = chosen;
    return (
      `No guess is surer than γ = ${trace.threshold}, so the surest one, ${named(pass.texts[i])} with ` +
      `${pass.confidence[i].toFixed(2)}, becomes final: every pass gets at least one token done.`
    );
  }
  const list = surer.map((i) => named(pass.texts[i])).join(", ");
  const rule = surer.length === 1 ? "is surer" : "are surer";
  return `${list} ${rule} than γ = ${trace.threshold}: final, and never masked again. The rest stays masked.`;
}

/** Where it thinks otherwise than a pass ago, now that it sees more. */
function changes(trace, pass, at) {
  const previous = trace.passes[at - 1];
  if (!previous) return "";
  const changed = pass.texts.map((_, i) => i).filter((i) => pass.masked[i] && pass.texts[i] !== previous.texts[i]);
  if (!changed.length) return "";
  const [i] = changed;
  const others = changed.length > 1 ? `, and at ${changed.length - 1} more position${changed.length > 2 ? "s" : ""}` : "";
  return ` It changed its mind: ${named(previous.texts[i])} is now ${named(pass.texts[i])}${others}.`;
}

/** The finished block: each token with the confidence that it was committed with, and its pass. */
function finalCells(trace) {
  return trace.block.map((text, i) => {
    const pass = trace.passes.findIndex((one) => one.commit[i]);
    return { look: "final", text, sure: trace.passes[pass].confidence[i], pass };
  });
}
