// The page: the form, the comparison of the selected mode with AR, and the views of both runs.

import { ApiError, key, model, stream } from "./api.js";
import { Heatmap } from "./heatmap.js";
import { How } from "./how.js";
import { Panel } from "./panel.js";
import { Recording } from "./recording.js";
import { Replay } from "./replay.js";
import { copy, curl, python } from "./snippets.js";
import { el, legend } from "./tokens.js";

const find = (id) => document.getElementById(id);
const form = find("form");

// Prompts of tasks that the bundled model was trained on.
const EXAMPLES = [
  ["Column addition", { prompt: "Add: 4821 + 3579 =>", max_tokens: 64, threshold: 0.95 }],
  ["Book a flight", { prompt: "User: I need a flight to Paris.\nAssistant:", max_tokens: 64, threshold: 0.95 }],
  [
    "Word problem",
    {
      prompt: "Story: Mia has 4 boxes of 6 pens. Mia finds 13. How many pens does Mia have? =>",
      max_tokens: 48,
      threshold: 0.95,
    },
  ],
  ["Sort numbers", { prompt: "Sort: 64 12 87 35 50 29 71 =>", max_tokens: 32, threshold: 0.95 }],
  [
    "Facts as JSON",
    {
      prompt: "Json: Sam | pet, seats, job | Sam works as a lawyer. A table for 2, says Sam. Sam keeps a fish. =>",
      max_tokens: 48,
      threshold: 0.95,
    },
  ],
];

// name: in the menu and in titles; uses: the fields that the mode accepts (the server rejects them in other modes).
const MODES = {
  diffusion: {
    name: "Diffusion",
    uses: ["threshold", "block_size", "steps"],
    hint:
      "The denoiser fills a block in several passes. " +
      "Each pass commits the tokens whose confidence is above γ, at least one.",
  },
  verified: {
    name: "Verified",
    uses: ["threshold", "block_size", "draft_steps"],
    hint:
      "The denoiser drafts tokens in a few passes, and the context tower verifies them in one. The text is the AR " +
      "text: exactly in fp32 and float64, up to near ties in bf16. Without a number of passes per draft, the server " +
      "chooses it by speed.",
  },
  auto: {
    name: "Auto",
    uses: ["threshold", "block_size", "steps"],
    hint:
      "Chooses AR, verified or diffusion for each request, from measured pass times and recent acceptance. " +
      "The choice, and so the text, can differ between runs with the same seed.",
  },
  ar: { name: "AR", uses: [], hint: "The context tower alone, one token per pass." },
  mock_ar: {
    name: "Mock AR",
    uses: [],
    hint: "The denoiser as a next-token predictor, one token per pass. Its training does not include this task.",
  },
};
const BLOCK_MODES = ["diffusion", "verified", "auto"];
const WARM_UP_TOKENS = 8;

const panels = [new Panel(find("panel-mode"), "Diffusion"), new Panel(find("panel-ar"), "AR")];
const replay = new Replay(find("replay"), show);
const heatmap = new Heatmap({
  card: find("heatmap-card"),
  caption: find("heatmap-caption"),
  table: find("heatmap"),
  detail: find("heatmap-detail"),
});
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const warm = new Set(); // requests that have been warmed up
let card = null; // the model card
let running = null; // the AbortController of a running comparison
let language = curl;
let modeSelected = false; // by the user; until then the form has the server's default mode

// --- the form --------------------------------------------------------------------------------------------------------

/** The request that the form describes, without empty fields and without fields that the mode does not accept. */
function readForm(mode = form.elements.mode.value) {
  const out = { prompt: form.elements.prompt.value, mode };
  const numbers = ["max_tokens", "temperature", "seed", ...(MODES[mode]?.uses ?? [])];
  for (const name of numbers) {
    const field = form.elements[name];
    if (field.validity.badInput) {
      const message = `${labelOf(field)} must be a number; correct the value or leave the field empty.`;
      throw new ApiError(message, { param: name });
    }
    if (field.value !== "") out[name] = Number(field.value);
  }
  return out;
}

function labelOf(field) {
  return form.querySelector(`label[for="${field.id}"]`)?.textContent ?? field.name;
}

/** The request with an event for every denoising pass, in modes that fill blocks. */
function withDenoising(request) {
  return BLOCK_MODES.includes(request.mode) ? { ...request, stream_denoising: true } : request;
}

function updateForm() {
  const mode = form.elements.mode.value;
  for (const field of form.querySelectorAll("[data-for]")) {
    field.hidden = !MODES[mode]?.uses.includes(field.dataset.for);
  }
  find("mode-hint").textContent = MODES[mode]?.hint ?? "";
  find("threshold-range").value = form.elements.threshold.value;
  const origin = new URL("./", location.href).href.replace(/[?#].*/, "");
  try {
    find("code").textContent = language(readForm(), origin, card?.id ?? "small");
  } catch (error) {
    find("code").textContent = error.message;
  }
}

function applyExample(example) {
  const { prompt, ...numbers } = example;
  form.elements.prompt.value = prompt;
  for (const [name, value] of Object.entries(numbers)) form.elements[name].value = value;
  updateForm();
}

function showModel() {
  const modes = card?.modes ?? Object.keys(MODES);
  const menu = form.elements.mode;
  const before = (modeSelected && menu.value) || card?.default_mode || "diffusion";
  menu.replaceChildren(...modes.map((mode) => new Option(MODES[mode]?.name ?? mode, mode)));
  menu.value = modes.includes(before) ? before : modes[0];
  if (card) {
    const length = card.max_model_len.toLocaleString("en");
    find("served").textContent = `Serving ${card.id}: up to ${length} tokens per sequence`;
    form.elements.block_size.max = card.block_size;
    if (Number(form.elements.block_size.value) > card.block_size) form.elements.block_size.value = card.block_size;
  }
  updateForm();
}

async function fetchModel() {
  try {
    card = await model();
    find("key-field").hidden = !key.get();
    setStatus("");
    showError(null);
    showModel();
  } catch (error) {
    handleError(error);
  }
}

// --- messages --------------------------------------------------------------------------------------------------------

function setStatus(words) {
  find("status").textContent = words;
}

function showError(error) {
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  find("error").hidden = !error;
  find("error").textContent = error?.message ?? "";
  const field = error?.param && form.elements[error.param];
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", "error");
    field.focus();
  }
}

function handleError(error) {
  if (error.name === "AbortError") {
    setStatus("Stopped.");
    return;
  }
  setStatus("");
  if (!(error instanceof ApiError)) {
    showError(new ApiError(`The page has failed: ${error.message}. Reload it`));
    throw error;
  }
  showError(error);
  if (error.status === 401) {
    find("key-field").hidden = false;
    find("key").focus();
  }
}

// --- the comparison --------------------------------------------------------------------------------------------------

async function compare() {
  showError(null);
  let request;
  try {
    request = readForm();
  } catch (error) {
    handleError(error);
    return;
  }
  const requests = request.mode === "ar" ? [request] : [request, readForm("ar")];
  running = new AbortController();
  setBusy(true);
  replay.clear();
  heatmap.clear();
  panels[1].root.hidden = requests.length < 2;
  requests.forEach((request, i) => {
    panels[i].title.textContent = titleOf(request);
    panels[i].clear(request.prompt);
  });
  find("comparison").scrollIntoView({ block: "nearest", behavior: reducedMotion.matches ? "auto" : "smooth" });
  const recordings = [];
  try {
    if (!card) await fetchModelOnce();
    for (const request of requests) await warmUp(request);
    for (const [i, request] of requests.entries()) {
      setStatus(`Running ${MODES[request.mode].name} …`);
      recordings.push(await run(request, panels[i]));
    }
    finish(recordings);
  } catch (error) {
    panels.forEach((panel) => panel.interrupt());
    handleError(error);
  } finally {
    running = null;
    setBusy(false);
  }
}

function titleOf(request) {
  const { name, uses } = MODES[request.mode];
  const threshold = uses.includes("threshold") && "threshold" in request ? `, γ ${request.threshold}` : "";
  const size = uses.includes("block_size") && "block_size" in request ? `, block size ${request.block_size}` : "";
  return name + threshold + size;
}

async function fetchModelOnce() {
  card = await model();
  showModel();
}

/** Runs a few tokens of a request without showing them, so that one-time costs do not count in the comparison. */
async function warmUp(request) {
  const id = JSON.stringify([request.prompt, request.mode, request.block_size]);
  if (warm.has(id) || !(request.max_tokens > WARM_UP_TOKENS)) return;
  setStatus("Warming up …");
  for await (const _ of stream(withDenoising({ ...request, max_tokens: WARM_UP_TOKENS }), running.signal));
  warm.add(id);
}

async function run(request, panel) {
  const recording = new Recording({ block_size: card?.block_size, ...request }, performance.now());
  let drawn = 0;
  const draw = () => {
    drawn = 0;
    if (!recording.end) panel.show(recording, performance.now() - recording.started);
  };
  const clock = setInterval(() => (drawn ||= requestAnimationFrame(draw)), 50); // the clock also runs between events
  try {
    for await (const { chunk, at } of stream(withDenoising(request), running.signal)) {
      recording.add(chunk, at);
      drawn ||= requestAnimationFrame(draw);
    }
  } finally {
    clearInterval(clock);
    cancelAnimationFrame(drawn);
  }
  panel.show(recording, recording.length);
  return recording;
}

function finish(recordings) {
  const [first] = recordings;
  heatmap.load(first);
  replay.load(recordings);
  panels.forEach((panel) => panel.lockHeight());
  setStatus(summary(recordings));
  if (!reducedMotion.matches) replay.play();
}

/** The status line after a comparison, with the figures of the panels. */
function summary([selected, ar]) {
  const name = MODES[selected.request.mode].name;
  const speed = ({ count, end }) => count / end.seconds;
  const figures = `${name}: ${selected.count} tokens in ${selected.end.seconds.toFixed(3)} s.`;
  const { mode, mode_reason: reason } = selected.end.decoding ?? {};
  const modeReason = reason ? ` Auto chose ${mode}: ${reason}.` : "";
  if (!ar) return figures + modeReason;
  const ratio = speed(selected) / speed(ar);
  const same = selected.text === ar.text ? "The texts are identical." : "The texts differ.";
  return (
    `${figures} AR: ${ar.count} tokens in ${ar.end.seconds.toFixed(3)} s. ` +
    `${name} generated ${ratio.toFixed(2)}× as many tokens per second. ${same}${modeReason}`
  );
}

function show(t) {
  replay.recordings.forEach((recording, i) => panels[i].show(recording, t));
  heatmap.show(t);
}

function setBusy(busy) {
  find("run").disabled = busy;
  find("stop").hidden = !busy;
  find("comparison").setAttribute("aria-busy", busy);
}

// --- sections of the page --------------------------------------------------------------------------------------------

const how = new How(find("how-body"));

function showSection() {
  const part = location.hash === "#how" ? "how" : "try";
  for (const id of ["try", "how"]) {
    find(id).hidden = id !== part;
    const link = document.querySelector(`nav a[href="#${id}"]`);
    if (id === part) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  how.active = part === "how";
  if (how.active) how.open();
}

find("examples").append(
  ...EXAMPLES.map(([name, example]) => {
    const button = el("button", { type: "button" }, name);
    button.addEventListener("click", () => applyExample(example));
    return button;
  }),
);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) compare();
});
form.addEventListener("change", (event) => {
  if (event.target.id === "mode") modeSelected = true;
  updateForm();
});
form.addEventListener("input", (event) => {
  if (event.target.id === "threshold-range") form.elements.threshold.value = event.target.value;
  if (event.target.id === "key") key.set(event.target.value.trim());
  updateForm();
});
find("key").addEventListener("change", () => !card && fetchModel());
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
find("stop").addEventListener("click", () => running?.abort());
for (const [id, snippet] of [["show-curl", curl], ["show-python", python]]) {
  find(id).addEventListener("click", () => {
    language = snippet;
    find("show-curl").setAttribute("aria-pressed", snippet === curl);
    find("show-python").setAttribute("aria-pressed", snippet === python);
    updateForm();
  });
}
find("copy").addEventListener("click", async () => {
  const done = await copy(find("code"));
  find("copy").textContent = done ? "Copied" : "Not copied: press Ctrl + C";
  setTimeout(() => (find("copy").textContent = "Copy"), 2000);
});
addEventListener("hashchange", showSection);

legend(find("legend"));
key.get() && (find("key").value = key.get());
showModel();
applyExample(EXAMPLES[0][1]);
showSection();
fetchModel();
