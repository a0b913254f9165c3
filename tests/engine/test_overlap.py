"""Towers on two devices run at the same time: launches before reads, transfers, and sequences that wait.

One CPU stands for both devices, as in test_two_devices.py: a DeviceTransfer makes the engine treat them as two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import LENGTH, alone, assert_as_alone, drive, facts, moody_policy, some_request
from test_two_devices import PLACES, CountingTransfer, Homes
from torch import Tensor

from twotower import LLM, Request, TwoTowerForCausalLM
from twotower.cache.replica import Replica
from twotower.cache.state_bytes import state_bytes
from twotower.decoding.output import StepEvent
from twotower.decoding.params import GenerationParams
from twotower.engine.sequence import Phase
from twotower.ops.host_transfer import AsyncHostCopy, to_device_async

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


@pytest.fixture
def transfer(model: TwoTowerForCausalLM) -> Iterator[CountingTransfer]:
    """Engines made while this transfer is set have their towers on two devices."""
    with patch.object(model, "transfer", CountingTransfer()):
        assert isinstance(model.transfer, CountingTransfer)
        yield model.transfer


def asking(prompt: list[int], mode: str, n: int = 40, **given: Any) -> Request:
    return Request(prompt, GenerationParams.of(mode=mode, max_new_tokens=n, **given))


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("transfer")
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_every_request_equals_its_result_alone(model: TwoTowerForCausalLM, rows: int) -> None:
    """Requests come and go in any mode, watched or with log-probabilities; the results do not change."""
    rng = random.Random(rows)
    requests = [some_request(rng) for _ in range(40)]
    asked = [replace(request, watched=rng.random() < 0.3, logprobs=rng.choice([None, None, 2])) for request in requests]
    llm = LLM(model, rows=rows, length=LENGTH)
    assert isinstance(llm.core.reader, Replica)
    outputs = drive(llm, asked, rng, aborted=0.1)
    assert 15 < len(outputs) < 40
    with patch.object(model, "transfer", None):
        for place, output in outputs.items():
            if asked[place].logprobs is None:
                assert_as_alone(model, requests[place], output)
            else:  # the last block is read too, for its log-probabilities
                assert facts(output, False) == facts(alone(model, requests[place]), False)
                assert len(output.logprobs) == len(output.tokens)


@pytest.mark.usefixtures("transfer")
@pytest.mark.parametrize("mode", ["diffusion", "verified"])
def test_watching_shows_the_passes_that_are_counted(model: TwoTowerForCausalLM, mode: str) -> None:
    llm = LLM(model, rows=3, length=LENGTH)
    watched = replace(asking([5, 6, 7], mode, block_size=8, draft_steps=2), watched=True)
    for other in ("diffusion", "verified"):
        llm.add_request(asking([8, 9], other))
    looks, result = 0, None
    for event in llm.stream(watched):
        looks += isinstance(event, StepEvent)
        result = event.result or result
    assert result is not None
    assert looks == result.denoiser_passes > 0


@pytest.mark.usefixtures("transfer")
@pytest.mark.parametrize("verb", ["extend", "denoise"])
def test_a_pass_that_does_not_fit_is_done_in_halves(model: TwoTowerForCausalLM, verb: str) -> None:
    """Both halves are launched before one is collected."""
    real, rng = getattr(TwoTowerForCausalLM, verb), random.Random(4)

    def scarce(self: Any, tokens: Tensor, *rest: Any, **options: Any) -> Any:
        out = real(self, tokens, *rest, **options)
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return out

    requests = [some_request(rng) for _ in range(15)]
    with patch.object(TwoTowerForCausalLM, verb, scarce):
        outputs = drive(LLM(model, rows=6, length=LENGTH), requests, rng, aborted=0.0)
    with patch.object(model, "transfer", None):
        for place, output in outputs.items():
            assert_as_alone(model, requests[place], output)


@pytest.mark.usefixtures("transfer")
def test_a_policy_that_raises_ends_its_own_request_only(model: TwoTowerForCausalLM) -> None:
    with moody_policy():
        requests = [
            asking([5, 6], "diffusion", 20, block_size=8, policy="moody", policy_value=policy_value)
            for policy_value in (2.0, 0.9)
        ]
        llm = LLM(model, rows=2, length=64)
        broken, whole = llm.generate(requests)
        assert broken.error == "ZeroDivisionError: in a bad mood"
        with patch.object(model, "transfer", None):
            assert_as_alone(model, requests[1], whole)
        assert len(llm.core.scheduler.free) == 2


# --- in which order -------------------------------------------------------------------------------------------------


READS = ("tolist", "item", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def told(model: TwoTowerForCausalLM, run: Callable[[], object]) -> list[str]:
    """Records what happens while run() runs: passes, and the host's reads of tensors outside of passes."""
    log: list[str] = []
    inside = [0]

    def noting(name: str, real: Callable[..., Any], verb: bool) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not inside[0]:
                log.append(name if verb else "read")
            inside[0] += 1  # a pass reads nothing from an accelerator (test_state.py)
            try:
                return real(*args, **options)
            finally:
                inside[0] -= 1

        return call

    with ExitStack() as stack:
        for name in ("extend", "denoise"):
            stack.enter_context(patch.object(model, name, noting(name, getattr(model, name), True)))
        for name in READS:
            stack.enter_context(patch.object(Tensor, name, noting(name, getattr(Tensor, name), False)))
        stack.enter_context(patch.object(AsyncHostCopy, "wait", noting("read", AsyncHostCopy.wait, False)))
        run()
    return log


MIXED = [
    *(asking([5, 6, 7 + i], "verified", draft_steps=1 + i % 2) for i in range(3)),
    *(
        asking([9, 6 + i], "diffusion", block_size=8, steps_per_block=4, policy="top-k", policy_value=2 + i)
        for i in range(3)
    ),
    *(asking([8] * (3 + i), "mock_ar") for i in range(2)),
    replace(asking([5, 6], "ar"), logprobs=2),
    replace(asking([5, 7], "diffusion", block_size=8, steps_per_block=2), logprobs=2, watched=True),
]


def steps(model: TwoTowerForCausalLM, requests: list[Request]) -> list[list[str]]:
    """The records of each step after the first, which admits all requests and reads their prompts."""
    llm = LLM(model, rows=len(requests), length=LENGTH)
    for request in requests:
        llm.add_request(request)
    llm.step()
    out = []
    while llm.has_work:
        out.append(told(model, llm.step))
    return out


@pytest.mark.usefixtures("transfer")
def test_both_towers_are_at_work_before_the_host_reads_anything(model: TwoTowerForCausalLM) -> None:
    both = 0
    for log in steps(model, MIXED):
        passes = [name for name in log if name != "read"]
        assert log[: len(passes)] == passes  # every launch comes first
        assert passes == sorted(passes)  # the denoiser's before the context's
        assert "read" in log
        both += {"denoise", "extend"} <= set(passes)
    assert both > 20


def test_on_one_device_the_context_is_read_first(model: TwoTowerForCausalLM) -> None:
    """The recorder sees a read between the passes."""
    logs = [log for log in steps(model, MIXED) if {"denoise", "extend"} <= set(log)]
    assert len(logs) > 20
    for log in logs:
        assert log.index("extend") < log.index("read") < log.index("denoise")


# --- what crosses ---------------------------------------------------------------------------------------------------


def crossing(llm: LLM, transfer: CountingTransfer) -> list[int]:
    """Bytes that cross in each step, until all requests have ended."""
    out = []
    while llm.has_work:
        transfer.take()
        llm.step()
        out.append(transfer.take())
    return out


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize("length", [3, 90])
def test_a_block_sends_only_its_own_kv_and_states(length: int, others: int) -> None:
    """For any length of the text and any other requests. All data crosses through the transfer."""
    model = build_random_model("M*E-M*", seed=9)
    per_row, per_token, *_ = state_bytes(model.spec, model.dtype)
    with torch.no_grad(), Homes(model) as homes:
        model.transfer = transfer = CountingTransfer(homes)
        llm = LLM(model, rows=8, length=400)
        for i in range(others):  # their blocks take 16 passes, and no block is read in that time
            llm.add_request(asking([7 + i] * 30, "diffusion", 16, block_size=16, policy="top-k", policy_value=1))
        if others:
            for _ in range(2):
                llm.step()
        llm.add_request(
            asking([5] * length, "diffusion", 12, block_size=4, steps_per_block=2, policy="top-k", policy_value=2)
        )
        transfer.take()
        counted = []
        for _ in range(9):
            llm.step()
            assert "context" not in {to for to, _ in transfer.sent}
            counted.append(transfer.take())
    segments = 2 * llm.core.state.rows * torch.long.itemsize  # the rows' KV slots: sent when a row is allocated some
    block = 4 * per_token + per_row
    # The prompt is read; then passes 1 and 2, a read of the block, and so on; the last block is not read.
    assert counted == [0, length * per_token + per_row + segments, 0, 0, block, 0, 0, block, 0]


def test_only_the_rows_that_were_read_cross(model: TwoTowerForCausalLM, transfer: CountingTransfer) -> None:
    """Verified rows at different lengths: each step sends the accepted part of the verified drafts, without padding."""
    per_row, per_token, *_ = state_bytes(model.spec, model.dtype)
    rng = random.Random(2)
    llm = LLM(model, rows=4, length=LENGTH)
    for n in (10, 40, 25, 30, 17, 33):
        llm.add_request(asking([rng.randrange(4, 64) for _ in range(n)], "verified", n, draft_steps=1))
    segments, shown = 2 * 4 * torch.long.itemsize, dict[int, int]()
    version, varied = 0, set()
    while llm.has_work:
        before = set(shown)
        llm.step()
        expected = 0
        for number, row in llm.core.scheduler.running.items():
            if row.visible_length > shown.get(number, -1):
                expected += per_row + (row.visible_length - max(shown.get(number, 0), 0)) * per_token
                shown[number] = row.visible_length
                varied.add(row.visible_length if number not in before else 0)
        if llm.core.reader.copy.kv_slots.version != version:  # type: ignore[union-attr]
            version = llm.core.reader.copy.kv_slots.version  # type: ignore[union-attr]
            expected += segments
        assert transfer.take() == expected
    assert len(varied) > 3


def test_rows_that_need_no_denoiser_never_cross(model: TwoTowerForCausalLM, transfer: CountingTransfer) -> None:
    llm = LLM(model, rows=3, length=LENGTH)
    for i in range(3):
        llm.add_request(asking([5, 6, 7 + i], "ar", 20))
    assert set(crossing(llm, transfer)) == {0}


# --- who waits ------------------------------------------------------------------------------------------------------


def phases(llm: LLM) -> list[list[Phase]]:
    """The phase of each row after every step in which all rows run."""
    out = []
    rows = len(llm.core.scheduler.waiting)
    while llm.has_work:
        llm.step()
        if len(llm.core.scheduler.running) == rows:
            out.append([row.phase for row in llm.core.scheduler.running.values()])
    return out


@pytest.mark.usefixtures("transfer")
@pytest.mark.parametrize("mode", ["verified", "mock_ar"])
@pytest.mark.parametrize("rows", [2, 3, 6])
def test_rows_in_phase_split_into_two_halves(model: TwoTowerForCausalLM, mode: str, rows: int) -> None:
    """They begin together. From the second step on, one half always needs one tower and the other half the other."""
    llm = LLM(model, rows=rows, length=LENGTH)
    for _ in range(rows):
        llm.add_request(asking([5, 6, 7], mode, draft_steps=1))
    seen = phases(llm)
    denoising = {Phase.DENOISE, Phase.DENOISER_AR}
    older = (rows + 1) // 2
    assert {phase in denoising for phase in seen[0]} == {True}
    assert sum(Phase.STEP not in now for now in seen) > 10
    for at, now in enumerate(seen[1:]):
        if Phase.STEP in now:  # only one token is left, so there is no draft
            break
        halves = [phase in denoising for phase in now]
        assert halves == [at % 2 == 1] * older + [at % 2 == 0] * (rows - older)


@pytest.mark.parametrize("apart", [True, False])
def test_blocks_of_several_passes_part_at_their_last(model: TwoTowerForCausalLM, apart: bool) -> None:
    """No row waits before it is certain that all rows leave the denoiser. On one device no row waits."""
    with patch.object(model, "transfer", CountingTransfer() if apart else None):
        llm = LLM(model, rows=4, length=LENGTH)
        given: dict[str, Any] = {"block_size": 8, "steps_per_block": 4, "policy": "top-k", "policy_value": 2}
        for _ in range(4):
            llm.add_request(asking([5, 6, 7], "diffusion", **given))
        taken = []
        while llm.has_work:
            llm.step()
            if len(llm.core.scheduler.running) == 4:
                taken.append([row.passes_launched for row in llm.core.scheduler.running.values()])
    if not apart:
        assert all(len(set(now)) == 1 for now in taken)
        return
    first = taken.index([4, 4, 3, 3])
    assert all(len(set(now)) == 1 for now in taken[:first])
    assert all(now[0] == now[1] != now[2] == now[3] for now in taken[first:])
    assert len(taken) > first + 10


@pytest.mark.usefixtures("transfer")
def test_no_row_waits_twice(model: TwoTowerForCausalLM) -> None:
    """A row that waited runs in the next step, unless older rows have ended."""
    rng = random.Random(6)
    llm = LLM(model, rows=7, length=LENGTH)
    for _ in range(20):
        llm.add_request(some_request(rng, mode=rng.choice(["verified", "mock_ar"]), draft_steps=1))
    waited: dict[int, int] = {}
    held = 0
    while llm.has_work:
        before = {number: (row.phase, row.output.denoiser_passes) for number, row in llm.core.scheduler.running.items()}
        llm.step()
        for number, row in llm.core.scheduler.running.items():
            still = before.get(number) == (row.phase, row.output.denoiser_passes)
            waited[number] = (
                waited.get(number, 0) + 1 if still and row.phase in (Phase.DENOISE, Phase.DENOISER_AR) else 0
            )
            held += waited[number] > 0
            older_ended = any(other < number and other not in llm.core.scheduler.running for other in before)
            assert waited[number] <= 1 or older_ended
    assert held > 0


# --- to and from the host -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_numbers_arrive_as_they_are(device: str) -> None:
    there = torch.device(device)
    numbers, narrow = to_device_async([[1, 2], [3, 2**40]], there), to_device_async([0.5, 1], there, torch.float64)
    assert (numbers.dtype, narrow.dtype, numbers.device.type) == (torch.long, torch.float64, device)
    assert to_device_async([], there, torch.long).shape == (0,)
    fetched = AsyncHostCopy(numbers * 2, narrow > 0.7)
    assert all(tensor.device.type == "cpu" for tensor in fetched.wait())
    assert fetched.tolist() == [[[2, 4], [6, 2**41]], [False, True]]


@CUDA
def test_the_host_waits_only_for_the_results_it_reads() -> None:
    """Neither a transfer to the device nor a fetch of earlier results waits for a long product launched after them."""
    there = torch.device("cuda")
    early, big = torch.arange(5, device=there), torch.randn(8192, 8192, device=there)
    big @ big
    to_device_async([1], there)
    torch.cuda.synchronize()
    fetched = AsyncHostCopy(early)
    for _ in range(30):
        big = (big @ big).clamp(-1, 1)
    later = torch.cuda.current_stream().record_event()
    to_device_async([1, 2, 3], there)
    assert fetched.tolist() == [[0, 1, 2, 3, 4]]
    assert not later.query()


@CUDA
@pytest.mark.parametrize("places", PLACES, ids="-".join)
def test_on_real_devices(places: tuple[str, str]) -> None:
    if "cuda:1" in places and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, rng = build_random_model(EVERY_KIND, dtype=torch.float64), random.Random(7)
    requests = [some_request(rng) for _ in range(20)]
    expected = [alone(model, request).tokens for request in requests]
    model.place_towers_on_devices(*places)
    outputs = drive(LLM(model, rows=4, length=LENGTH), requests, rng, aborted=0.05)
    assert [output.tokens for output in outputs.values()] == [expected[place] for place in outputs]


@CUDA
@pytest.mark.parametrize("mode", ["ar", "diffusion", "mock_ar", "verified"])
def test_on_a_gpu_the_host_waits_for_results_only(mode: str) -> None:
    """No step makes the host wait for the device's queue. Kernels are checked and passes recorded before."""
    model = build_random_model(EVERY_KIND).to("cuda")
    requests = [asking([5, 6, 7 + i], mode, 20, draft_steps=2) for i in range(3)]
    llm = LLM(model, rows=3, length=LENGTH)
    before = llm.generate(requests)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = llm.generate(requests)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [output.tokens for output in again] == [output.tokens for output in before]
