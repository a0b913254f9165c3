"""An exception in a call reaches the caller unchanged, and later calls give the same results as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from torch import Tensor

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, generate
from twotower.decoding.unmasking import POLICIES, Pass, Verdict, register_policy

PROMPTS = [[5, 6, 7], [8], list(range(4, 40))]
ERRORS = [
    ValueError("its own"),
    KeyboardInterrupt(),
    MemoryError("its own"),
    RuntimeError("can't allocate memory: its own"),
    torch.OutOfMemoryError("its own"),
    StopIteration("its own"),
    GeneratorExit(),
]


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


class Raising:
    """Forwards calls to `real` until the given call, which raises."""

    def __init__(self, error: BaseException, at: int, real: Callable[..., Any] = lambda *args, **given: None) -> None:
        self.error, self.at, self.real, self.calls = error, at, real, 0

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.real(*args, **given)


def asking(mode: str = "diffusion", **given: Any) -> GenerationParams:
    fixed = {"draft_steps": 2} if mode == "verified" else {}
    return GenerationParams.of(mode=mode, max_new_tokens=20, block_size=8, **fixed, **given)


def written(model: TwoTowerForCausalLM, params: GenerationParams) -> list[tuple[list[int], list[int], int]]:
    return [(one.tokens, one.committed_at, one.denoiser_passes) for one in generate(model, PROMPTS, params)]


@contextmanager
def same(error: BaseException) -> Iterator[None]:
    """The block raises exactly this exception object."""
    with pytest.raises(type(error)) as raised:
        yield
    assert raised.value is error
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_of_a_callback(model: TwoTowerForCausalLM, error: BaseException, at: int) -> None:
    """The callback is not called afterwards, also if the exception is an out-of-memory error."""
    before = written(model, asking())
    callback = Raising(error, at)
    with same(error):
        generate(model, PROMPTS, asking(), step_callback=callback)
    assert callback.calls == at
    assert written(model, asking()) == before
    callback = Raising(error, at)
    with same(error):
        model.generate_mask_diffusion(torch.tensor(PROMPTS[:1]), 20, 8, step_callback=callback)
    assert callback.calls == at


@pytest.mark.parametrize("error", [error for error in ERRORS if not isinstance(error, StopIteration)], ids=repr)
def test_of_a_callback_in_a_stream(model: TwoTowerForCausalLM, error: BaseException) -> None:
    """(Python converts StopIteration in a generator to RuntimeError.)"""
    before = written(model, asking())
    stream = model.stream(PROMPTS, max_new_tokens=20, block_size=8, step_callback=Raising(error, 12))
    with same(error):
        list(stream)
    assert list(stream) == []
    assert written(model, asking()) == before


@pytest.mark.parametrize("others", [False, True], ids=["one policy", "two policies"])
@pytest.mark.parametrize("error", [error for error in ERRORS if isinstance(error, Exception)], ids=repr)
def test_of_a_policy(model: TwoTowerForCausalLM, error: Exception, others: bool) -> None:
    """Raised from the second pass on; for out-of-memory errors the pass is first repeated in halves."""
    before = written(model, asking(policy="klass"))

    def rule(seen: Pass, value: Tensor) -> Verdict:
        if int(seen.step.max()) > 0:
            raise error
        return Verdict(seen.confidence > value, seen.confidence)

    register_policy("raising", rule, value_meaning="none", default=2.0)
    try:
        policies: Any = ("klass", "raising", "klass") if others else "raising"
        with same(error):
            generate(model, PROMPTS, asking(policy=policies))
    finally:
        del POLICIES["raising"]
    assert written(model, asking(policy="klass")) == before


def test_memory_of_a_pass_that_failed_is_not_remembered(model: TwoTowerForCausalLM) -> None:
    """One policy has a memory of the pass before, another runs out of memory once.

    The pass is repeated in halves, and the memory counts it once.
    """
    failed = [False]
    policies = {"policy": ("patient", "klass", "klass"), "policy_value": (2.0, 0.01, 0.01)}  # klass is called first

    def rule(seen: Pass, value: Tensor) -> Verdict:
        if not failed[0] and int(seen.step.max()) == 2:
            failed[0] = True
            raise MemoryError
        return Verdict(seen.confidence > value, seen.confidence)

    register_policy("patient", rule, value_meaning="least confidence", default=2.0)
    try:
        interrupted = written(model, asking(**policies))
        assert failed[0]
        assert interrupted == written(model, asking(**policies))
    finally:
        del POLICIES["patient"]


@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified", "mock_ar"])
@pytest.mark.parametrize("verb", ["extend", "denoise"])
@pytest.mark.parametrize("after", [False, True], ids=["before the pass", "after the pass"])
def test_an_interrupt_in_the_middle_of_a_pass(
    model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch, mode: str, verb: str, after: bool
) -> None:
    """The model, and an engine with another running request, can be used afterwards."""
    if (mode, verb) == ("ar", "denoise"):
        pytest.skip("AR has no denoiser")
    before = written(model, asking(mode))
    error, real = KeyboardInterrupt(), getattr(model, verb)

    def interrupted() -> Callable[..., Any]:
        return _late(error, real) if after else Raising(error, 4, real)

    with monkeypatch.context() as patched:
        patched.setattr(model, verb, interrupted())
        with same(error):
            generate(model, PROMPTS, asking(mode))
    assert written(model, asking(mode)) == before
    llm = LLM(model, rows=3, length=64)
    with monkeypatch.context() as patched:
        patched.setattr(model, verb, interrupted())
        with same(error):
            llm.generate([Request(prompt, asking(mode)) for prompt in PROMPTS])
    assert not llm.has_work
    again = llm.generate([Request(prompt, asking(mode)) for prompt in PROMPTS])
    assert [(one.tokens, one.committed_at, one.denoiser_passes) for one in again] == before


def _late(error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """The exception is raised after the fourth pass."""
    count = [0]

    def call(*args: Any, **given: Any) -> Any:
        out = real(*args, **given)
        count[0] += 1
        if count[0] == 4:
            raise error
        return out

    return call


def test_a_thousand_prompts(model: TwoTowerForCausalLM) -> None:
    prompts = [[4 + (7 * i + j) % 60 for j in range(1 + i % 7)] for i in range(1000)]
    params = GenerationParams.of(max_new_tokens=6, block_size=4, eos_token_id=(9, 10, 11, 12), temperature=1.0)
    results = generate(model, prompts, replace(params, seed=tuple(range(1000))))
    assert {"eos", "length"} == {result.finish_reason for result in results}
    for place in range(0, 1000, 83):
        (expected,) = generate(model, [prompts[place]], replace(params, seed=place))
        found = results[place]
        assert (found.tokens, found.committed_at) == (expected.tokens, expected.committed_at)
