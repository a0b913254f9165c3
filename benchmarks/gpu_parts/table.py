"""The results as Markdown: a section for each part, a line for each measurement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PRINTED = 11_000  # characters of the printed table: a terminal or a log may keep only its end


def markdown(results: dict[str, Any]) -> str:
    """All parts, with their states and measurements."""
    lines = ["# One GPU, one command"]
    for name, part in results["parts"].items():
        lines += ["", f"## {name}: {part['state']}, {part['seconds']:.0f} of {part['limit']:.0f} s", "", part["text"]]
        lines += ["", "| what | figures |", "|---|---|"] * bool(part["measured"])
        lines += map(row, part["measured"])
    return "\n".join(lines)


def printed(results: dict[str, Any]) -> str:
    """The same without details, short enough for the end of a log: lines that say only "agrees" are counted."""
    lines = []
    for name, part in results["parts"].items():
        lines.append(f"== {name}: {part['state']}, {part['seconds']:.0f} of {part['limit']:.0f} s")
        shown, agree = [], 0
        for one in part["measured"]:
            if one.get("verdict") == "agrees":
                agree += 1
            elif not one.get("detail"):
                shown.append(f"{one['what']}: {cells(one)}")
        lines += [f"{agree} agree with their reference"] * bool(agree) + shown
    text = "\n".join(lines)
    if len(text) <= PRINTED:
        return text
    width = max(40, PRINTED // len(lines) - 2)
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def row(one: dict[str, Any]) -> str:
    return f"| {cell(one['what'])} | {cells(one)} |"


def cells(one: dict[str, Any]) -> str:
    """The figures of a measurement in one line."""
    return ", ".join(_named(one))


def _named(one: dict[str, Any]) -> Iterator[str]:
    for name, value in one.items():
        if name in ("what", "trace", "detail"):
            continue
        yield cell(value) if name in ("verdict", "note") else f"{name} {cell(value)}"


def cell(value: Any) -> str:
    """A value as text: three or four significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return "; ".join(f"{name} {cell(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
