// The heat map: for each block and position, the step that made the token there final.

import { chip, el, named, visible } from "./tokens.js";

const WIDE = 16; // cells in a row of tokens that the context tower wrote one by one

export class Heat {
  constructor({ card, says, table, detail }) {
    Object.assign(this, { card, says, table, detail });
    table.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["focusin", "mouseover", "click"]) {
      table.addEventListener(name, (event) => this.tell(event.target.closest("td[data-index]")));
    }
  }

  /** A recording that has ended. */
  load(recording) {
    this.recording = recording;
    const rows = rowsOf(recording.tokens);
    this.card.hidden = !rows.length;
    if (!rows.length) return;
    const steps = Math.max(...recording.tokens.map((token) => (token.own ? 0 : token.step)));
    const width = Math.max(...rows.map((row) => row.cells.length));
    this.says.textContent =
      "A row is a block, a column a position in it. The number is the step that made the token final: the paler, the earlier." +
      (recording.tokens.some((token) => token.own) ? " “c”: written by the context tower itself." : "");
    const head = el("tr", {}, [
      el("th", { scope: "col" }, el("span", { class: "hidden" }, "block")),
      ...Array.from({ length: width }, (_, i) => el("th", { scope: "col" }, String(i + 1))),
    ]);
    const body = rows.map((row) =>
      el("tr", {}, [el("th", { scope: "row" }, row.name), ...row.cells.map((index) => this.cell(index, steps))]),
    );
    this.told = null;
    this.table.replaceChildren(el("table", { class: width > WIDE ? "heat wide" : "heat", role: "grid" }, [el("thead", {}, head), el("tbody", {}, body)]));
    this.cells = [...this.table.querySelectorAll("td")];
    this.cells[0].tabIndex = 0;
    this.detail.textContent = "Point at a cell, or go there with Tab and the arrow keys.";
  }

  clear() {
    this.recording = null;
    this.cells = [];
    this.table.replaceChildren();
    this.card.hidden = true;
  }

  /** Fades what is not yet final at t ms. */
  show(t) {
    this.cells?.forEach((cell) => cell.classList.toggle("later", this.recording.tokens[cell.dataset.index].at > t));
  }

  cell(index, steps) {
    const token = this.recording.tokens[index];
    const share = token.own ? 0 : steps ? token.step / steps : 0;
    const label = token.own ? "c" : String(token.step + 1);
    const cell = el("td", { "data-index": index, tabindex: "-1", class: token.own ? "own" : share > 0.5 ? "late" : "early" }, [
      el("span", { class: "when" }, label),
      el("span", { class: "what" }, visible(token.text).trim() || "␣"),
    ]);
    cell.style.setProperty("--share", `${Math.round(100 * share)}%`);
    cell.setAttribute("aria-label", sentence(token));
    return cell;
  }

  tell(cell) {
    if (!cell || cell === this.told) return;
    this.told = cell;
    const token = this.recording.tokens[cell.dataset.index];
    this.detail.replaceChildren(chip(token, "final"), ` ${sentence(token)}`);
  }

  /** Arrow keys go from cell to cell; one cell at a time is in the Tab order. */
  key(event) {
    const here = event.target.closest("td");
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!here || !move) return;
    event.preventDefault();
    const row = here.parentElement;
    const rows = [...row.parentElement.children];
    const next = rows[rows.indexOf(row) + move[0]]?.children[here.cellIndex + move[1]];
    if (next?.tagName !== "TD") return;
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function sentence(token) {
  const where = token.alone ? "" : `, block ${token.block + 1}, position ${token.place + 1}`;
  const when = token.own ? "written by the context tower" : `final in step ${token.step + 1}`;
  return `${named(token.text)}${where}: ${when}, confidence ${token.confidence.toFixed(2)}`;
}

/** Blocks as rows of token numbers; tokens that came one by one share rows. */
function rowsOf(tokens) {
  if (tokens[0]?.confidence == null) return []; // AR: there is no order to show
  const rows = [];
  tokens.forEach((token, index) => {
    const last = rows.at(-1);
    const joins = last && (token.alone ? last.alone && last.cells.length < WIDE : last.block === token.block);
    if (joins) last.cells.push(index);
    else rows.push({ block: token.block, alone: token.alone, cells: [index] });
  });
  for (const row of rows) {
    const [first, last] = [row.cells[0], row.cells.at(-1)].map((index) => tokens[index].block + 1);
    row.name = first === last ? String(first) : `${first}–${last}`;
  }
  return rows;
}
