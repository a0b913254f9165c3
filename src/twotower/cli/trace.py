"""`--trace`: a run's blocks as one picture, pass by pass."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from twotower.cli.watch import LABEL, Frame, TokenNames, colour, grid, hex_colour


def legend() -> Text:
    """What the colours mean."""
    out = Text("confidence  0 ", Style(color=LABEL))
    for i in range(21):
        out.append(" ", Style(bgcolor=hex_colour(colour(i / 20))))
    return out.append(" 1     dark: still masked, lighter as the best candidate gets surer", Style(color=LABEL))


_CHARACTER = (12.2, 24.4)  # width and height of a character in rich's SVG
_THEME = TerminalTheme((22, 26, 34), (216, 222, 233), [(0, 0, 0)] * 8)
# Rich's own frame has window buttons and fetches a font from the net; a picture in a README can have neither.
_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 -14 WIDTH HEIGHT">
<style>
.{unique_id}-matrix {{
  font: {char_height}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
{styles}
</style>
<defs>{lines}</defs>
<rect x="-16" y="-14" width="100%" height="100%" rx="10" fill="#161a22"/>
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</svg>
"""


def save_picture(path: Path, blocks: Sequence[Sequence[Frame]], names: TokenNames) -> None:
    """All blocks of a run as one self-contained SVG."""
    parts: list[Text] = []
    for frames in blocks:
        last = frames[-1]
        count = len(last.tokens)
        cut = f" (of {last.size} positions; the text ends here)" if count < last.size else ""
        title = Text(f"block {last.block + 1}: {count} tokens in {last.passes} passes{cut}", Style(bold=True))
        parts += [title, grid(frames, names), Text()]
    whole = Text("\n").join([*parts, legend()])
    lines = whole.split()
    width = max(line.cell_len for line in lines)
    console = Console(record=True, width=width, file=io.StringIO(), color_system="truecolor", legacy_windows=False)
    console.print(whole, no_wrap=True, overflow="ignore", crop=False)
    size = {"WIDTH": f"{width * _CHARACTER[0] + 32:.0f}", "HEIGHT": f"{len(lines) * _CHARACTER[1] + 28:.0f}"}
    template = _SVG.replace("WIDTH", size["WIDTH"]).replace("HEIGHT", size["HEIGHT"])
    path.write_text(console.export_svg(theme=_THEME, code_format=template), encoding="utf-8")
