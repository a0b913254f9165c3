// The stream of one request as a recording: its final tokens, and a frame for each moment at which something changed.
//
// Fields of a frame:
//
// - t: ms since the request was sent.
// - event: "start", "pass", "commit", "token" or "end".
// - final: number of final tokens; generated: with the tokens of the open block; passes: number of passes.
// - block: cells of the open block, or null; draft: whether the block is an unverified draft.
// - rejected: texts of rejected drafted tokens; accepted: number of accepted drafted tokens in a commit, or null.
// - number: number of the block; step, steps: of a pass.

const MIN_GAP = 0.01; // ms between two frames, so that events which arrive together stay separate

export class Recording {
  constructor(request, started) {
    this.request = request;
    this.started = started;
    this.tokens = []; // {text, confidence, step, block, position, fromContext, undrafted, at}
    this.blocks = 0;
    this.text = "";
    this.passes = 0;
    this.end = null; // {reason, decoding, usage, seconds}
    this.last = null; // the latest event of the open block
    this.frames = [];
    const size = request.mode === "diffusion" ? request.block_size : 0;
    const mask = { text: "", masked: true, confidence: 0, empty: true };
    this.maskedBlock = size ? Array.from({ length: size }, () => ({ ...mask })) : null;
    this.addFrame(0, { event: "start", block: this.maskedBlock });
  }

  /** Adds one chunk of the stream, which arrived at `at` by performance.now(). */
  add(chunk, at) {
    const t = at - this.started;
    if (chunk.denoising) this.addPass(chunk.denoising, t);
    const choice = chunk.choices[0];
    if (choice) {
      this.text += choice.text;
      if (chunk.committed) this.addCommit(chunk.committed, choice, t);
      else if (choice.text) this.addToken(choice.text, t);
      if (choice.finish_reason) this.finish(choice, t);
    }
    if (chunk.usage) this.end.usage = chunk.usage;
  }

  /** The frame that was current at `t` ms. */
  frameAt(t) {
    let low = 0;
    let high = this.frames.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.frames[middle].t <= t) low = middle;
      else high = middle - 1;
    }
    return this.frames[low];
  }

  /** Duration in ms. */
  get length() {
    return this.frames.at(-1).t;
  }

  /** Number of new tokens, EOS included. */
  get count() {
    return this.end?.usage?.completion_tokens ?? this.tokens.length;
  }

  addPass(event, t) {
    if (event.steps) this.passes += 1; // 0: the pass that checked the tokens before has made this draft
    const before = this.last?.start === event.start ? this.last : null;
    this.known = this.tokens.length - event.start; // a draft begins with the token before the block
    const cells = event.texts.map((text, i) => ({
      text,
      masked: event.masked[i],
      confidence: event.confidence[i],
      known: i < this.known,
      fresh: !event.masked[i] && i >= this.known && (before ? before.masked[i] : true),
    }));
    cells.forEach((cell, i) => (cell.at = cell.fresh || !before ? t : before.cells[i].at));
    this.last = { ...event, cells };
    const draft = this.known > 0; // drafted tokens are not final before the context tower has verified them
    this.addFrame(t, { event: "pass", block: cells.slice(this.known), draft, step: event.step, steps: event.steps });
  }

  addCommit(event, choice, t) {
    const drafted = event.drafted;
    let accepted = 0;
    while (accepted < event.tokens.length && drafted[accepted] === event.tokens[accepted]) accepted += 1;
    const verified = drafted.length > 0 || !this.last || this.known > 0; // whether the context tower generated or verified the tokens
    if (verified) this.passes += 1;
    event.texts.forEach((text, i) => {
      this.tokens.push({
        text,
        confidence: event.confidence[i],
        step: event.committed_at[i],
        block: this.blocks,
        position: i,
        fromContext: verified && i >= accepted,
        undrafted: verified && !drafted.length,
        at: verified ? t : this.last.cells[i].at,
      });
    });
    const rejected = drafted.length && !choice.finish_reason ? this.last.texts.slice(this.known + accepted, this.known + drafted.length) : [];
    this.blocks += 1;
    this.last = null;
    if (choice.finish_reason) return;
    const block = verified ? null : this.maskedBlock;
    this.addFrame(t, { event: "commit", block, rejected, accepted: drafted.length ? accepted : null });
  }

  addToken(text, t) {
    this.passes += 1;
    this.tokens.push({ text, confidence: null, step: 0, block: 0, position: this.tokens.length, at: t });
    this.addFrame(t, { event: "token" });
  }

  finish(choice, t) {
    const decoding = choice.decoding ?? null;
    this.end = { reason: choice.finish_reason, decoding, usage: null, seconds: t / 1000 };
    this.addFrame(t, { event: "end" });
  }

  addFrame(t, fields) {
    const last = this.frames.at(-1);
    const block = fields.block ?? null;
    const open = fields.draft ? 0 : (block?.filter((cell) => !cell.masked).length ?? 0);
    this.frames.push({
      rejected: [],
      draft: false,
      step: null,
      steps: null,
      ...fields,
      block,
      t: last ? Math.max(t, last.t + MIN_GAP) : t,
      final: this.tokens.length,
      generated: this.tokens.length + open,
      passes: this.passes,
      number: this.blocks + 1,
    });
  }
}
