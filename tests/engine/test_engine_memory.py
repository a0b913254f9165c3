"""The engine's memory: shared KV slots, the prefix cache, and out-of-memory."""

from __future__ import annotations

import gc
import random
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import KINDS, alone, assert_as_alone, drive, some_request

from twotower import LLM, Request, TwoTowerForCausalLM
from twotower.cache.kv_slots import KVSlots
from twotower.cache.prefix_cache import PrefixCache
from twotower.cache.state_bytes import state_bytes
from twotower.decoding.params import GenerationParams
from twotower.engine import budget, core
from twotower.engine.generation import generate
from twotower.engine.oom import out_of_memory, split_on_oom
from twotower.errors import ArgumentError, LengthError

LENGTH = 160


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


def asking(prompt: list[int], mode: str = "ar", n: int = 6, **given: Any) -> Request:
    return Request(prompt, GenerationParams.of(mode=mode, max_new_tokens=n, **given))


# --- shared KV slots --------------------------------------------------------------------------------------------------


def test_segments_never_overlap_and_come_back() -> None:
    rng, kv_slots = random.Random(0), KVSlots(8, 2, 100, torch.device("cpu"))
    for _ in range(500):
        row = rng.randrange(8)
        if row in kv_slots.allocated:
            kv_slots.free(row)
        elif kv_slots.first_fit(length := rng.randrange(1, 60)) is not None:
            kv_slots.allocate(row, length)
            assert kv_slots.start[row] == 2 * kv_slots.allocated[row][0]
        spans = sorted((first, first + count) for first, count in kv_slots.allocated.values())
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
        assert not spans or spans[-1][1] <= 100
    for row in list(kv_slots.allocated):
        kv_slots.free(row)
    assert kv_slots.first_fit(100) == 0
    assert kv_slots.first_fit(101) is None


def test_a_text_reserves_the_kv_slots_it_needs(model: TwoTowerForCausalLM) -> None:
    """Memory for two of the longest texts holds eight short ones. A long one waits, and no request overtakes it."""
    memory = LLM.memory_for(model, 2, LENGTH)
    per_row, per_token, *_ = state_bytes(model.spec, model.dtype)
    memory += 6 * per_row * 2
    llm = LLM(model, rows=8, length=LENGTH, memory=memory)
    assert llm.core.state.nbytes + llm.core.prefixes.budget <= memory + 16 * per_token
    short = [asking([5, 6, 7 + i], n=4) for i in range(20)]
    long = asking(list(range(3, 60)), n=100)
    numbers = [llm.add_request(request) for request in (*short[:8], long, *short[8:])]
    llm.step()
    assert len(llm.core.scheduler.running) == 8
    ended: list[int] = []
    results: dict[int, Any] = {}
    while llm.has_work:
        for event in llm.step():
            if event.result is not None:
                ended.append(event.row)
                results[event.row] = event.result
        started = set(llm.core.scheduler.running) | set(ended)
        assert started == set(range(len(started)))  # in order of arrival
    assert sorted(ended) == numbers
    assert results[8].tokens == alone(model, long).tokens
    assert not llm.core.state.kv_slots.allocated
    assert len(llm.core.scheduler.free) == 8


def test_what_can_never_fit_is_refused_with_the_numbers(model: TwoTowerForCausalLM) -> None:
    llm = LLM(model, rows=2, length=LENGTH, memory=LLM.memory_for(model, 1, 60))
    with pytest.raises(
        ArgumentError, match=r"can need the keys and values of \d+ tokens, and this engine's memory holds"
    ):
        llm.add_request(asking(list(range(1, 50)), n=100))
    with pytest.raises(ArgumentError, match="hold no text"):
        LLM(model, memory=100)
    assert not llm.has_work


# --- prompts that begin alike -----------------------------------------------------------------------------------------


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, so that short prompts have several."""
    monkeypatch.setattr(core, "PROMPT_CHUNK", 8)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("mode", sorted(KINDS))
def test_a_cached_prefix_is_not_read_again(model: TwoTowerForCausalLM, mode: str) -> None:
    """Two prompts of 31 tokens differ after 20: the second is read from token 16. A third is all in the cache."""
    shared = list(range(5, 25))
    first, second = asking([*shared, *range(30, 41)], mode), asking([*shared, *range(40, 51)], mode)
    llm = LLM(model, rows=2, length=LENGTH)
    llm.core.prefixes.budget = 2**24
    for request, cached in ((first, 0), (second, 16), (first, 24), (asking(shared[:16], mode), 8)):
        (output,) = llm.generate([request])
        assert output.cached_tokens == cached
        assert_as_alone(model, request, output)
    assert (llm.core.prefixes.query_tokens, llm.core.prefixes.hit_tokens) == (31 * 3 + 16, 48)


@pytest.mark.usefixtures("short_chunks")
def test_the_least_recently_used_is_forgotten_first(model: TwoTowerForCausalLM) -> None:
    llm = LLM(model, rows=1, length=LENGTH)
    texts = [[10 * i + j for j in range(9)] for i in range(6)]
    llm.generate([asking(texts[0])])
    llm.core.prefixes.budget = 3 * llm.core.prefixes.nbytes
    cached = []
    for which in (1, 2, 0, 3, 0, 1, 2):  # 3 evicts 1, then 1 evicts 2, then 2 evicts 3
        (output,) = llm.generate([asking(texts[which])])
        cached.append(output.cached_tokens)
        assert llm.core.prefixes.nbytes <= llm.core.prefixes.budget
        assert llm.core.prefixes.nbytes == sum(node.snapshot.nbytes for node in llm.core.prefixes.nodes.values())
    assert cached == [0, 0, 8, 0, 8, 0, 0]


@pytest.mark.usefixtures("short_chunks")
def test_only_leaves_of_the_prefix_cache_are_evicted(model: TwoTowerForCausalLM) -> None:
    """Only leaves are evicted, so every cached chunk can be reached from the start."""
    rng, llm = random.Random(4), LLM(model, rows=3, length=LENGTH)
    stems = [[rng.randrange(3, 60) for _ in range(40)] for _ in range(3)]
    llm.generate([asking(stems[0][:9])])
    llm.core.prefixes.budget = 6 * llm.core.prefixes.nbytes
    requests = [asking([*rng.choice(stems)[: rng.randrange(1, 40)], *([rng.randrange(3, 60)] * 3)]) for _ in range(60)]
    for request, output in zip(requests, llm.generate(requests), strict=True):
        assert_as_alone(model, request, output)
    numbers = {node.number for node in llm.core.prefixes.nodes.values()} | {0}
    assert all(parent in numbers for parent, _ in llm.core.prefixes.nodes)
    assert llm.core.prefixes.hit_tokens > 0


@pytest.mark.usefixtures("short_chunks")
def test_any_requests_with_shared_beginnings_are_as_alone(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(7)
    stem = [rng.randrange(3, 60) for _ in range(30)]
    requests = []
    for _ in range(40):
        request = some_request(rng)
        requests.append(Request([*stem[: rng.randrange(31)], *request.prompt], request.params))
    llm = LLM(model, rows=4, length=LENGTH + 40)
    llm.core.prefixes.budget = 2**24
    outputs = drive(llm, requests, rng, aborted=0.1)
    for place, output in outputs.items():
        assert_as_alone(model, requests[place], output)
    assert llm.core.prefixes.hit_tokens > 100


def test_nothing_is_kept_without_room() -> None:
    assert not PrefixCache(8, 0)._evict_for(1, spared=[])


# --- memory gives out -------------------------------------------------------------------------------------------------


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        split_on_oom(lambda items: _raise(RuntimeError("shapes")), [1], list, lambda item, error: [])


def _raise(error: Exception) -> list[int]:
    raise error


@pytest.mark.parametrize("verb", ["extend", "denoise"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_out_of_memory_ends_as_few_requests_as_possible(model: TwoTowerForCausalLM, verb: str, late: bool) -> None:
    """Passes of more than two rows, and all passes of one request, run out of memory, before or after the pass.

    That request fails; the others equal their results alone.
    """
    real = getattr(TwoTowerForCausalLM, verb)
    poison = 59

    def scarce(self: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        short = len(tokens) > 2 or bool((tokens == poison).any())
        out = real(self, tokens, *rest, **options) if late or not short else None
        if short:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return out

    rng = random.Random(3)
    requests = [some_request(rng, mode=rng.choice(["diffusion", "verified", "ar"])) for _ in range(12)]
    requests = [Request([t % 50 + 3 for t in r.prompt], r.params) for r in requests]
    requests.insert(5, asking([3, 4, poison, 5], "ar" if verb == "extend" else "diffusion", seed=1))
    llm = LLM(model, rows=6, length=LENGTH)
    if verb == "denoise":  # the tokens of the block identify the request
        requests[5] = asking([3, 4, 5], "diffusion", mask_token_id=poison, seed=1)
    expected = [alone(model, request).tokens for request in requests]
    with patch.object(TwoTowerForCausalLM, verb, scarce):
        outputs = llm.generate(requests)
    for place, output in enumerate(outputs):
        poisoned = verb == "extend" and poison in [*requests[place].prompt, *expected[place]]
        if place == 5 or poisoned:
            assert output.finish_reason == "error"
            assert "out of memory" in output.error
        elif verb == "denoise" or not poisoned:
            assert output.tokens == expected[place], place
    assert len(llm.core.scheduler.free) == 6
    assert llm.generate([requests[0]])[0].tokens == expected[0]  # the engine still works


# --- for hours --------------------------------------------------------------------------------------------------------


def soak(count: int) -> None:
    """Requests of every kind, a third of them aborted at any time: memory is constant and all slots are freed."""
    model = build_random_model("M*E", dtype=torch.float32)
    rng, llm = random.Random(5), LLM(model, rows=8, length=LENGTH)
    levels = []
    for part in range(5):
        requests = [some_request(rng) for _ in range(count // 5)]
        drive(llm, requests, rng, aborted=0.3)
        llm.core.state.commit_state()
        gc.collect()
        levels.append((llm.core.state.nbytes, psutil.Process().memory_info().rss))
        assert len(llm.core.scheduler.free) == 8
        for left in (
            llm.core.scheduler.running,
            llm.core.scheduler.waiting,
            llm.core.rounds.opening,
            llm._unseen,
            llm.core.state.kv_slots.allocated,
        ):
            assert not left, part
    assert len({held for held, _ in levels}) == 1
    grown = (levels[-1][1] - levels[1][1]) / 2**20
    print(f"{count} requests: {grown:+.1f} MiB after the first two fifths")
    assert grown < 20


def test_a_short_soak() -> None:
    soak(250)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_with_random_aborts() -> None:
    soak(10_000)


# --- sizes of blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["diffusion", "verified", "auto"])
def test_a_block_is_at_most_the_window(model: TwoTowerForCausalLM, mode: str) -> None:
    """A block_size of 100,000 took 18 GB, and the machine down."""
    window = model.config.max_position_embeddings
    message = f"block_size is 100000; give at most {window}, the context window"
    llm = LLM(model, rows=1, length=64, block_size=100_000)
    assert llm.core.blocks.size == window
    with pytest.raises(ArgumentError, match=message) as caught:
        llm.add_request(asking([5, 6], mode, block_size=100_000))
    assert caught.value.param == "block_size"
    with pytest.raises(ArgumentError, match=message):
        generate(model, [[5, 6]], GenerationParams.of(mode=mode, max_new_tokens=4, block_size=100_000))


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """The device has `free` bytes, and every need is compared with them."""
    monkeypatch.setattr(budget, "ALWAYS_FREE", 0)
    monkeypatch.setattr(budget, "available_memory", lambda: free)


def test_a_block_that_does_not_fit_the_free_memory_is_refused(
    model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the size that fits. Fewer rows run at once if one block of each does not fit."""
    llm = LLM(model, rows=8, length=64, block_size=24)
    free_bytes(monkeypatch, budget.block_bytes(model, 24) + 1)
    llm.check(asking([5, 6], "diffusion", block_size=24))
    for wrong in (
        lambda: llm.check(asking([5, 6], "diffusion", block_size=25)),
        lambda: LLM(model, rows=1, length=64, block_size=25),
    ):
        with pytest.raises(ArgumentError, match=r"block_size 25 takes about .* free; give at most 24") as caught:
            wrong()
        assert caught.value.param == "block_size"
    llm.check(asking([5, 6], "ar", block_size=25))  # AR has no blocks
    free_bytes(monkeypatch, 3 * (budget.block_bytes(model, 2000) + budget.memory_for(model, 1, 2008)))
    assert LLM.fitting(model, [asking([5, 6], "diffusion", block_size=2000)] * 9, 9).rows == 2


# --- sizes of states --------------------------------------------------------------------------------------------------


def test_states_that_do_not_fit_the_free_memory_are_refused(
    model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the number of rows that fits. A process that allocated such states was killed when it wrote to them."""
    each = budget.memory_for(model, 1, 1016) + budget.block_bytes(model, 16)
    free_bytes(monkeypatch, 10 * each)
    with pytest.raises(
        ArgumentError, match=r"2000 rows of 1000 tokens, .* are free on cpu; give at most (\d+) rows"
    ) as caught:
        LLM(model, rows=2000, length=1000)
    assert caught.value.param == "rows"
    fit = int(str(caught.value).split("at most ")[1].split()[0])
    assert 8 <= fit <= 10
    assert LLM(model, rows=fit, length=1000).rows == fit
    requests = [asking([5, 6], n=998) for _ in range(40)]
    assert 8 <= LLM.fitting(model, requests, 40).rows <= 12
    assert LLM(model, rows=20, length=1000, memory=8 * each).rows == 20  # short texts at once


def test_one_state_that_does_not_fit_is_refused_with_its_length(
    model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, budget.memory_for(model, 1, 1016) + budget.block_bytes(model, 16))
    with pytest.raises(ArgumentError, match=r"give 1 row and a length of at most (\d+)") as caught:
        LLM(model, rows=3, length=4000)
    assert caught.value.param == "length"
    most = int(str(caught.value).rsplit(maxsplit=1)[1])
    assert 700 < most < 1016
    assert LLM(model, rows=1, length=most).rows == 1


def test_more_memory_than_is_free_is_refused(model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, 10 * 2**30)
    with pytest.raises(
        ArgumentError, match=r"memory is 12\.0 GiB, and 10\.0 GiB are free on cpu; give at most 9\.0"
    ) as caught:
        LLM(model, rows=3, length=64, memory=12 * 2**30)
    assert caught.value.param == "memory"


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_a_text_whose_state_does_not_fit_is_refused(
    model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Before the engine of `generate_*` exists, with the number of tokens that fits."""
    per_row, per_token, *_ = state_bytes(model.spec, model.dtype)
    params = GenerationParams.of(mode=mode, max_new_tokens=2000, block_size=1)
    free_bytes(monkeypatch, budget.block_bytes(model, 1) + per_row + 1001 * per_token)
    with pytest.raises(
        LengthError, match=r"of state, and .* are free on cpu; shorten them to (\d+) together"
    ) as caught:
        generate(model, [[5], [5, 6]], params)
    error = caught.value
    assert (error.param, error.prompt_tokens, error.new_tokens) == ("max_new_tokens", 2, 2000)
    assert 1000 <= error.most < 2000
    free_bytes(monkeypatch, 2 * (budget.block_bytes(model, 1) + per_row + 1001 * per_token))
    monkeypatch.setattr(TwoTowerForCausalLM, "extend", lambda *_, **__: pytest.fail("a pass ran"))
    budget.check_text(model, 2, error.most - 2, 1)
