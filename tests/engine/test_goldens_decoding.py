"""Results equal those recorded in `golden/decoding`, by every public function that generates.

A row alone is equal in every field. A batch is equal in tokens, text, passes, committed_at, confidence and the order of
a row's events, but not in `_last_nfe`. All requests are equal in float64. In fp32 those with a near tie, known from the
recording, are only counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch
from decoding_goldens import (
    TOLERANCE,
    Golden,
    Row,
    depends_on_timing,
    events_of,
    params_of,
    read_goldens,
    row_matches,
    row_of,
    run_method,
    run_stream,
    run_with_callback,
    values_close,
)
from decoding_models import decoding_model

from twotower import LLM, BlockEvent, Generation, Request, generate
from twotower.decoding.unmasking import POLICIES

SHORT_ALONE, SHORT_BATCHES = 32, 16
DTYPES = [torch.float64, torch.float32]
FORMS = ["short", pytest.param("full", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
DRAFTED = ("tokens", "text", "end", "at", "sure", "passes")  # fields of a row of a verified batch that are compared
NEAR_TIES = 0.05  # of all requests, at most


@cache
def goldens() -> Sequence[Golden]:
    return read_goldens()


def chosen(form: str, rows: range) -> list[tuple[int, Golden]]:
    """Numbered goldens; in the short form a fixed few of each mode."""
    own = [(i, golden) for i, golden in enumerate(goldens()) if len(golden["prompts"]) in rows]
    if form == "full":
        return own
    count = SHORT_ALONE if 1 in rows else SHORT_BATCHES
    modes: dict[str, list[tuple[int, Golden]]] = {}
    for number, golden in random.Random(0).sample(own, len(own)):
        modes.setdefault(golden["params"]["mode"], []).append((number, golden))
    return [entry for entries in modes.values() for entry in entries[: count // len(modes)]]


def comparable(form: str, rows: range, dtype: torch.dtype) -> Iterator[tuple[int, Golden, float]]:
    """Number, golden and tolerance of those that this dtype must reproduce; the others are counted."""
    entries = chosen(form, rows)
    apart = [number for number, golden in entries if dtype == torch.float32 and not golden["fp32"]]
    print(f"{dtype}: {len(entries)} requests, {len(apart)} with a near tie")
    assert len(apart) <= max(NEAR_TIES * len(entries), 2)
    for number, golden in entries:
        if number not in apart:
            yield number, golden, TOLERANCE[dtype]


def assert_is(found: Generation, golden: Golden, row: Row, tolerance: float, where: object) -> None:
    """Asserts all recorded fields of a row."""
    counted = not depends_on_timing(golden)
    own = row_of(found, counted)
    assert row_matches(own, row, tolerance), (where, own, row)


def by_engine(golden: Golden, dtype: torch.dtype) -> tuple[Generation, list[list[object]]]:
    """Runs one request by `LLM` → its result and events."""
    (prompt,), params = golden["prompts"], params_of(golden)
    length = len(prompt) + params.max_new_tokens
    llm = LLM(decoding_model(golden["model"], dtype), rows=2, length=length, block_size=params.block_size)
    events = [event for event in llm.stream(Request(prompt, params)) if isinstance(event, BlockEvent)]
    result = events[-1].result
    assert result is not None
    (again,) = llm.generate([Request(prompt, params)])
    assert again.tokens == result.tokens
    return result, events_of(events, result)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_a_request_alone(dtype: torch.dtype, form: str) -> None:
    for number, golden, tolerance in comparable(form, range(1, 2), dtype):
        model, (row,) = decoding_model(golden["model"], dtype), golden["rows"]
        (by_generate,) = generate(model, golden["prompts"], params_of(golden))
        (by_stream,), (stream_events,) = run_stream(model, golden)
        of_engine, engine_events = by_engine(golden, dtype)
        for result, where in ((by_generate, "generate"), (by_stream, "stream"), (of_engine, "LLM")):
            assert_is(result, golden, row, tolerance, (number, where))
        if not depends_on_timing(golden):
            assert stream_events == row["events"], number
            assert engine_events == row["events"], number
        (tokens,), nfe = run_method(model, golden)
        assert tokens == row["tokens"], number
        assert depends_on_timing(golden) or nfe == golden["nfe"] == row["passes"][0], number


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_step_callbacks(dtype: torch.dtype, form: str) -> None:
    """Their arguments are as recorded and they do not change results. The blocks of a batch run in lockstep."""
    some = 0
    for rows in (range(1, 2), range(2, 100)):
        for number, golden, tolerance in comparable(form, rows, dtype):
            if "calls" in golden:
                results, calls = run_with_callback(decoding_model(golden["model"], dtype), golden)
                assert values_close(golden["calls"], calls, 10 * tolerance), number
                for result, row in zip(results, golden["rows"], strict=True):
                    assert_is(result, golden, row, tolerance, number)
                some += len(calls)
    assert some > 100


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_a_batch(dtype: torch.dtype, form: str) -> None:
    for number, golden, tolerance in comparable(form, range(2, 100), dtype):
        model = decoding_model(golden["model"], dtype)
        results = generate(model, golden["prompts"], params_of(golden))
        again, events = run_stream(model, golden)
        tokens, _ = run_method(model, golden)
        width = max(len(row["tokens"]) for row in golden["rows"])
        drafts = golden["params"]["mode"] == "verified"
        for place, row in enumerate(golden["rows"]):
            where = (number, place)
            for result in (results[place], again[place]):
                own = row_of(result, not depends_on_timing(golden))
                right = [row, row["alone"]] if "alone" in row else [row]
                names = DRAFTED if drafts else None
                assert any(row_matches(own, each, tolerance, names) for each in right), (where, own, row)
            if not depends_on_timing(golden):
                assert [event[:2] for event in events[place]] == [event[:2] for event in row["events"]], where
                pairs = zip(events[place], row["events"], strict=True)
                assert all(_one_begins_the_other(a[2], b[2]) for a, b in pairs), where
            padding = [getattr(model.config, "pad_token_id", None) or 0] * (width - len(row["tokens"]))
            assert len(tokens[place]) == width, where
            assert "alone" in row or tokens[place] == row["tokens"] + padding, where


def _one_begins_the_other(a: list[int], b: list[int]) -> bool:
    """A draft in a batch may be longer than the row has room for."""
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]


def test_what_the_goldens_hold() -> None:
    """The goldens have every mode, policy and end, partly accepted drafts, and few near ties."""
    alone = [golden for golden in goldens() if len(golden["prompts"]) == 1]
    assert len(alone) >= 300
    assert len(goldens()) - len(alone) >= 50
    rows = [(golden, row) for golden in goldens() for row in golden["rows"]]
    for of, least in ((alone, 40), (goldens(), 50)):
        modes = Counter(golden["params"]["mode"] for golden in of)
        assert set(modes) == {"ar", "mock_ar", "diffusion", "verified"}
        assert min(modes.values()) >= least
    ends = Counter(row["end"] for _, row in rows)
    assert min(ends[end] for end in ("eos", "stop", "length")) >= 50
    assert {golden["params"].get("policy") for golden in alone} >= set(POLICIES)
    assert {golden["params"]["max_new_tokens"] for golden in alone} >= {0, 1, 40}
    drafts = [row["drafts"] for _, row in rows if "drafts" in row]
    drafted, kept = sum(each[1] for each in drafts), sum(each[2] for each in drafts)
    assert 0.05 < kept / drafted < 0.9
    assert sum(0 < each[2] < each[1] for each in drafts) >= 50
    assert sum("calls" in golden for golden in goldens()) >= 50
    assert sum(not golden["fp32"] for golden in goldens()) <= NEAR_TIES * len(goldens())
