"""What does decoding cost outside the passes, and compared with another commit?

    python benchmarks/overhead.py --against DIR [--entry generate|engine] [--against-entry generate|engine]
        [--pairs 15] [--case ar …] [--profile | --kernels] [--json]

Compares this checkout (A) with another checkout (B, its root directory). Each runs in its own process with its own
`twotower`, in pairs: A then B, next B then A. Both processes live through the whole run and work one at a time: fp32,
packed weights, one thread, malloc keeps large blocks. Ratios are of the two times of a pair; the table has medians and
quartiles over pairs. The first round of every case is a warm-up. A short case runs several times within one
measurement (`--least`).

--entry generate measures `model.generate_*`; --entry engine measures `twotower.LLM`. `--against .` with two different
entries compares the two entry points of one checkout. One case has a prompt of 2,000 tokens and one new token: the time
to the first token. All cases are greedy. AR and verified mode must give the same texts on both sides; otherwise the
exit code is 1.

--profile measures the time per token inside and outside the verbs of the towers (prefill, extend, denoise, or the calls
of compiled passes), on both sides. --kernels measures the same inside and outside the calls of C++ kernels.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from common.program import DIRECTORY, JSON, QUICK, publish
from rich.console import RenderableType
from rich.table import Table

HERE = Path(__file__).resolve().parent
ENTRIES = ("generate", "engine")
# malloc keeps large blocks, as `twotower.allocator` sets it, from the start of the process.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


@dataclass(frozen=True)
class Case:
    mode: str
    rows: int = 1
    prompt: int = 0  # tokens; 0: a sentence
    tokens: int = 128  # new tokens of each row

    @property
    def exact(self) -> bool:
        """Whether the text depends on the model alone, not on the denoising policy."""
        return self.mode != "diffusion"


MODES = ("ar", "verified", "diffusion")
CASES = {mode: Case(mode) for mode in MODES} | {f"{mode} x8": Case(mode, rows=8) for mode in MODES}
CASES["ar x16"] = Case("ar", rows=16)
CASES["first token"] = Case("ar", prompt=2000, tokens=1)


class Side:
    """A process with the `twotower` of one checkout."""

    def __init__(self, root: Path, entry: str, model: Path | None, profile: str | None) -> None:
        source = root.resolve() / "src"
        if not (source / "twotower" / "__init__.py").is_file():
            raise click.BadParameter(f"{root} has no src/twotower; give the root directory of a checkout")
        self.root, self.entry = root.resolve(), entry
        command = [sys.executable, "-P", str(HERE / "common" / "checkout_child.py"), "--entry", entry]
        command += ["--model", str(model.resolve())] if model else []
        command += ["--profile", profile] if profile else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(source)},
        )  # fmt: skip
        package = self._answer()["package"]
        if Path(package) != source / "twotower":
            raise click.ClickException(f"the process for {root} imports twotower from {package}, not from {source}")

    def run(self, case: Case, times: int) -> dict[str, Any]:
        """Runs a case a number of times in a row."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(case) | {"times": times}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"the process for {self.root} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def facts(self) -> dict[str, Any]:
        """The measurements, for the JSON."""
        command = ["git", "-C", str(self.root), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return {"commit": commit or None, "entry": self.entry}


def measure(sides: tuple[Side, Side], cases: dict[str, Case], pairs: int, least: float) -> dict[str, Any]:
    """Runs all cases in every round. Returns the figures of each case."""
    answers: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {name: [] for name in cases}
    times = dict.fromkeys(cases, 1)
    for name, case in cases.items():  # warm-up; the second run estimates the time of a run
        first = [[side.run(case, 1)["seconds"] for side in sides] for _ in range(2)][1]
        times[name] = 1 if case.prompt else max(1, round(least / min(first)))  # a prefix cache would have the prompt
    for number in range(pairs):
        print(f"pair {number + 1} of {pairs}", file=sys.stderr)
        for name, case in cases.items():
            order = (0, 1) if number % 2 == 0 else (1, 0)
            own = {place: sides[place].run(case, times[name]) for place in order}
            answers[name].append((own[0], own[1]))
    return {name: summary(case, answers[name]) for name, case in cases.items()}


def summary(case: Case, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Figures of one case: ratio A ÷ B with quartiles, µs per token of both sides, whether the texts are equal."""
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    new = case.rows * case.tokens
    found = {
        "ratio": statistics.median(ratios), "quartiles": [low, high], "ratios": ratios,
        "prompt tokens": pairs[0][0]["prompt"], "new tokens": new,
        "texts equal": all(a["texts"] == b["texts"] for a, b in pairs),
    }  # fmt: skip
    for place, side in enumerate("AB"):
        runs = [pair[place] for pair in pairs]
        found[side] = {"us a token": statistics.median(run["seconds"] for run in runs) / new * 1e6}
        if "verbs" in runs[0]:
            found[side] |= inside_and_outside(runs, new)
    return found


NO_CALL = {"calls": 0, "seconds": 0.0}


def inside_and_outside(runs: list[dict[str, Any]], new: int) -> dict[str, Any]:
    """µs per token in each verb and outside all verbs."""
    verbs = sorted({verb for run in runs for verb in run["verbs"]})
    if not verbs:
        raise click.ClickException("--profile found no call of extend or denoise; check the names of the towers' verbs")
    outside = [run["seconds"] - sum(verb["seconds"] for verb in run["verbs"].values()) for run in runs]
    parts = {
        verb: {
            "us a token": statistics.median(run["verbs"].get(verb, NO_CALL)["seconds"] for run in runs) / new * 1e6,
            "calls": runs[0]["verbs"].get(verb, NO_CALL)["calls"],
        }
        for verb in verbs
    }
    return {"verbs": parts, "outside, us a token": statistics.median(outside) / new * 1e6}


def tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    table = Table("case", "A ÷ B", "quartiles", "A, µs a token", "B, µs a token", "texts")
    for name, one in found.items():
        low, high = one["quartiles"]
        table.add_row(
            name, f"{one['ratio']:.3f}", f"{low:.3f} … {high:.3f}", f"{one['A']['us a token']:.1f}",
            f"{one['B']['us a token']:.1f}", "equal" if one["texts equal"] else "DIFFER",
        )  # fmt: skip
    yield table
    if any("verbs" in one["A"] for one in found.values()):
        parts = Table("case", "side", "µs a token", "in the verbs", "outside", "calls")
        for name, one in found.items():
            for side in "AB":
                verbs = one[side]["verbs"]
                parts.add_row(
                    name, side, f"{one[side]['us a token']:.1f}",
                    ", ".join(f"{verb} {own['us a token']:.1f}" for verb, own in verbs.items()),
                    f"{one[side]['outside, us a token']:.1f}",
                    ", ".join(f"{verb} {own['calls']:g}" for verb, own in verbs.items()),
                )  # fmt: skip
        yield parts


@click.command()
@click.option("--against", type=DIRECTORY, required=True, help="Root directory of checkout B.")
@click.option("--entry", type=click.Choice(ENTRIES), default="generate", show_default=True, help="Of A.")
@click.option("--against-entry", type=click.Choice(ENTRIES), default="generate", show_default=True, help="Of B.")
@click.option("--model", type=DIRECTORY, default=None, help="[default: each checkout's bundled model]")
@click.option("--case", "chosen", type=click.Choice(tuple(CASES)), multiple=True, help="[default: all]")
@click.option("--pairs", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--least", default=0.2, show_default=True, help="Minimum seconds of one measurement.")
@click.option("--profile", is_flag=True, help="Time inside and outside the towers' verbs.")
@click.option("--kernels", is_flag=True, help="Time inside and outside the C++ kernels.")
@QUICK
@JSON
def main(
    against: Path, entry: str, against_entry: str, model: Path | None, chosen: tuple[str, ...], pairs: int,
    least: float, profile: bool, kernels: bool, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compares this checkout with another checkout."""
    cases = {name: CASES[name] for name in chosen or CASES}
    if quick:
        pairs, least = 2, 0.0
        cases = {n: Case(c.mode, c.rows, min(c.prompt, 300), min(c.tokens, 16)) for n, c in cases.items()}
    clock = "kernels" if kernels else "verbs" if profile else None
    sides = Side(HERE.parent, entry, model, clock), Side(against, against_entry, model, clock)
    try:
        found = measure(sides, cases, pairs, least)
        facts = {name: side.facts() for name, side in zip("AB", sides, strict=True)}
    finally:
        for side in sides:
            side.close()
    for name, case in cases.items():
        if found[name]["prompt tokens"] < case.prompt:
            print(f"{name}: the model's window permits only {found[name]['prompt tokens']} tokens", file=sys.stderr)
    publish("overhead", {"pairs": pairs} | facts | {"cases": found}, tables(found), as_json)
    if not all(found[name]["texts equal"] for name, case in cases.items() if case.exact):
        raise click.ClickException("AR or verified mode gave different texts on the two sides")


if __name__ == "__main__":
    main()
