"""Batch jobs: a file of prompts in, a file of continuations out, in order; what is written is never lost or repeated.

A line of output says which line of input it answers (`line`, from 1) and a digest of what was asked (`asked`), so a job
that was killed goes on where it was, and a file that answers other questions is not continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.decoding.output import Generation
from twotower.decoding.params import GenerationParams
from twotower.engine.admission import check_model
from twotower.engine.llm import LLM
from twotower.engine.sequence import Request
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError, TwoTowerError
from twotower.tokenizer import require_tokenizer

OWN = (
    "mode",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "stop",
    "block_size",
    "steps_per_block",
    "confidence_threshold",
    "policy",
    "policy_value",
    "draft_steps",
    "acceptance",
    "deterministic",
)
AHEAD = 4  # requests at work or waiting, for each row of the engine: a slow one holds up the file, not the others


@dataclass(frozen=True)
class Line:
    """A line of input: what it asks for, or why it asks for nothing that can be answered."""

    number: int
    asked: str  # a digest of the line and of what it inherits
    id: object = None
    request: Request | None = None
    error: str = ""


def read_lines(path: Path, model: Towers, shared: dict[str, object], whence: str = "") -> list[Line]:
    """Every line that is not blank. shared: parameters of lines that say nothing else; a line without a seed gets the
    shared one plus its number. whence: which model is asked, for the digest.

    Raises:
        ArgumentError: the file has no line.
    """
    lines = []
    inherited = json.dumps([whence, shared], sort_keys=True, default=str)
    for number, text in enumerate(path.read_text(errors="replace").split("\n"), 1):
        if text.strip():
            digest = hashlib.sha256((text + inherited).encode()).hexdigest()[:16]
            lines.append(_line(number, text, digest, model, shared))
    if not lines:
        raise ArgumentError(f'{path}: has no lines; give a JSON object with a "prompt" on each')
    return lines


def _line(number: int, text: str, asked: str, model: Towers, shared: dict[str, object]) -> Line:
    try:
        fields = json.loads(text)
    except ValueError as error:
        return Line(number, asked, error=f"not JSON: {error}")
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        return Line(number, asked, error='no "prompt"; a line is a JSON object with one, a string')
    name = fields.pop("id", None)
    prompt = fields.pop("prompt")
    if "knob" in fields and "policy_value" not in fields:  # the old name
        fields["policy_value"] = fields.pop("knob")
    unknown = sorted(set(fields) - set(OWN))
    if unknown:
        known = ", ".join(("prompt", "id", *OWN))
        return Line(number, asked, name, error=f"unknown field {', '.join(unknown)}; known are {known}")
    seed = shared["seed"]
    assert isinstance(seed, int)
    try:
        params = GenerationParams.from_mapping(shared | {"seed": seed + number} | fields)
        tokens = require_tokenizer(model.tokenizer)(prompt.encode().decode())[
            "input_ids"
        ]  # half a surrogate pair is no text
        request = Request(tokens, params)
        check_model(model, params, [len(tokens)])  # before there is an engine: its size follows from these requests
    except (TwoTowerError, UnicodeError) as error:
        return Line(number, asked, name, error=str(error))
    return Line(number, asked, name, request)


def engine_for(model: Towers, lines: Sequence[Line], rows: int, memory: int | None = None) -> LLM:
    """One that every line fits, with as many of `rows` as `memory` bytes of state allow."""
    return LLM.fitting(model, [line.request for line in lines if line.request is not None], rows, memory)


def finished(out: Path, lines: Sequence[Line]) -> int:
    """How many lines `out` answers already; a last one cut short by a kill is removed.

    Raises:
        ArgumentError: it answers other lines.
    """
    if not out.exists():
        return 0
    whole, _, _ = out.read_bytes().rpartition(b"\n")
    answers = whole.splitlines()
    for line, answer in zip(lines, answers, strict=False):
        try:
            said = json.loads(answer)
            same = (said["line"], said["asked"]) == (line.number, line.asked)
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise ArgumentError(f"{out}: does not answer line {line.number} as it is asked now; choose another file")
    if len(answers) > len(lines):
        raise ArgumentError(f"{out}: has {len(answers)} lines for {len(lines)} of input; choose another file")
    kept = len(whole) + 1 if whole else 0
    if kept < out.stat().st_size:
        with out.open("r+b") as file:
            file.truncate(kept)
    return len(answers)


def run_job(
    llm: LLM,
    lines: Sequence[Line],
    out: Path,
    progress: Callable[[int, int], object] | None = None,
    before: int | None = None,
) -> tuple[int, int]:
    """Answers what `out` does not answer yet and appends it, line by line in order → lines written, and those of them
    that are errors. progress: told the lines in `out` and the new tokens so far. before: what
    `finished` says, where that is known."""
    written = start = finished(out, lines) if before is None else before
    failed = tokens = 0
    following = start  # the next line to be asked
    places: dict[int, int] = {}
    answers: dict[int, dict[str, object]] = {}
    with out.open("a") as file:
        while written < len(lines):
            while following < len(lines) and following - written < AHEAD * llm.rows:
                line = lines[following]
                try:
                    if line.request is None:
                        raise ArgumentError(line.error)
                    places[llm.add_request(line.request)] = following
                except ArgumentError as error:
                    answers[following] = {"error": str(error)}
                following += 1
            for event in llm.step():
                tokens += len(event.tokens)
                if event.result is not None:
                    answers[places.pop(event.row)] = said(event.result)
            while written in answers:
                line, answer = lines[written], answers.pop(written)
                failed += bool(answer.get("error"))
                own = {} if line.id is None else {"id": line.id}
                file.write(json.dumps({"line": line.number, "asked": line.asked, **own, **answer}) + "\n")
                written += 1
            file.flush()
            if progress is not None:
                progress(written, tokens)
    return written - start, failed


def said(result: Generation) -> dict[str, object]:
    """What a line of output holds of a result."""
    if result.error:
        return {"error": result.error}
    fields = ("text", "mode", "finish_reason", "prompt_tokens", "denoiser_passes", "context_passes", "tokens_per_pass")
    found = {name: getattr(result, name) for name in fields} | {"new_tokens": len(result.tokens)}
    return found | ({"mode_reason": result.mode_reason} if result.mode_reason else {})
