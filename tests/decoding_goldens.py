"""Results of public calls as plain data, which are recorded once and then compared.

A golden is one line of JSON: `model` (a name in `decoding_models`), `prompts`, `params` (the given arguments of
GenerationParams), `rows` (see `row_of`), `nfe` (denoiser passes; not compared for a batch), `calls` (of step_callback,
where recorded), and `fp32` (whether fp32 gives the same discrete results). A row of a verified batch may have `alone`:
a second correct result, because the last draft of a batch is as long as its longest row needs.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDEN
from oracle import Decoded
from torch import Tensor

from twotower import BlockEvent, Generation, GenerationParams, TwoTowerForCausalLM, generate

FILE = GOLDEN / "decoding" / "requests.jsonl.gz"
TOLERANCE = {torch.float64: 2e-6, torch.float32: 1e-3}  # tolerance of confidences, which are stored with six digits
Golden = dict[str, Any]
Row = dict[str, Any]
METHODS = {
    "ar": "generate_ar",
    "mock_ar": "generate_mock_ar",
    "diffusion": "generate_mask_diffusion",
    "verified": "generate_verified",
}


def read_goldens(path: Path = FILE) -> list[Golden]:
    """Reads all goldens. Recorded parameters may have the deprecated name `knob` of policy_value."""
    with gzip.open(path, "rt") as file:
        goldens = [json.loads(line) for line in file]
    for golden in goldens:
        golden["params"] = {"policy_value" if k == "knob" else k: v for k, v in golden["params"].items()}
    return goldens


def params_of(golden: Golden) -> GenerationParams:
    """The parameters of a golden's request."""
    return GenerationParams.of(**golden["params"])


def depends_on_timing(golden: Golden) -> bool:
    """Whether counts depend on measured times; then only tokens, text and finish reason are recorded."""
    return params_of(golden).depends_on_timing


# --- results and events ---------------------------------------------------------------------------------------------


def row_of(result: Generation | Decoded, counted: bool = True) -> Row:
    """A row: tokens, text, end; with counts also at (committed_at), sure (confidence), passes and drafts.

    passes: denoiser, context; drafts: drafts, drafted, accepted, rejected.
    """
    row: Row = {"tokens": result.tokens, "text": result.text, "end": result.finish_reason}
    if counted:
        row |= {
            "at": result.committed_at,
            "sure": [round(value, 6) for value in result.confidence],
            "passes": [result.denoiser_passes, result.context_passes],
            "drafts": [result.drafts, result.drafted, result.accepted, result.rejected],
        }
    return row


def events_of(events: Sequence[BlockEvent], result: Generation) -> list[list[Any]]:
    """Events of one row, each as [tokens, characters, draft]. Other fields are checked against the result."""
    assert [event.block for event in events] == list(range(len(events)))
    assert [event.result is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert "".join(event.text for event in events) == result.text
    for name, whole in (
        ("tokens", result.tokens), ("committed_at", result.committed_at), ("confidence", result.confidence),
    ):  # fmt: skip
        assert [value for event in events for value in getattr(event, name)] == whole
    starts = [sum(len(event.tokens) for event in events[:i]) for i in range(len(events))]
    assert [event.start for event in events] == starts
    return [[len(event.tokens), len(event.text), list(event.draft)] for event in events]


def run_stream(model: TwoTowerForCausalLM, golden: Golden) -> tuple[list[Generation], list[list[list[Any]]]]:
    """Decodes with `model.stream`; returns the result and the events of each row."""
    by_row: list[list[BlockEvent]] = [[] for _ in golden["prompts"]]
    for event in model.stream(golden["prompts"], **golden["params"]):
        by_row[event.row].append(event)
    results = [own[-1].result for own in by_row]
    assert all(result is not None for result in results)
    whole = [result for result in results if result is not None]
    return whole, [events_of(own, result) for own, result in zip(by_row, whole, strict=True)]


# --- step callbacks -------------------------------------------------------------------------------------------------


def run_with_callback(model: TwoTowerForCausalLM, golden: Golden) -> tuple[list[Generation], list[list[Any]]]:
    """Decodes with `generate`; returns the results and the calls of step_callback.

    A call is [step, steps, block_idx, t, block, logits].
    """
    calls: list[list[Any]] = []

    def callback(step: int, steps: int, block: Tensor, *, t: Any, logits: Tensor | None, block_idx: int) -> None:
        level = t.tolist() if isinstance(t, Tensor) else t
        calls.append([step, steps, block_idx, level, block.tolist(), None if logits is None else _digest(logits)])

    params = params_of(golden)
    return generate(model, golden["prompts"], params, step_callback=callback), calls


def _digest(logits: Tensor) -> list[Any]:
    """Digest of logits (B, L, V), mask token included: the argmax of each position, and three numbers."""
    finite = logits[logits.isfinite()].double()
    facts = [finite.mean(), finite.std(), finite.abs().max()]
    return [logits.argmax(-1).tolist(), [round(float(fact), 5) for fact in facts], list(logits.shape)]


# --- the published tensors ------------------------------------------------------------------------------------------


def run_method(model: TwoTowerForCausalLM, golden: Golden) -> tuple[list[list[int]], int]:
    """Decodes with `model.generate_*`; returns the new tokens of each row with padding, and `_last_nfe`."""
    params = {name: value for name, value in golden["params"].items() if name != "mode"}
    method: Callable[..., Tensor] = getattr(model, METHODS[golden["params"]["mode"]])
    out = method(golden["prompts"], **params).tolist()
    width = max(map(len, golden["prompts"]))
    assert all(row[width - len(ids) : width] == ids for row, ids in zip(out, golden["prompts"], strict=True))
    return [row[width:] for row in out], model._last_nfe


# --- comparing ------------------------------------------------------------------------------------------------------


def discrete(row: Row) -> Row:
    """A row without confidences."""
    return {name: value for name, value in row.items() if name != "sure"}


def values_close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two values have the same structure, integers and texts, and floats within the tolerance."""
    if isinstance(a, list):
        return (
            isinstance(b, list)
            and len(a) == len(b)
            and all(values_close(x, y, tolerance) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance
    return bool(a == b)


def row_matches(found: Row, golden: Row, tolerance: float, names: Sequence[str] | None = None) -> bool:
    """Whether a row equals the recorded row in these fields (None: in all recorded fields)."""
    wanted = [name for name in golden if name not in ("alone", "events")] if names is None else names
    return all(values_close(golden[name], found[name], tolerance) for name in wanted if name in golden)
