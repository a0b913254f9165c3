"""`--trace`: a picture of the denoising passes of a run, as SVG, PNG or HTML."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from twotower.cli.colours import DARK_TEXT, blend, colour, hex_colour
from twotower.cli.watch import Frame, TokenNames
from twotower.errors import ArgumentError

BACKGROUND, FOREGROUND, LABEL = "#161a22", "#d8dee9", "#7d8799"
_MASKED = (38, 43, 54)  # a masked position without a candidate


@dataclass(frozen=True)
class Cell:
    """A piece of a line. background: None for the background of the picture."""

    text: str
    foreground: str = FOREGROUND
    background: str | None = None
    bold: bool = False


Line = list[Cell]


def picture_lines(blocks: Sequence[Sequence[Frame]], names: TokenNames) -> list[Line]:
    """The lines of the picture: a table for each block, then the legend."""
    lines: list[Line] = []
    for alone, group in groupby(blocks, key=_without_draft):
        for frames in [merge_rounds(list(group))] if alone else group:
            lines += [[Cell(block_title(frames), bold=True)], *block_lines(frames, names), []]
    return [*lines, legend()]


def merge_rounds(blocks: Sequence[Sequence[Frame]]) -> list[Frame]:
    """Merges successive rounds without a draft into one."""
    last = [frames[-1] for frames in blocks]
    return [
        replace(
            last[0],
            size=len(last),
            tokens=[token for frame in last for token in frame.tokens],
            fresh=[True] * len(last),
            confidence=[probability for frame in last for probability in frame.confidence],
        )
    ]


def _without_draft(frames: Sequence[Frame]) -> bool:
    """Whether these are the frames of a round of verified decoding without a draft."""
    last = frames[-1]
    return last.verified and last.passes == 1 and not any(token is not None for token in frames[0].tokens)


def block_title(frames: Sequence[Frame]) -> str:
    """Title of a block, or of a round of verified decoding."""
    last = frames[-1]
    count, number = len(last.tokens), last.block + 1
    if not last.verified:
        cut = f" (of {last.size} positions; the text ends here)" if count < last.size else ""
        return f"block {number}: {count} tokens in {last.passes} passes{cut}"
    if len(frames) == 1 or _without_draft(frames):
        which = f"round {number}: 1 token" if count == 1 else f"rounds {number} to {number + count - 1}: {count} tokens"
        return f"{which} of the context tower"
    drafted = len(frames[-2].tokens)
    kept = sum(a == b for a, b in zip(last.tokens, frames[-2].tokens, strict=False))
    passes = f"{last.passes - 1} denoiser and 1 context passes" if last.passes > 1 else "1 pass"
    return f"round {number}: {count} tokens in {passes}, {kept} of {drafted} drafted tokens accepted"


def block_lines(frames: Sequence[Frame], names: TokenNames) -> Iterator[Line]:
    """Lines of one block: a line for each pass, a column for each token of the text, colours for confidence.

    A token has a coloured background in the line of the pass that committed it.
    """
    seen = [{frame.tokens[i] for frame in frames if i < len(frame.tokens)} for i in range(len(frames[-1].tokens))]
    widths = [max(2, *(cell_len(names(token)) for token in tokens if token is not None)) + 1 for tokens in seen]
    for frame in frames:
        what = "verify" if frame.verified else f"pass {frame.passes:<2} t {frame.t:4.2f}"
        line = [Cell(f"{what:<16}", LABEL)]
        for i, width in enumerate(widths):
            token, probability = (frame.tokens[i], frame.confidence[i]) if i < len(frame.tokens) else (None, None)
            if token is None:
                shade = _MASKED if probability is None else blend(_MASKED, colour(probability), 0.35 * probability)
                line.append(Cell(" " * width, background=hex_colour(shade)))
            elif frame.fresh[i]:
                line.append(Cell(set_cell_size(names(token), width), DARK_TEXT, hex_colour(colour(probability or 0.0))))
            else:
                line.append(Cell(set_cell_size(names(token), width), hex_colour(colour(probability or 0.0))))
            line.append(Cell(" "))
        yield line


def legend() -> Line:
    """The legend of the colours."""
    ramp = [Cell(" ", background=hex_colour(colour(i / 20))) for i in range(21)]
    meaning = " 1     dark: masked; lighter for a higher confidence of the best candidate"
    return [Cell("confidence  0 ", LABEL), *ramp, Cell(meaning, LABEL)]


def line_width(line: Line) -> int:
    """Width of a line in characters."""
    return sum(cell_len(cell.text) for cell in line)


# --- files ----------------------------------------------------------------------------------------------------------

_CHARACTER = (12.2, 24.4)  # width and height of a character in rich's SVG
_THEME = TerminalTheme((22, 26, 34), (216, 222, 233), [(0, 0, 0)] * 8)
# The default template of rich has window buttons and loads a font from the network.
_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 -14 WIDTH HEIGHT">
<style>
.{unique_id}-matrix {{
  font: {char_height}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
{styles}
</style>
<defs>{lines}</defs>
<rect x="-16" y="-14" width="100%" height="100%" rx="10" fill="BACKGROUND"/>
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</svg>
"""
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Denoising trace</title>
<style>
body {{ margin: 2rem auto; max-width: 90rem; padding: 0 1rem; background: {background}; color: {foreground};
       font: 16px/1.5 ui-sans-serif, system-ui, sans-serif; }}
.text {{ white-space: pre-wrap; max-width: 60rem; }}
.prompt, .facts {{ color: {label}; }}
figure {{ margin: 2rem 0; overflow-x: auto; }}
svg {{ min-width: 60rem; width: 100%; }}
</style>
<p class="text"><span class="prompt">{prompt}</span>{text}</p>
<p class="facts">{facts}</p>
<figure>{svg}</figure>
</html>
"""


@dataclass(frozen=True)
class PassPicture:
    """Content of a picture, and the text of an HTML page around it. facts: one line of figures."""

    blocks: Sequence[Sequence[Frame]]
    names: TokenNames
    prompt: str
    text: str
    facts: str


def svg(picture: PassPicture) -> str:
    """The picture as a self-contained SVG."""
    lines = picture_lines(picture.blocks, picture.names)
    whole = Text()
    for i, line in enumerate(lines):
        whole.append("\n" if i else "")
        for cell in line:
            whole.append(cell.text, Style(color=cell.foreground, bgcolor=cell.background, bold=cell.bold))
    width = max(map(line_width, lines))
    console = Console(record=True, width=width, file=io.StringIO(), color_system="truecolor", legacy_windows=False)
    console.print(whole, no_wrap=True, overflow="ignore", crop=False)
    size = {"WIDTH": f"{width * _CHARACTER[0] + 32:.0f}", "HEIGHT": f"{len(lines) * _CHARACTER[1] + 28:.0f}"}
    template = _SVG.replace("WIDTH", size["WIDTH"]).replace("HEIGHT", size["HEIGHT"]).replace("BACKGROUND", BACKGROUND)
    return console.export_svg(theme=_THEME, code_format=template)


def _save_svg(path: Path, picture: PassPicture) -> None:
    path.write_text(svg(picture), encoding="utf-8")


def _save_html(path: Path, picture: PassPicture) -> None:
    words = {name: html.escape(getattr(picture, name)) for name in ("prompt", "text", "facts")}
    page = _PAGE.format(background=BACKGROUND, foreground=FOREGROUND, label=LABEL, svg=svg(picture), **words)
    path.write_text(page, encoding="utf-8")


def _save_png(path: Path, picture: PassPicture) -> None:
    """Draws the picture with matplotlib, in its own font."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = picture_lines(picture.blocks, picture.names)
    wide, high, size = 0.0843, 0.19, 10  # width and height of a character in inches, and its size in points
    columns = max(map(line_width, lines))
    figure = Figure(figsize=(columns * wide + 0.4, len(lines) * high + 0.4), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(-0.2 / wide, columns + 0.2 / wide)
    axis.set_ylim(len(lines) + 0.2 / high, -0.2 / high)
    for y, line in enumerate(lines):
        x = 0
        for cell in line:
            width = cell_len(cell.text)
            if cell.background:
                axis.add_patch(Rectangle((x, y), width, 1, color=cell.background, linewidth=0))
            if cell.text.strip():
                axis.text(
                    x,
                    y + 0.5,
                    cell.text.rstrip(),
                    color=cell.foreground,
                    size=size,
                    va="center_baseline",
                    family="monospace",
                    weight="bold" if cell.bold else "normal",
                    parse_math=False,
                )
            x += width
    figure.savefig(path, dpi=150)


FORMATS: dict[str, Callable[[Path, PassPicture], None]] = {".svg": _save_svg, ".html": _save_html, ".png": _save_png}


def check_format(path: Path) -> None:
    """Raises ArgumentError if the file extension is no known format, or if matplotlib is missing for PNG."""
    if path.suffix not in FORMATS:
        raise ArgumentError(f"--trace {path}: unknown file extension; choose one of {', '.join(FORMATS)}")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ArgumentError(
                f"--trace {path}: PNG needs matplotlib; install it (pip install 'twotower[plots]') or use .svg"
            ) from None


def save_picture(path: Path, picture: PassPicture) -> None:
    """Writes the picture in the format of the file extension."""
    FORMATS[path.suffix](path, picture)
