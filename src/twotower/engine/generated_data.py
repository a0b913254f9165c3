"""Data that a context tower makes itself: prompts or conversations → training records with the tower's answers.

The jobs are those of `engine.jobs`: a killed job continues, and the file equals that of a job without interruption.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower.chat_template import ASSISTANT, Message, check_messages, render, require_template
from twotower.decoding.output import Generation
from twotower.decoding.params import GenerationParams
from twotower.engine.admission import check_before_engine
from twotower.engine.jobs import MAX_LINE_BYTES, Line, RawLine, raw_lines
from twotower.engine.sequence import Request
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError, TwoTowerError
from twotower.tokenizer import longest_token, require_tokenizer

SAMPLE_SEEDS = 2**32  # between the seeds of two answers to a prompt: more than a file has lines


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is generated. parameters: of `GenerationParams`, without the seed. samples: answers to each prompt.

    The seed of answer j (from 0) to line n (from 1) is seed + n + j · 2³².

    Raises:
        ArgumentError: several answers are wanted, and greedy decoding would give the same answer each time.
    """

    parameters: Mapping[str, object]
    seed: int = 0
    samples: int = 1
    prompt_field: str = "prompt"
    messages_field: str = "messages"
    model_name: str = ""

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.parameters.get("temperature"):
            raise ArgumentError(
                f"samples is {self.samples}, and at temperature 0 all answers to a prompt are equal; give a "
                "--temperature above 0, or one sample"
            )


def read_prompts(path: Path, model: Towers, options: DataOptions) -> tuple[list[Line], list[Line]]:
    """The requests of a JSONL file, `samples` for each line, and the lines that cannot be answered, with their errors.

    A line has a prompt, or messages: a conversation whose last assistant turn, if it ends with one, is left out. Other
    fields have no effect, so files of training data can be given.

    Raises:
        ArgumentError: the file has no line that can be answered; or it has messages, and the model no chat template.
    """
    lines: list[Line] = []
    bad: list[Line] = []
    longest = model.spec.max_position_embeddings * longest_token(require_tokenizer(model.tokenizer))
    for raw in raw_lines(path):
        try:
            lines += _requests(raw, model, options, longest)
        except (_BadLine, TwoTowerError, UnicodeError) as error:
            bad.append(Line(raw.number, "", error=str(error)))
    if not lines:
        first = f"no line can be answered; line {bad[0].number}: {bad[0].error}" if bad else "has no lines"
        raise ArgumentError(f'{path}: {first}; give JSON objects with "prompt" or "messages"')
    return lines, bad


def data_fields(line: Line, result: Generation) -> dict[str, object]:
    """The fields of a training record with an answer. `finish_reason` "length" says that the text goes on."""
    if result.error:
        return {"error": result.error}
    facts = {
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.tokens),
    }
    if not line.messages:
        return {"text": result.text, **facts}
    return {"messages": [*line.messages, {"role": ASSISTANT, "content": result.text}], **facts}


class _BadLine(Exception):
    """A line without a request. The text of the exception is the reason."""


def _requests(raw: RawLine, model: Towers, options: DataOptions, longest: int) -> Iterator[Line]:
    if raw.nbytes > MAX_LINE_BYTES:
        raise _BadLine(f"the line has {raw.nbytes} bytes; at most {MAX_LINE_BYTES} are allowed, so shorten its prompt")
    try:
        fields = json.loads(raw.start.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _BadLine(f"a JSON {type(fields).__name__}, not an object")
    prompt, messages, tokens = _prompt(fields, model, options, longest)
    inherited = [options.model_name, dict(options.parameters), options.seed, options.prompt_field]
    for sample in range(options.samples):
        seed = options.seed + raw.number + sample * SAMPLE_SEEDS
        params = GenerationParams.from_mapping({**options.parameters, "seed": seed})
        check_before_engine(model, params, [len(tokens)])
        digest = raw.hash.copy()
        digest.update(json.dumps([*inherited, options.messages_field, sample], sort_keys=True, default=str).encode())
        request = Request(tokens, params)
        yield Line(raw.number, digest.hexdigest()[:16], fields.get("id"), request, prompt, messages)


def _prompt(
    fields: Mapping[str, object], model: Towers, options: DataOptions, longest: int
) -> tuple[str, tuple[Message, ...], list[int]]:
    """→ the prompt, or the messages, and the tokens."""
    tokenizer = require_tokenizer(model.tokenizer)
    messages: tuple[Message, ...] = ()
    prompt = fields.get(options.prompt_field)
    if fields.get(options.messages_field) is not None:
        require_template(tokenizer)
        messages = check_messages(fields[options.messages_field])
        messages = messages[:-1] if messages[-1]["role"] == ASSISTANT else messages
        if not messages:
            raise _BadLine("messages has an answer alone; give the messages before it")
        prompt = render(tokenizer, messages, generation_prompt=True)
    if not isinstance(prompt, str):
        raise _BadLine(f"no {options.prompt_field!r} that is a string, and no {options.messages_field!r}")
    if len(prompt) > longest:
        window = model.spec.max_position_embeddings
        raise _BadLine(f"its prompt has {len(prompt)} characters, more than the {window} tokens of the window can hold")
    prompt.encode()  # raises for half a surrogate pair
    tokens = list(tokenizer(prompt, add_special_tokens=not messages)["input_ids"])
    return ("" if messages else prompt), messages, tokens
