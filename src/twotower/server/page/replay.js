// The replay: both recordings on one clock, at true speed or slower, and a slider over it.

const SPEEDS = [1, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01];
const PLEASANT = 8000; // ms that a replay should take unless a reader chose a speed

export class Replay {
  /** show(t): draws everything as it was at t ms. */
  constructor(root, show) {
    this.root = root;
    this.show = show;
    this.find = (id) => root.querySelector(`#${id}`);
    this.slider = this.find("clock");
    this.playing = false;
    this.chosen = false; // whether the reader picked the speed
    this.recordings = [];
    const speed = this.find("speed");
    speed.append(...SPEEDS.map((value) => new Option(value === 1 ? "true speed" : `${value}×`, value)));
    speed.addEventListener("change", () => (this.chosen = true));
    this.slider.addEventListener("input", () => this.seek(Number(this.slider.value)));
    this.slider.addEventListener("keydown", (event) => this.key(event));
    this.find("play").addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.find("back").addEventListener("click", () => this.step(-1));
    this.find("ahead").addEventListener("click", () => this.step(1));
  }

  /** Takes the recordings of a race, the chosen mode's first, and shows their end. */
  load(recordings) {
    this.pause();
    this.recordings = recordings;
    this.length = Math.max(...recordings.map((one) => one.length));
    this.moments = moments(recordings);
    this.slider.max = this.length;
    if (!this.chosen) this.find("speed").value = SPEEDS.find((one) => this.length / one >= PLEASANT / 2) ?? SPEEDS.at(-1);
    this.ticks();
    this.root.hidden = false;
    this.seek(this.length);
  }

  clear() {
    this.pause();
    this.recordings = [];
    this.root.hidden = true;
  }

  play() {
    if (!this.recordings.length) return;
    if (this.t >= this.length) this.seek(0);
    this.playing = true;
    this.find("play").textContent = "Pause";
    let last = performance.now();
    const tick = (now) => {
      if (!this.playing) return;
      this.move(this.t + (now - last) * Number(this.find("speed").value));
      last = now;
      if (this.t >= this.length) this.pause();
      else requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  pause() {
    this.playing = false;
    this.find("play").textContent = "Play";
  }

  seek(t) {
    this.pause();
    this.move(t);
  }

  /** To the pass before or after this moment. */
  step(direction) {
    const nearly = 1e-6;
    const next =
      direction > 0
        ? this.moments.find((t) => t > this.t + nearly)
        : this.moments.findLast((t) => t < this.t - nearly);
    this.seek(next ?? (direction > 0 ? this.length : 0));
  }

  move(t) {
    this.t = Math.min(Math.max(t, 0), this.length);
    this.slider.value = this.t;
    const [first] = this.recordings;
    const frame = first.at(this.t);
    const all = first.end?.usage?.passes ?? first.frames.at(-1).passes;
    const words = `${(this.t / 1000).toFixed(3)} s, pass ${frame.what === "end" ? all : frame.passes} of ${all}`;
    this.slider.setAttribute("aria-valuetext", words);
    this.find("moment").textContent = words;
    this.show(this.t);
  }

  key(event) {
    const direction = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (direction) this.step(direction);
    else if (event.key === "Home") this.seek(0);
    else if (event.key === "End") this.seek(this.length);
    else if (event.key === " ") this.find("play").click();
    else return;
    event.preventDefault();
  }

  /** A mark for every pass of each recording, above the slider's way. */
  ticks() {
    const svg = this.find("ticks");
    svg.setAttribute("viewBox", "0 0 1000 22");
    svg.setAttribute("preserveAspectRatio", "none");
    const rows = this.recordings.map((one, row) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      const at = one.frames.filter((frame) => frame.what === "pass" || frame.what === "token" || frame.what === "end");
      const y = row * 12;
      path.setAttribute("d", at.map(({ t }) => `M${((1000 * t) / this.length).toFixed(1)} ${y}v9`).join(""));
      path.setAttribute("class", `row-${row}`);
      return path;
    });
    svg.replaceChildren(...rows);
  }
}

/** When there is something new to see: by the chosen mode, and then by AR alone. */
function moments([first, second]) {
  const own = first.frames.map((frame) => frame.t);
  const later = second?.frames.map((frame) => frame.t).filter((t) => t > first.length) ?? [];
  return [...own, ...later];
}
