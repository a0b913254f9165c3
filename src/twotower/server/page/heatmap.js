// The heatmap: for each block and position, the denoising step that committed the token.

import { chip, el, quoted, visible } from "./tokens.js";

const CELLS_PER_ROW = 16; // in rows of tokens that the context tower generated without a draft

export class Heatmap {
  constructor({ card, caption, table, detail }) {
    Object.assign(this, { card, caption, table, detail });
    table.addEventListener("keydown", (event) => this.moveFocus(event));
    for (const name of ["focusin", "mouseover", "click"]) {
      table.addEventListener(name, (event) => this.describe(event.target.closest("td[data-index]")));
    }
  }

  /** Shows a complete recording. */
  load(recording) {
    this.recording = recording;
    const rows = rowsOf(recording.tokens);
    this.card.hidden = !rows.length;
    if (!rows.length) return;
    const steps = Math.max(...recording.tokens.map((token) => (token.fromContext ? 0 : token.step)));
    const width = Math.max(...rows.map((row) => row.cells.length));
    this.caption.textContent =
      "Each row is a block, each column a position in the block. The number is the denoising step that committed the " +
      "token; later steps have a stronger colour." +
      (recording.tokens.some((token) => token.fromContext)
        ? " “c” marks tokens from the context tower; tokens without a draft share rows."
        : "");
    const head = el("tr", {}, [
      el("th", { scope: "col" }, el("span", { class: "hidden" }, "block")),
      ...Array.from({ length: width }, (_, i) => el("th", { scope: "col" }, String(i + 1))),
    ]);
    const body = rows.map((row) =>
      el("tr", {}, [el("th", { scope: "row" }, row.name), ...row.cells.map((index) => this.cell(index, steps))]),
    );
    this.described = null;
    const look = width > CELLS_PER_ROW ? "heatmap wide" : "heatmap";
    const table = el("table", { class: look, role: "grid" }, [el("thead", {}, head), el("tbody", {}, body)]);
    this.table.replaceChildren(table);
    this.cells = [...this.table.querySelectorAll("td")];
    this.cells[0].tabIndex = 0;
    this.detail.textContent = "Point at a cell for details, or move with Tab and the arrow keys.";
  }

  clear() {
    this.recording = null;
    this.cells = [];
    this.table.replaceChildren();
    this.card.hidden = true;
  }

  /** Hides the tokens that are not final at t ms. */
  show(t) {
    this.cells?.forEach((cell) => cell.classList.toggle("later", this.recording.tokens[cell.dataset.index].at > t));
  }

  cell(index, steps) {
    const token = this.recording.tokens[index];
    const share = token.fromContext ? 0 : steps ? token.step / steps : 0;
    const label = token.fromContext ? "c" : String(token.step + 1);
    const look = token.fromContext ? "from-context" : share > 0.5 ? "late" : "early";
    const cell = el("td", { "data-index": index, tabindex: "-1", class: look }, [
      el("span", { class: "when" }, label),
      el("span", { class: "what" }, visible(token.text).trim() || "␣"),
    ]);
    cell.style.setProperty("--share", `${Math.round(100 * share)}%`);
    cell.setAttribute("aria-label", description(token));
    return cell;
  }

  describe(cell) {
    if (!cell || cell === this.described) return;
    this.described = cell;
    const token = this.recording.tokens[cell.dataset.index];
    this.detail.replaceChildren(chip(token, "final"), ` ${description(token)}`);
  }

  /** Moves the focus by arrow keys. One cell at a time is in the Tab order. */
  moveFocus(event) {
    const from = event.target.closest("td");
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!from || !move) return;
    event.preventDefault();
    const row = from.parentElement;
    const rows = [...row.parentElement.children];
    const to = rows[rows.indexOf(row) + move[0]]?.children[from.cellIndex + move[1]];
    if (to?.tagName !== "TD") return;
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
}

function description(token) {
  const where = token.undrafted ? "" : `, block ${token.block + 1}, position ${token.position + 1}`;
  const when = token.fromContext ? "from the context tower" : `committed in step ${token.step + 1}`;
  return `${quoted(token.text)}${where}: ${when}, confidence ${token.confidence.toFixed(2)}`;
}

/** Rows of token indices: one row per block; tokens without a draft share rows. */
function rowsOf(tokens) {
  if (tokens[0]?.confidence == null) return []; // mode ar or mock_ar: tokens have no step
  const rows = [];
  tokens.forEach((token, index) => {
    const last = rows.at(-1);
    const joins =
      last && (token.undrafted ? last.undrafted && last.cells.length < CELLS_PER_ROW : last.block === token.block);
    if (joins) last.cells.push(index);
    else rows.push({ block: token.block, undrafted: token.undrafted, cells: [index] });
  });
  for (const row of rows) {
    const [first, last] = [row.cells[0], row.cells.at(-1)].map((index) => tokens[index].block + 1);
    row.name = first === last ? String(first) : `${first}–${last}`;
  }
  return rows;
}
