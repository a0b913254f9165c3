// One request's stream as a recording: the tokens that were settled, and a frame for every moment something changed.
//
// A frame: t (ms since the request was sent), settled (how many tokens are final), block (the open one's cells, or
// null), draft (whether it is still to be checked), rejected (drafted texts that the check threw away), passes, written (tokens so far, the open block's included),
// number (of the block), step, what ("pass", "commit", …).

const APART = 0.01; // ms: events that arrive together are still shown one after the other

export class Recording {
  constructor(asked, started) {
    this.asked = asked;
    this.started = started;
    this.tokens = []; // {text, confidence, step, block, place, own, at}
    this.blocks = 0;
    this.text = "";
    this.passes = 0;
    this.end = null; // {reason, decoding, usage, seconds}
    this.last = null; // the open block's latest event
    this.frames = [];
    const size = asked.mode === "diffusion" ? asked.block_size : 0;
    this.blank = size ? Array.from({ length: size }, () => ({ text: "", masked: true, confidence: 0, empty: true })) : null;
    this.frame(0, { what: "start", block: this.blank });
  }

  /** Takes one chunk of the stream. */
  add(chunk, at) {
    const t = at - this.started;
    if (chunk.denoising) this.pass(chunk.denoising, t);
    const choice = chunk.choices[0];
    if (choice) {
      this.text += choice.text;
      if (chunk.committed) this.commit(chunk.committed, choice, t);
      else if (choice.text) this.piece(choice.text, t);
      if (choice.finish_reason) this.finish(choice, t);
    }
    if (chunk.usage) this.end.usage = chunk.usage;
  }

  /** The frame that shows what there was at `t` ms. */
  at(t) {
    let low = 0;
    let high = this.frames.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.frames[middle].t <= t) low = middle;
      else high = middle - 1;
    }
    return this.frames[low];
  }

  get length() {
    return this.frames.at(-1).t;
  }

  /** New tokens; the end of the text counts. */
  get count() {
    return this.end?.usage?.completion_tokens ?? this.tokens.length;
  }

  pass(event, t) {
    this.passes += 1;
    const before = this.last?.start === event.start ? this.last : null;
    this.given = this.tokens.length - event.start; // a draft begins with the token written before it
    const cells = event.texts.map((text, i) => ({
      text,
      masked: event.masked[i],
      confidence: event.confidence[i],
      given: i < this.given,
      fresh: !event.masked[i] && i >= this.given && (before ? before.masked[i] : true),
    }));
    cells.forEach((cell, i) => (cell.at = cell.fresh || !before ? t : before.cells[i].at));
    this.last = { ...event, cells };
    const draft = this.given > 0; // to be checked: nothing in it is final yet
    this.frame(t, { what: "pass", block: cells.slice(this.given), draft, step: event.step, steps: event.steps });
  }

  commit(event, choice, t) {
    const drafted = event.drafted;
    let kept = 0;
    while (kept < event.tokens.length && drafted[kept] === event.tokens[kept]) kept += 1;
    const checked = drafted.length > 0 || !this.last; // the context tower had a pass of its own
    if (checked) this.passes += 1;
    event.texts.forEach((text, i) => {
      const own = checked && i >= kept;
      this.tokens.push({
        text,
        confidence: event.confidence[i],
        step: event.committed_at[i],
        block: this.blocks,
        place: i,
        own,
        alone: checked && !drafted.length,
        at: checked ? t : this.last.cells[i].at,
      });
    });
    const rejected = drafted.length && !choice.finish_reason ? this.last.texts.slice(this.given + kept) : [];
    this.blocks += 1;
    this.last = null;
    if (!choice.finish_reason) this.frame(t, { what: "commit", block: checked ? null : this.blank, rejected, kept: drafted.length ? kept : null });
  }

  piece(text, t) {
    this.passes += 1;
    this.tokens.push({ text, confidence: null, step: 0, block: 0, place: this.tokens.length, at: t });
    this.frame(t, { what: "token" });
  }

  finish(choice, t) {
    const decoding = choice.decoding ?? null;
    this.end = { reason: choice.finish_reason, decoding, usage: null, seconds: t / 1000 };
    this.frame(t, { what: "end" });
  }

  frame(t, facts) {
    const last = this.frames.at(-1);
    const block = facts.block ?? null;
    const open = facts.draft ? 0 : (block?.filter((cell) => !cell.masked).length ?? 0);
    this.frames.push({
      rejected: [],
      draft: false,
      step: null,
      steps: null,
      ...facts,
      block,
      t: last ? Math.max(t, last.t + APART) : t,
      settled: this.tokens.length,
      written: this.tokens.length + open,
      passes: this.passes,
      number: this.blocks + 1,
    });
  }
}
