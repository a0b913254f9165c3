"""The picture of a validation's sample: its text, or a map of its denoising passes."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twotower.training.log_schema import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

COLUMNS = 16  # positions in a line; larger blocks take several lines
LINES = 24  # at most; later lines are left out
LINE_HEIGHT, HEAD = 0.3, 1.55  # inches; HEAD: the prompt, the axis and its label
CHARACTERS = 9  # of a token that fit into a cell


@dataclass(frozen=True)
class TraceMap:
    """The position of each token, and the denoising pass of its block that committed it.

    passes, tokens, step, block_size: fields of `log_schema.Trace`.
    """

    prompt: str
    block_size: int
    passes: list[int]
    tokens: list[str]
    step: list[int]

    @classmethod
    def of(cls, sample: Sample) -> TraceMap | None:
        """None if the sample has no text."""
        trace = sample["trace"]
        if not trace["tokens"]:
            return None
        return cls(sample["prompt"], trace["block_size"], trace["passes"], trace["tokens"], trace["step"])

    @property
    def lines(self) -> list[tuple[int, int]]:
        """(block, first new token) of each line."""
        starts = []
        for block in range(len(self.passes)):
            first = block * self.block_size
            end = min(first + self.block_size, len(self.tokens))
            starts += [(block, start) for start in range(first, end, COLUMNS)]
        return starts[:LINES]

    @property
    def height(self) -> float:
        """Height of the map in inches."""
        return HEAD + LINE_HEIGHT * len(self.lines)

    def draw(self, figure: Figure | SubFigure, step: int) -> None:
        """Draws the map, with the end of the prompt above it. step: training step, for the title."""
        import matplotlib
        from matplotlib.colors import BoundaryNorm

        lines, columns = self.lines, min(COLUMNS, self.block_size)
        shades = np.full((len(lines), columns), np.nan)
        for y, (block, start) in enumerate(lines):
            stop = min(start + columns, (block + 1) * self.block_size, len(self.tokens))
            shades[y, : stop - start] = [1 + pass_ for pass_ in self.step[start:stop]]
        most = max(2, int(np.nanmax(shades)))
        colours = matplotlib.colormaps["viridis_r"].resampled(most)
        axis = figure.subplots()
        image = axis.imshow(
            shades, aspect="auto", cmap=colours, norm=BoundaryNorm(np.arange(0.5, most + 1), most), interpolation="none"
        )
        for (y, x), pass_ in np.ndenumerate(shades):
            if np.isfinite(pass_):
                luminance = np.dot(colours((pass_ - 0.5) / most)[:3], (0.3, 0.6, 0.1))
                axis.text(
                    x,
                    y,
                    _shown(self.tokens[lines[y][1] + x]),
                    ha="center",
                    va="center",
                    parse_math=False,
                    color="black" if luminance > 0.45 else "white",
                    fontsize=9 if columns <= 8 else 7.5,
                )
        axis.grid(False)
        axis.set_xticks(range(columns), [str(x + 1) for x in range(columns)])
        axis.set_yticks(range(len(lines)), [self._label(i) for i in range(len(lines))], fontsize=8.5)
        axis.tick_params(length=0)
        for y, (block, _) in enumerate(lines[:-1]):
            if self.block_size > COLUMNS and lines[y + 1][0] != block:
                axis.axhline(y + 0.5, color="black", linewidth=1.2)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.set_xlabel(
            "position in the block" + (" (a block takes several lines)" if self.block_size > COLUMNS else "")
        )
        total = sum(self.passes)
        left_out = "; its beginning" if lines[-1][1] + columns < len(self.tokens) else ""
        title = f"Sample after step {step}: {len(self.tokens)} tokens in {total} passes{left_out}"
        axis.set_title(f"{title}\n{_end_of(self.prompt)}", fontsize=10, linespacing=1.5, parse_math=False)
        bar = figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03, aspect=max(8, len(lines) * 2))
        bar.set_label("pass that committed it")
        every = -(-most // 8)
        bar.set_ticks(list(range(1, most + 1, every)))
        bar.ax.minorticks_off()
        bar.ax.tick_params(length=0)
        bar.ax.invert_yaxis()

    def _label(self, line: int) -> str:
        block, start = self.lines[line]
        if start % self.block_size:
            return ""
        count = self.passes[block]
        return f"block {block + 1}: {count} pass{'es' if count != 1 else ''}"


@dataclass(frozen=True)
class Passage:
    """A continuation as text."""

    prompt: str
    lines: list[str]

    @classmethod
    def of(cls, sample: Sample) -> Passage | None:
        """None if the sample has no text."""
        lines = textwrap.wrap("→ " + _visible(sample["text"]), 125)
        return cls(sample["prompt"], lines[:LINES]) if sample["text"] else None

    @property
    def height(self) -> float:
        """Height of the text in inches."""
        return 0.7 + 0.2 * len(self.lines)

    def draw(self, figure: Figure | SubFigure, step: int) -> None:
        """Draws the text, with the end of the prompt above it."""
        figure.text(0.01, 0.95, f"Sample after step {step}", fontsize=11, va="top")
        text = "\n".join([_end_of(self.prompt), *self.lines])
        figure.text(0.01, 0.95 - 0.3 / self.height, text, fontsize=10, va="top", linespacing=1.4, parse_math=False)


def _end_of(prompt: str) -> str:
    visible = _visible(prompt)
    return "prompt: " + (visible if len(visible) <= 110 else "…" + visible[-109:])


def _shown(token: str) -> str:
    text = _visible(token)
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"


def _visible(text: str) -> str:
    signs = {"\n": "↵", "\t": "⇥", "\ufffd": "·"}
    return "".join(signs.get(c, c if c.isprintable() else "·") for c in text)
