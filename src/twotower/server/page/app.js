// The page: the form, the race of the chosen mode and AR, and what is shown of it.

import { Refusal, key, model, stream } from "./api.js";
import { Heat } from "./heat.js";
import { How } from "./how.js";
import { Lane } from "./lane.js";
import { Recording } from "./record.js";
import { Replay } from "./replay.js";
import { copy, curl, python } from "./snippets.js";
import { el, legend } from "./tokens.js";

const find = (id) => document.getElementById(id);
const form = find("form");

// Prompts of kinds that the bundled model was trained on.
const EXAMPLES = [
  ["Column addition", { prompt: "Add: 4821 + 3579 =>", max_tokens: 64, threshold: 0.8 }],
  ["Book a flight", { prompt: "User: I need a flight to Paris.\nAssistant:", max_tokens: 64, threshold: 0.8 }],
  ["Word problem", { prompt: "Story: Mia has 4 boxes of 6 pens. Mia finds 13. How many pens does Mia have? =>", max_tokens: 48, threshold: 0.8 }],
  ["Sort numbers", { prompt: "Sort: 64 12 87 35 50 29 71 =>", max_tokens: 32, threshold: 0.8 }],
];

// name: in a menu and as a title; uses: fields that mean something in the mode and are refused in others.
const MODES = {
  diffusion: {
    name: "Diffusion",
    uses: ["threshold", "block_size", "steps"],
    hint: "The denoiser fills each block; a pass makes final what is surer than γ, and at least one token.",
  },
  verified: {
    name: "Verified",
    uses: ["threshold", "block_size"],
    hint: "The denoiser drafts a block and the context tower checks it: the text is AR's, token for token.",
  },
  auto: {
    name: "Auto",
    uses: ["threshold", "block_size", "steps"],
    hint: "Picks AR, verified or diffusion by what passes cost and drafts were worth so far.",
  },
  ar: { name: "AR", uses: [], hint: "The context tower alone, one token a pass." },
  mock_ar: {
    name: "Mock AR",
    uses: [],
    hint: "The denoiser as a next-token predictor, which learning to fill blocks does not ask of it.",
  },
};
const FILLS_BLOCKS = ["diffusion", "verified", "auto"];
const WARM_UP = 8; // tokens

const lanes = [new Lane(find("lane-mode"), "Diffusion"), new Lane(find("lane-ar"), "AR")];
const replay = new Replay(find("replay"), show);
const heat = new Heat({ card: find("heat-card"), says: find("heat-says"), table: find("heat"), detail: find("heat-detail") });
const still = matchMedia("(prefers-reduced-motion: reduce)");
const warm = new Set(); // what was warmed up already
let card = null; // what the server says of its model
let running = null; // the AbortController of a race
let language = curl;
let modeChosen = false; // by the reader; until then it is the server's own

// --- the form -------------------------------------------------------------------------------------------------------

/** The request that the form describes. Fields left empty are left out, and so are those that mean nothing. */
function asked(mode = form.elements.mode.value) {
  const out = { prompt: form.elements.prompt.value, mode };
  const numbers = ["max_tokens", "temperature", "seed", ...(MODES[mode]?.uses ?? [])];
  for (const name of numbers) {
    const field = form.elements[name];
    if (field.validity.badInput) throw new Refusal(`${labelOf(field)}: this is not a number.`, { param: name });
    if (field.value !== "") out[name] = Number(field.value);
  }
  return out;
}

function labelOf(field) {
  return form.querySelector(`label[for="${field.id}"]`)?.textContent ?? field.name;
}

/** What goes out: the same, as a stream that shows every pass where there are blocks. */
function watched(request) {
  return FILLS_BLOCKS.includes(request.mode) ? { ...request, stream_denoising: true } : request;
}

function formChanged() {
  const mode = form.elements.mode.value;
  for (const field of form.querySelectorAll("[data-for]")) {
    field.hidden = !MODES[mode]?.uses.includes(field.dataset.for);
  }
  find("mode-hint").textContent = MODES[mode]?.hint ?? "";
  find("threshold-range").value = form.elements.threshold.value;
  const origin = new URL("./", location.href).href.replace(/[?#].*/, "");
  try {
    find("code").textContent = language(asked(), origin, card?.id ?? "small");
  } catch (error) {
    find("code").textContent = error.message;
  }
}

function fillIn(example) {
  const { prompt, ...numbers } = example;
  form.elements.prompt.value = prompt;
  for (const [name, value] of Object.entries(numbers)) form.elements[name].value = value;
  formChanged();
}

function showModel() {
  const modes = card?.modes ?? Object.keys(MODES);
  const menu = form.elements.mode;
  const before = (modeChosen && menu.value) || card?.default_mode || "diffusion";
  menu.replaceChildren(...modes.map((mode) => new Option(MODES[mode]?.name ?? mode, mode)));
  menu.value = modes.includes(before) ? before : modes[0];
  if (card) {
    find("served").textContent = `Serving ${card.id}: texts of up to ${card.max_model_len.toLocaleString("en")} tokens`;
    form.elements.block_size.max = card.block_size;
    if (Number(form.elements.block_size.value) > card.block_size) form.elements.block_size.value = card.block_size;
  }
  formChanged();
}

async function learnModel() {
  try {
    card = await model();
    find("key-field").hidden = !key.get();
    say("");
    complain(null);
    showModel();
  } catch (error) {
    tell(error);
  }
}

// --- words ----------------------------------------------------------------------------------------------------------

function say(words) {
  find("status").textContent = words;
}

function complain(error) {
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

function tell(error) {
  if (error.name === "AbortError") {
    say("Stopped.");
    return;
  }
  say("");
  if (!(error instanceof Refusal)) {
    complain(new Refusal(`The page itself failed: ${error.message}`));
    throw error;
  }
  complain(error);
  if (error.status === 401) {
    find("key-field").hidden = false;
    find("key").focus();
  }
}

// --- the race -------------------------------------------------------------------------------------------------------

async function race() {
  complain(null);
  let request;
  try {
    request = asked();
  } catch (error) {
    tell(error);
    return;
  }
  const rivals = request.mode === "ar" ? [request] : [request, asked("ar")];
  running = new AbortController();
  working(true);
  replay.clear();
  heat.clear();
  lanes[1].root.hidden = rivals.length < 2;
  rivals.forEach((rival, i) => {
    lanes[i].title.textContent = titleOf(rival);
    lanes[i].clear(rival.prompt);
  });
  find("race").scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
  const recordings = [];
  try {
    if (!card) await learnQuietly();
    for (const rival of rivals) await warmUp(rival);
    for (const [i, rival] of rivals.entries()) {
      say(`${MODES[rival.mode].name} is running …`);
      recordings.push(await run(rival, lanes[i]));
    }
    finish(recordings);
  } catch (error) {
    tell(error);
  } finally {
    running = null;
    working(false);
  }
}

function titleOf(request) {
  const { name, uses } = MODES[request.mode];
  const threshold = uses.includes("threshold") && "threshold" in request ? `, γ ${request.threshold}` : "";
  const size = uses.includes("block_size") && "block_size" in request ? `, blocks of ${request.block_size}` : "";
  return name + threshold + size;
}

async function learnQuietly() {
  card = await model();
  showModel();
}

/** A few tokens of the same request, unseen: whoever runs first would pay for what is done once. */
async function warmUp(request) {
  const known = JSON.stringify([request.prompt, request.mode, request.block_size]);
  if (warm.has(known) || !(request.max_tokens > WARM_UP)) return;
  say("Warming up …");
  for await (const _ of stream(watched({ ...request, max_tokens: WARM_UP }), running.signal));
  warm.add(known);
}

async function run(request, lane) {
  const recording = new Recording({ block_size: card?.block_size, ...request }, performance.now());
  let drawn = 0;
  const draw = () => {
    drawn = 0;
    if (!recording.end) lane.show(recording, performance.now() - recording.started);
  };
  const clock = setInterval(() => (drawn ||= requestAnimationFrame(draw)), 50); // while nothing arrives, time goes on
  try {
    for await (const { chunk, at } of stream(watched(request), running.signal)) {
      recording.add(chunk, at);
      drawn ||= requestAnimationFrame(draw);
    }
  } finally {
    clearInterval(clock);
    cancelAnimationFrame(drawn);
  }
  lane.show(recording, recording.length);
  return recording;
}

function finish(recordings) {
  const [first] = recordings;
  heat.load(first);
  replay.load(recordings); // shows the end
  lanes.forEach((lane) => lane.hold());
  say(summary(recordings));
  if (!still.matches) replay.play();
}

/** What came of it, with the figures that the lanes show. */
function summary([own, ar]) {
  const name = MODES[own.asked.mode].name;
  const speed = ({ count, end }) => count / end.seconds;
  const one = `${name}: ${own.count} tokens in ${own.end.seconds.toFixed(3)} s.`;
  const why = own.end.decoding?.why ? ` It chose ${own.end.decoding.mode}: ${own.end.decoding.why}.` : "";
  if (!ar) return one + why;
  const times = speed(own) / speed(ar);
  const same = own.text === ar.text ? "Both wrote the same text." : "The texts differ.";
  return (
    `${one} AR: ${ar.count} tokens in ${ar.end.seconds.toFixed(3)} s. ` +
    `${name} made ${times.toFixed(2)}× as many tokens a second here. ${same}${why}`
  );
}

function show(t) {
  replay.recordings.forEach((recording, i) => lanes[i].show(recording, t));
  heat.show(t);
}

function working(now) {
  find("run").disabled = now;
  find("stop").hidden = !now;
  find("race").setAttribute("aria-busy", now);
}

// --- the parts of the page ------------------------------------------------------------------------------------------

const how = new How(find("how-body"));

function route() {
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
    button.addEventListener("click", () => fillIn(example));
    return button;
  }),
);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) race();
});
form.addEventListener("change", (event) => {
  if (event.target.id === "mode") modeChosen = true;
  formChanged();
});
form.addEventListener("input", (event) => {
  if (event.target.id === "threshold-range") form.elements.threshold.value = event.target.value;
  if (event.target.id === "key") key.set(event.target.value.trim());
  formChanged();
});
find("key").addEventListener("change", () => !card && learnModel());
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
find("stop").addEventListener("click", () => running?.abort());
for (const [id, made] of [["show-curl", curl], ["show-python", python]]) {
  find(id).addEventListener("click", () => {
    language = made;
    find("show-curl").setAttribute("aria-pressed", made === curl);
    find("show-python").setAttribute("aria-pressed", made === python);
    formChanged();
  });
}
find("copy").addEventListener("click", async () => {
  const done = await copy(find("code"));
  find("copy").textContent = done ? "Copied" : "Not copied: press Ctrl + C";
  setTimeout(() => (find("copy").textContent = "Copy"), 2000);
});
addEventListener("hashchange", route);

legend(find("legend"));
key.get() && (find("key").value = key.get());
showModel();
fillIn(EXAMPLES[0][1]);
route();
learnModel();
