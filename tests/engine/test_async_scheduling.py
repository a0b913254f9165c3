"""Asynchronous scheduling: passes are launched before the last one is collected, and the texts do not change.

The tests switch asynchronous scheduling on, because an engine on a CPU does not use it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import LENGTH, alone, assert_as_alone, drive, facts, moody_policy, some_request
from test_overlap import asking, told
from test_two_devices import CountingTransfer
from tiny_backbones import two_tower
from torch import Tensor

from twotower import LLM, TwoTowerForCausalLM
from twotower.decoding.output import StepEvent
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, register_policy
from twotower.denoiser_fields import DenoiserConfig
from twotower.engine.sequence import Phase


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


def ahead(model: TwoTowerForCausalLM, rows: int, length: int = LENGTH) -> LLM:
    llm = LLM(model, rows=rows, length=length)
    assert not llm.core.async_scheduling
    llm.core.async_scheduling = True
    return llm


SHORT = {(1, False), (2, True), (5, False), (16, True)}


@pytest.mark.parametrize(
    ("rows", "apart"),
    [
        pytest.param(rows, apart, marks=() if (rows, apart) in SHORT else pytest.mark.slow)
        for rows, apart in product((1, 2, 5, 16), (False, True))
    ],
)
def test_every_request_equals_its_result_alone(model: TwoTowerForCausalLM, rows: int, apart: bool) -> None:
    """Requests come and go, in any mode, watched or with log-probabilities. Counts of passes do not change."""
    rng = random.Random(rows + 100)
    requests = [some_request(rng) for _ in range(40)]
    asked = [replace(request, watched=rng.random() < 0.3, logprobs=rng.choice([None, None, 2])) for request in requests]
    with patch.object(model, "transfer", CountingTransfer() if apart else None):
        outputs = drive(ahead(model, rows), asked, rng, aborted=0.1)
    assert 8 < len(outputs) < 40
    for place, output in outputs.items():
        if asked[place].logprobs is None:
            assert_as_alone(model, requests[place], output)
        else:  # the last block is read too, for its log-probabilities
            assert facts(output, False) == facts(alone(model, requests[place]), False)


CHOICES = {
    "shift": DenoiserConfig(prediction_shift=1, block_attention="prefix_causal"),
    "first": DenoiserConfig(first_from_ar=True),
    "everywhere": DenoiserConfig.with_adapters(3, "everywhere"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_requests_of_other_denoisers_equal_their_results_alone(choice: str) -> None:
    """Also with a state that a second tower reads on another device."""
    own = two_tower("nemotron_h", torch.float64, denoiser=CHOICES[choice])
    rng = random.Random(choice)
    requests = [replace(some_request(rng), watched=rng.random() < 0.3) for _ in range(16)]
    with patch.object(own, "transfer", None if own.has_adapters else CountingTransfer()):
        outputs = drive(ahead(own, 4), requests, rng, aborted=0.1)
    for place, output in outputs.items():
        assert_as_alone(own, requests[place], output)


@pytest.mark.parametrize("mode", ["diffusion", "verified"])
def test_watching_shows_the_passes_that_are_counted(model: TwoTowerForCausalLM, mode: str) -> None:
    """Each counted pass is shown once and in order; idle passes are not shown."""
    llm = ahead(model, 3)
    watched = replace(asking([5, 6, 7], mode, block_size=8, draft_steps=3), watched=True)
    for other in ("diffusion", "verified"):
        llm.add_request(asking([8, 9], other))
    looks: list[int] = []
    passes, result = 0, None
    for event in llm.stream(watched):
        if isinstance(event, StepEvent):
            looks.append(event.step)
            continue
        assert looks == list(range(len(looks)))
        passes += len(looks)
        looks.clear()
        result = event.result
    assert result is not None
    assert passes == result.denoiser_passes > 0
    assert result.tokens == alone(model, watched).tokens


def test_the_next_pass_is_launched_before_the_host_reads_the_last(model: TwoTowerForCausalLM) -> None:
    """Within a block every step launches first. If no row needs another pass, the pass is collected at once."""
    llm = ahead(model, 2)
    for _ in range(2):
        llm.add_request(
            asking([5, 6], "diffusion", 16, block_size=16, steps_per_block=6, policy="top-k", policy_value=1)
        )
    seen = []
    while llm.has_work:
        seen.append(told(model, llm.step))
    blocks = [step for step in seen if "denoise" in step]
    assert len(blocks) == 6
    assert blocks[0][-1] == "denoise"
    assert all(step[0] == "denoise" and "read" in step for step in blocks[1:])
    assert len(seen) == len(blocks)  # the last possible pass of a block is collected at once


def test_drafts_of_one_pass_are_not_put_off(model: TwoTowerForCausalLM) -> None:
    ways = []
    for early in (True, False):
        llm, steps = LLM(model, rows=2, length=LENGTH), 0
        llm.core.async_scheduling = early
        for _ in range(2):
            llm.add_request(asking([5, 6], "verified", 20, draft_steps=1))
        while llm.has_work:
            llm.step()
            steps += 1
        ways.append(steps)
    assert ways[0] == ways[1]


def test_an_idle_pass_has_no_tokens(model: TwoTowerForCausalLM) -> None:
    """A block that the pass before finished has no tokens in the next pass."""
    lengths: list[list[int]] = []
    real = TwoTowerForCausalLM.denoise

    def noting(self: Any, block: Tensor, t: Tensor, view: Any, **options: Any) -> Tensor:
        lengths.append(options["lengths"].tolist())
        return real(self, block, t, view, **options)

    at_once = asking([5, 6], "diffusion", 8, block_size=8, confidence_threshold=0.0)
    slowly = asking([5, 6], "diffusion", 8, block_size=8, policy="top-k", policy_value=2)
    with patch.object(TwoTowerForCausalLM, "denoise", noting):
        first, second = ahead(model, 2).generate([at_once, slowly])
    assert (first.denoiser_passes, second.denoiser_passes) == (1, 4)
    assert lengths[:2] == [[8, 8], [0, 8]]
    assert all(own == [8] for own in lengths[2:4])


@contextmanager
def nervous_policy() -> Iterator[None]:
    """A policy "nervous", which raises for a block without a mask."""

    def nervous(seen: Pass, value: Tensor) -> Verdict:
        if not seen.masked.any(1).all():
            raise ZeroDivisionError("nothing to do")
        return POLICIES["threshold"].rule(seen, value)

    register_policy("nervous", nervous, value_meaning="confidence", default=0.0)
    try:
        yield
    finally:
        del POLICIES["nervous"]


def test_exceptions_of_policies_in_idle_passes_are_ignored(model: TwoTowerForCausalLM) -> None:
    with nervous_policy():
        request = asking([5, 6], "diffusion", 20, block_size=8, policy="nervous")
        (output,) = ahead(model, 1).generate([request])
        assert output.error == ""
        assert_as_alone(model, request, output)


def test_a_policy_that_raises_ends_its_own_request_once(model: TwoTowerForCausalLM) -> None:
    with moody_policy():
        requests = [
            asking([5, 6], "diffusion", 20, block_size=8, policy="moody", policy_value=policy_value)
            for policy_value in (2.0, 0.9)
        ]
        llm = ahead(model, 2, 64)
        numbers = [llm.add_request(request) for request in requests]
        results = []
        while llm.has_work:
            results += [(event.row, event.result) for event in llm.step() if event.result is not None]
        assert sorted(number for number, _ in results) == numbers
        by_number = dict(results)
        assert by_number[numbers[0]].error == "ZeroDivisionError: in a bad mood"
        assert_as_alone(model, requests[1], by_number[numbers[1]])
        assert sorted(llm.core.scheduler.free) == [0, 1]


@pytest.mark.parametrize("most", [0, 2])
def test_a_pass_that_does_not_fit(model: TwoTowerForCausalLM, most: int) -> None:
    """It is repeated in halves. A row that does not fit alone ends its request, once, and the engine continues."""
    real, rng = TwoTowerForCausalLM.denoise, random.Random(4)

    def scarce(self: Any, tokens: Tensor, *rest: Any, **options: Any) -> Any:
        out = real(self, tokens, *rest, **options)
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return out

    modes = ("diffusion", "verified", "ar")
    requests = [some_request(rng, mode=modes[i % 3], max_new_tokens=17, block_size=8, draft_steps=2) for i in range(15)]
    with patch.object(TwoTowerForCausalLM, "denoise", scarce):
        outputs = drive(ahead(model, 6), requests, rng, aborted=0.0)
    for place, output in outputs.items():
        if most or requests[place].params.mode == "ar":
            assert_as_alone(model, requests[place], output)
        else:
            assert output.finish_reason == "error"


def test_a_row_aborted_between_launch_and_collection_has_no_events(model: TwoTowerForCausalLM) -> None:
    """Another request uses its slot at once."""
    llm = ahead(model, 1)
    slow = asking([5, 6], "diffusion", 16, block_size=16, policy="top-k", policy_value=1)
    number = llm.add_request(slow)
    llm.step()
    assert llm.core.uncollected
    (row,) = llm.core.scheduler.running.values()
    llm.abort(number)
    assert row.phase is Phase.FINISHED
    other = asking([7, 8, 9], "diffusion", 20, block_size=8)
    (output,) = llm.generate([other])
    assert_as_alone(model, other, output)
