"""Several threads generate on one model at once: each result equals the result alone.

In float64. Calls and streams of every mode are interleaved and abandoned. They share the model's workspace.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import KINDS

from twotower import GenerationParams, TwoTowerForCausalLM, generate

THREADS = 4
ROUNDS = [5, pytest.param(16, marks=pytest.mark.slow)]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request: pytest.FixtureRequest) -> TwoTowerForCausalLM:
    """In float64 the layers run one by one. In float32 a fused runner may run, with tables that threads share."""
    return build_random_model(EVERY_KIND, dtype=request.param)


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """The interpreter switches threads after almost every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def some_batch(rng: random.Random) -> tuple[list[list[int]], dict[str, Any]]:
    """Few shapes, so that threads meet in the workspace."""
    mode = rng.choice([*sorted(KINDS), "verified adaptive"])
    rows = [[rng.randrange(4, 64) for _ in range(rng.choice([1, 3, 30]))] for _ in range(rng.choice([1, 2]))]
    asked: dict[str, Any] = {"mode": mode.split()[0], "max_new_tokens": 34 - max(map(len, rows))}
    asked |= {"temperature": rng.choice([0.0, 1.0]), "seed": rng.randrange(100)}
    asked["block_size"] = rng.choice([4, 29, 31])  # more noise levels than the cache of the time conditioning holds
    if mode == "verified":
        asked["draft_steps"] = 1
    return rows, asked


def alone(model: TwoTowerForCausalLM, rows: list[list[int]], asked: dict[str, Any]) -> list[list[int]]:
    return [found.tokens for found in generate(model, rows, GenerationParams.of(**asked))]


def in_threads(work: Any) -> None:
    """Runs work(number) in each thread, all starting together; the first exception is raised."""
    together = threading.Barrier(THREADS)

    def begin(number: int) -> None:
        together.wait()
        work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(begin, number) for number in range(THREADS)]:
            done.result()


def batches(
    model: TwoTowerForCausalLM, rounds: int
) -> list[list[tuple[list[list[int]], dict[str, Any], list[list[int]]]]]:
    """Prompts, parameters and expected texts of each thread."""
    rng = random.Random(3)
    out = []
    for _ in range(THREADS):
        own = [some_batch(rng) for _ in range(rounds)]
        out.append([(rows, asked, alone(model, rows, asked)) for rows, asked in own])
    return out


@pytest.mark.parametrize("rounds", ROUNDS)
def test_calls_of_several_threads(model: TwoTowerForCausalLM, rounds: int) -> None:
    works = batches(model, rounds)

    def work(number: int) -> None:
        for rows, asked, wanted in works[number]:
            assert alone(model, rows, asked) == wanted

    in_threads(work)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_streams_of_several_threads_interleaved_and_abandoned(model: TwoTowerForCausalLM, rounds: int) -> None:
    """Each thread reads several streams in any order and abandons every third; another thread calls `release`."""
    works = batches(model, rounds)

    def work(number: int) -> None:
        rng = random.Random(number)
        open_ = [(place, model.stream(rows, **asked)) for place, (rows, asked, _) in enumerate(works[number])]
        written = [[[] for _ in wanted] for _, _, wanted in works[number]]
        ended = 0
        while open_:
            place, stream = rng.choice(open_)
            event = next(stream, None)
            if event is None:
                assert written[place] == works[number][place][2]
                ended += 1
            else:
                written[place][event.row] += event.tokens
            if event is None or (place % 3 == 2 and rng.random() < 0.2):
                stream.close()
                open_ = [entry for entry in open_ if entry[0] != place]
            if number == 0 and rng.random() < 0.1:
                model.release()
        assert ended >= rounds - rounds // 3

    in_threads(work)


def test_a_stream_moves_from_thread_to_thread(model: TwoTowerForCausalLM) -> None:
    rows, asked = [[5, 6, 7]], {"mode": "diffusion", "max_new_tokens": 24, "block_size": 4}
    wanted = alone(model, rows, asked)
    stream, lock = model.stream(rows, **asked), threading.Lock()
    tokens: list[int] = []

    def work(number: int) -> None:
        while True:
            with lock:
                event = next(stream, None)
                if event is None:
                    return
                tokens.extend(event.tokens)
            assert alone(model, rows, asked) == wanted

    in_threads(work)
    assert [tokens] == wanted


def test_what_the_time_conditioning_remembers(model: TwoTowerForCausalLM) -> None:
    """More noise levels than its cache holds, so that a thread evicts entries that another is about to read."""
    levels = torch.arange(1, 98, dtype=model.dtype) / 97
    with torch.no_grad():
        wanted = [model.time(levels[place : place + 1])[0].scale for place in range(len(levels))]

    @torch.no_grad()
    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(800):
            place = rng.randrange(len(levels))
            assert torch.equal(model.time(levels[place : place + 1])[0].scale, wanted[place])

    sys.setswitchinterval(1e-6)
    in_threads(work)
