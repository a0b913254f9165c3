// The replay: both recordings on one clock, at true speed or slower, with a slider.

const SPEEDS = [1, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01];
const TARGET_DURATION = 8000; // ms of a replay, unless the user has chosen a speed

export class Replay {
  /** show(t): draws the page as it was at t ms. */
  constructor(root, show) {
    this.root = root;
    this.show = show;
    this.find = (id) => root.querySelector(`#${id}`);
    this.slider = this.find("clock");
    this.playing = false;
    this.speedChosen = false; // by the user
    this.recordings = [];
    const speed = this.find("speed");
    speed.append(...SPEEDS.map((value) => new Option(value === 1 ? "true speed" : `${value}×`, value)));
    speed.addEventListener("change", () => (this.speedChosen = true));
    this.slider.addEventListener("input", () => this.seek(Number(this.slider.value)));
    this.slider.addEventListener("keydown", (event) => this.onKeydown(event));
    this.find("play").addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.find("back").addEventListener("click", () => this.step(-1));
    this.find("forward").addEventListener("click", () => this.step(1));
  }

  /** Takes the recordings of a comparison (the selected mode first) and shows their end. */
  load(recordings) {
    this.pause();
    this.recordings = recordings;
    this.length = Math.max(...recordings.map((recording) => recording.length));
    this.moments = momentsOf(recordings);
    this.slider.max = this.length;
    if (!this.speedChosen) {
      this.find("speed").value = SPEEDS.find((speed) => this.length / speed >= TARGET_DURATION / 2) ?? SPEEDS.at(-1);
    }
    this.drawTicks();
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

  /** Moves to the previous (-1) or next (1) pass. */
  step(direction) {
    const tolerance = 1e-6;
    const next =
      direction > 0
        ? this.moments.find((t) => t > this.t + tolerance)
        : this.moments.findLast((t) => t < this.t - tolerance);
    this.seek(next ?? (direction > 0 ? this.length : 0));
  }

  move(t) {
    this.t = Math.min(Math.max(t, 0), this.length);
    this.slider.value = this.t;
    const [first] = this.recordings;
    const frame = first.frameAt(this.t);
    const all = first.end?.usage?.passes ?? first.frames.at(-1).passes;
    const words = `${(this.t / 1000).toFixed(3)} s, pass ${frame.event === "end" ? all : frame.passes} of ${all}`;
    this.slider.setAttribute("aria-valuetext", words);
    this.find("moment").textContent = words;
    this.show(this.t);
  }

  onKeydown(event) {
    const direction = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (direction) this.step(direction);
    else if (event.key === "Home") this.seek(0);
    else if (event.key === "End") this.seek(this.length);
    else if (event.key === " ") this.find("play").click();
    else return;
    event.preventDefault();
  }

  /** Draws a tick for each pass above the slider, one row per recording. */
  drawTicks() {
    const svg = this.find("ticks");
    svg.setAttribute("viewBox", "0 0 1000 22");
    svg.setAttribute("preserveAspectRatio", "none");
    const rows = this.recordings.map((recording, row) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      const frames = recording.frames.filter((frame) => ["pass", "token", "end"].includes(frame.event));
      const y = row * 12;
      path.setAttribute("d", frames.map(({ t }) => `M${((1000 * t) / this.length).toFixed(1)} ${y}v9`).join(""));
      path.setAttribute("class", `row-${row}`);
      return path;
    });
    svg.replaceChildren(...rows);
  }
}

/** Times of the frames: those of the selected mode, then those of AR after the selected mode has ended. */
function momentsOf([first, second]) {
  const own = first.frames.map((frame) => frame.t);
  const later = second?.frames.map((frame) => frame.t).filter((t) => t > first.length) ?? [];
  return [...own, ...later];
}
