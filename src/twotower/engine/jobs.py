"""Batch jobs: from a file of prompts to a file of continuations, in order. A killed job can be continued.

A line of output has the number of its line of input (`line`, from 1) and a digest of the request (`digest`). So a
killed job continues where it stopped, and a file with answers to other requests is not continued.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from twotower.chat_template import Message
from twotower.decoding.output import Generation
from twotower.decoding.params import GenerationParams
from twotower.engine.admission import check_before_engine
from twotower.engine.llm import LLM
from twotower.engine.sequence import Request
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError, TwoTowerError
from twotower.json_text import to_json
from twotower.tokenizer import longest_token, require_tokenizer

LINE_FIELDS = (
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
    "denoiser",
)
MAX_LINE_BYTES = 2**24  # of a line of input; what is beyond is not kept in memory
QUEUED_PER_ROW = 4  # requests in the engine for each of its rows: a slow one delays the file, not the other requests


@dataclass(frozen=True)
class Line:
    """A line of input: its request and prompt or messages, or the error that prevents a request."""

    number: int
    digest: str  # of the line and of the inherited parameters
    id: object = None
    request: Request | None = None
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    error: str = ""


def read_lines(path: Path, model: Towers, shared: dict[str, object], model_name: str = "") -> list[Line]:
    """Reads every line that is not blank. The file is UTF-8, with or without a byte order mark.

    shared: parameters that a line may override; a line without a seed gets the shared seed plus its line number.
    model_name: part of the digest.

    Raises:
        ArgumentError: the file has no line.
    """
    lines = []
    # The digest uses the old name of policy_value, so that jobs of earlier versions can be continued.
    hashed = {"knob" if name == "policy_value" else name: value for name, value in shared.items()}
    inherited = json.dumps([model_name, hashed], sort_keys=True, default=str).encode()
    longest = longest_prompt(model)
    for raw in raw_lines(path):
        raw.hash.update(inherited)
        digest = raw.hash.hexdigest()[:16]
        if raw.nbytes > MAX_LINE_BYTES:
            reason = f"the line has {raw.nbytes} bytes; at most {MAX_LINE_BYTES} are allowed, so shorten its prompt"
            lines.append(Line(raw.number, digest, error=reason))
        else:
            lines.append(_line(raw.number, raw.start, digest, model, shared, longest))
    if not lines:
        raise ArgumentError(f'{path}: has no lines; give a JSON object with a "prompt" on each')
    return lines


@dataclass
class RawLine:
    """A line of a file. start: its first bytes, at most MAX_LINE_BYTES and one more. hash: SHA-256 of all its bytes."""

    number: int
    start: bytes
    nbytes: int
    hash: hashlib._Hash

    @property
    def is_blank(self) -> bool:
        return self.nbytes <= MAX_LINE_BYTES and not self.start.strip()


def raw_lines(path: Path) -> Iterator[RawLine]:
    """The lines of a file that are not blank, without their ends (\\n, \\r\\n or \\r) and the byte order mark."""
    number, line = 1, RawLine(1, b"", 0, hashlib.sha256())
    with path.open("rb") as file:
        text = io.TextIOWrapper(file, encoding="latin-1", newline=None)  # each character is one byte
        while part := text.readline(MAX_LINE_BYTES + 1).encode("latin-1"):
            if number == 1 and not line.nbytes:
                part = part.removeprefix(codecs.BOM_UTF8)
            content = part.removesuffix(b"\n")
            line.start = line.start or content
            line.nbytes += len(content)
            line.hash.update(content)
            if content != part:
                if not line.is_blank:
                    yield line
                number += 1
                line = RawLine(number, b"", 0, hashlib.sha256())
    if not line.is_blank:
        yield line


def _line(number: int, raw: bytes, digest: str, model: Towers, shared: dict[str, object], longest: int) -> Line:
    """longest: of `longest_prompt`."""
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        return Line(number, digest, error=reason)
    except (ValueError, RecursionError) as error:
        return Line(number, digest, error=f"not JSON: {error}")
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        return Line(number, digest, error='no "prompt"; give a JSON object with "prompt", a string')
    name = fields.pop("id", None)
    prompt = fields.pop("prompt")
    seed = shared["seed"]
    assert isinstance(seed, int)
    try:
        request = request_of(prompt, fields, model, shared | {"seed": seed + number}, longest)
    except (TwoTowerError, UnicodeError) as error:
        return Line(number, digest, name, error=str(error))
    return Line(number, digest, name, request, prompt)


def longest_prompt(model: Towers) -> int:
    """The characters of the longest prompt that can fit the window."""
    return model.spec.max_position_embeddings * longest_token(require_tokenizer(model.tokenizer))


def request_of(
    prompt: str, given: Mapping[str, object], model: Towers, shared: Mapping[str, object], longest: int
) -> Request:
    """The request for a prompt. given: its own parameters. longest: of `longest_prompt`.

    Raises:
        TwoTowerError: the prompt is too long, or a parameter is unknown or wrong.
        UnicodeError: the prompt has half a surrogate pair.
    """
    if len(prompt) > longest:
        window = model.spec.max_position_embeddings
        raise ArgumentError(
            f"the prompt has {len(prompt)} characters, more than the {window} tokens of the context window can hold; "
            "shorten it"
        )
    fields = dict(given)
    if "knob" in fields and "policy_value" not in fields:  # the old name
        fields["policy_value"] = fields.pop("knob")
    unknown = sorted(set(fields) - set(LINE_FIELDS))
    if unknown:
        known = ", ".join(("prompt", "id", *LINE_FIELDS))
        raise ArgumentError(f"unknown field {', '.join(unknown)}; known are {known}")
    params = GenerationParams.from_mapping({**shared, **fields})
    tokens = require_tokenizer(model.tokenizer)(prompt.encode().decode())["input_ids"]
    request = Request(tokens, params)
    check_before_engine(model, params, [len(tokens)])  # before the engine exists: its size depends on the requests
    return request


def engine_for(model: Towers, lines: Sequence[Line], rows: int, memory: int | None = None) -> LLM:
    """Makes an engine that every line fits, with at most `rows` rows, limited by `memory` bytes of state."""
    return LLM.fitting(model, [line.request for line in lines if line.request is not None], rows, memory)


def count_answered(out: Path, lines: Sequence[Line]) -> int:
    """Counts the lines that `out` already answers. An incomplete last line is removed.

    Raises:
        ArgumentError: `out` has answers to other lines.
    """
    if not out.exists():
        return 0
    whole, _, _ = out.read_bytes().rpartition(b"\n")
    answers = whole.splitlines()
    for line, answer in zip(lines, answers, strict=False):
        try:
            fields = json.loads(answer)
            digest = fields["digest"] if "digest" in fields else fields["asked"]  # the name in earlier versions
            same = (fields["line"], digest) == (line.number, line.digest)
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise ArgumentError(f"{out}: its answer to line {line.number} is for another request; choose another file")
    if len(answers) > len(lines):
        raise ArgumentError(f"{out}: has {len(answers)} lines for {len(lines)} of input; choose another file")
    kept = len(whole) + 1 if whole else 0
    if kept < out.stat().st_size:
        with out.open("r+b") as file:
            file.truncate(kept)
    return len(answers)


class Step(NamedTuple):
    """What one step of an engine, or a batch of a cluster, adds to a job.

    answers: the place of a line, from 0, and the fields of its answer. tokens: new tokens.
    """

    answers: list[tuple[int, dict[str, object]]]
    tokens: int


def engine_steps(
    llm: LLM,
    lines: Sequence[Line],
    start: int = 0,
    fields: Callable[[Line, Generation], dict[str, object]] | None = None,
) -> Iterator[Step]:
    """Answers the lines from `start` on with an engine. fields: of an answer; None: `result_fields`."""
    next_line = start  # the next line to submit
    places: dict[int, int] = {}
    queued = QUEUED_PER_ROW * llm.rows
    while next_line < len(lines) or places:
        step = Step([], 0)
        while next_line < len(lines) and next_line - min(places.values(), default=next_line) < queued:
            line = lines[next_line]
            try:
                if line.request is None:
                    raise ArgumentError(line.error)
                places[llm.add_request(line.request)] = next_line
            except ArgumentError as error:
                step.answers.append((next_line, {"error": str(error)}))
            next_line += 1
        tokens = 0
        for event in llm.step():
            tokens += len(event.tokens)
            if event.result is not None:
                place, result = places.pop(event.row), event.result
                step.answers.append((place, result_fields(result) if fields is None else fields(lines[place], result)))
        yield step._replace(tokens=tokens)


def write_answers(
    steps: Iterable[Step],
    lines: Sequence[Line],
    out: Path,
    progress: Callable[[int, int], object] | None = None,
    before: int | None = None,
    with_prompt: bool = False,
) -> tuple[int, int]:
    """Appends the missing answers to `out` in order → the numbers of written lines and of errors among them.

    steps: the answers, in any order. progress: called with the lines in `out` and the new tokens so far. before: what
    `count_answered` gave, if known. with_prompt: whether an answer has its prompt.
    """
    written = start = count_answered(out, lines) if before is None else before
    failed = tokens = 0
    answers: dict[int, dict[str, object]] = {}
    with out.open("a", encoding="utf-8") as file:
        for step in steps:
            tokens += step.tokens
            answers.update(step.answers)
            while written in answers:
                line, answer = lines[written], answers.pop(written)
                failed += bool(answer.get("error"))
                own: dict[str, object] = {} if line.id is None else {"id": line.id}
                if with_prompt and line.request is not None and not line.messages:
                    own["prompt"] = line.prompt
                file.write(to_json({"line": line.number, "digest": line.digest, **own, **answer}) + "\n")
                written += 1
            file.flush()
            if progress is not None:
                progress(written, tokens)
    return written - start, failed


def run_job(
    llm: LLM,
    lines: Sequence[Line],
    out: Path,
    progress: Callable[[int, int], object] | None = None,
    before: int | None = None,
    with_prompt: bool = False,
    fields: Callable[[Line, Generation], dict[str, object]] | None = None,
) -> tuple[int, int]:
    """Answers the missing lines with an engine; see `write_answers` and `engine_steps`."""
    start = count_answered(out, lines) if before is None else before
    return write_answers(engine_steps(llm, lines, start, fields), lines, out, progress, start, with_prompt)


def has_answer(out: Path) -> bool:
    """Whether a line of a finished job's output is an answer, not an error."""
    with out.open(encoding="utf-8") as lines:
        return any("error" not in json.loads(line) for line in lines)


def result_fields(result: Generation) -> dict[str, object]:
    """The fields of a result in a line of output."""
    if result.error:
        return {"error": result.error}
    fields = ("text", "mode", "finish_reason", "prompt_tokens", "denoiser_passes", "context_passes", "tokens_per_pass")
    found = {name: getattr(result, name) for name in fields} | {"new_tokens": len(result.tokens)}
    return found | ({"mode_reason": result.mode_reason} if result.mode_reason else {})
