"""The report of `twotower quantize` as a table, as Markdown and as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.byte_units import format_bytes
from twotower.errors import ArgumentError
from twotower.file_writes import replace_text

if TYPE_CHECKING:
    from rich.table import Table

    from twotower.evaluation.quantization_report import QuantizationReport

SUFFIXES = (".md", ".json")
Row = tuple[str, str, str, str]  # a figure, of the original, of the quantised model, and the change


def check_report_file(file: Path | None) -> None:
    """Raises ArgumentError if a report cannot be written to the file; None: to the terminal."""
    if file is None:
        return
    if file.suffix not in SUFFIXES:
        raise ArgumentError(f"--report {file}: give a file that ends with {' or '.join(SUFFIXES)}, or no file")
    if not file.resolve().parent.is_dir():
        raise ArgumentError(f"--report {file}: there is no folder {file.parent}; make it, or choose another file")


def rows(report: QuantizationReport) -> Iterator[Row]:
    """The lines of the table. A difference of accuracies has its 95 % interval."""
    old, new = report.original, report.quantized

    def ratio(before: float, after: float) -> str:
        return f"{after / before - 1:+.2%}" if before else ""

    yield "weights in memory", format_bytes(old.bytes), format_bytes(new.bytes), f"{new.bytes / old.bytes:.2f} ×"
    yield "NLL of AR, nats per token", f"{old.nll:.4f}", f"{new.nll:.4f}", ratio(old.nll, new.nll)
    yield "KL of the context tower, nats", "", f"{report.kl['context']:.4f}", ""
    yield "KL of the denoiser at masks, nats", "", f"{report.kl['denoiser']:.4f}", ""
    passes = old.passes_per_block, new.passes_per_block
    yield "diffusion: passes per block", f"{passes[0]:.2f}", f"{passes[1]:.2f}", ratio(*passes)
    yield (
        "verified: tokens accepted per draft",
        f"{old.accepted:.2f}",
        f"{new.accepted:.2f}",
        ratio(old.accepted, new.accepted),
    )
    for label, value in old.tokens_per_pass.items():
        now = new.tokens_per_pass[label]
        if label != "ar":
            yield f"{label}: tokens per pass", f"{value:.2f}", f"{now:.2f}", ratio(value, now)
    for label, share in old.accuracy.items():
        pair = report.answers[label]
        low, high = pair.interval
        change = f"{100 * pair.difference:+.1f} ({100 * low:+.1f}…{100 * high:+.1f})"
        yield f"{label}: right answers", f"{share:.1%}", f"{new.accuracy[label]:.1%}", change
    for label, speed in old.tokens_per_second.items():
        times = f"{report.times[label]:.2f} ×"
        yield f"{label}: tokens per second", f"{speed:.0f}", f"{new.tokens_per_second[label]:.0f}", times


def heads(report: QuantizationReport) -> Row:
    return "", report.original.plan, report.quantized.plan, "change"


def notes(report: QuantizationReport, place: str) -> str:
    """What was measured, in one line. place: the machine."""
    return (
        f"{report.tokens} tokens of text, {report.masked} masked positions, {report.problems} problems of the suite; "
        f"speed of single requests in turns. {place}"
    )


def table(report: QuantizationReport, place: str) -> Table:
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, header_style="dim", caption=notes(report, place), caption_justify="left")
    for i, head in enumerate(heads(report)):
        out.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows(report):
        out.add_row(*row)
    return out


def markdown(report: QuantizationReport, place: str) -> str:
    lines = [heads(report), ("---", "---:", "---:", "---:"), *rows(report)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{notes(report, place)}\n"


def write_report(file: Path, report: QuantizationReport, facts: dict[str, object], place: str) -> None:
    """Writes the report as Markdown or JSON, by the file's suffix."""
    if file.suffix == ".md":
        replace_text(file, markdown(report, place))
    else:
        replace_text(file, json.dumps(facts | report.to_dict(), indent=2) + "\n")
