"""The model's workspace: what calls share, what must not leak between calls, and ownership.

In float64, so that equal computations give equal texts.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import KINDS

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, generate
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import MambaPool
from twotower.engine import workspace
from twotower.engine.mode_choice import resolve
from twotower.engine.workspace import MAX_CONTROLLERS, StateShape, Workspace
from twotower.errors import ArgumentError, TwoTowerError

LONG, SHORT = [5 + i % 50 for i in range(90)], [7, 8]


@pytest.fixture
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


def texts(model: TwoTowerForCausalLM, prompts: list[list[int]], mode: str, n: int = 12, **asked: Any) -> list[Any]:
    """Tokens and confidences of each row; draft depth 1, so that nothing depends on measured times."""
    asked = {"draft_steps": 1, "block_size": 8} | asked if mode in ("diffusion", "verified") else asked
    found = generate(model, prompts, GenerationParams.of(mode=mode, max_new_tokens=n, **asked))
    return [(one.tokens, one.confidence) for one in found]


def idle(model: TwoTowerForCausalLM) -> TowerState | None:
    states = model.workspace._idle
    assert len(states) <= 1
    return states[0] if states else None


# --- the idle state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", sorted(KINDS))
def test_a_reused_state_leaks_no_text(model: TwoTowerForCausalLM, mode: str) -> None:
    """A long prompt, then a short one in the same state; prompts of one token have no prefill."""
    total = len(LONG) + 12
    wanted = {}
    for name, prompt in (("short", SHORT), ("one", [9]), ("long", LONG)):
        model.release()
        wanted[name] = texts(model, [prompt, prompt[:1]], mode, total - len(prompt))
    texts(model, [LONG, LONG[:50]], mode)
    state = idle(model)
    assert state is not None
    for name, prompt in (("short", SHORT), ("one", [9]), ("long", LONG), ("short", SHORT)):
        assert texts(model, [prompt, prompt[:1]], mode, total - len(prompt)) == wanted[name]
        assert idle(model) is state


def test_a_state_of_another_shape_is_dropped(model: TwoTowerForCausalLM) -> None:
    wanted = texts(model, [LONG], "ar")
    first = idle(model)
    assert first is not None
    texts(model, [SHORT], "ar")
    assert idle(model) is not first  # the new state replaces it: at most one is kept
    assert texts(model, [LONG], "ar") == wanted
    texts(model, [LONG, LONG], "ar")
    state = idle(model)
    assert state is not None
    assert state.rows == 2


def test_a_gpu_keeps_the_states_of_several_shapes(model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs read pools in place; engines of shapes that alternate get the same pools again."""
    monkeypatch.setattr(workspace, "idle_limits", lambda device: (2, 1 << 30))
    texts(model, [SHORT], "ar")
    texts(model, [SHORT, SHORT], "ar")
    first = list(model.workspace._idle)
    assert [state.rows for state in first] == [1, 2]
    for prompts in ([SHORT], [SHORT, SHORT]):
        texts(model, prompts, "ar")
    assert list(map(id, model.workspace._idle)) == list(map(id, first))
    monkeypatch.setattr(workspace, "idle_limits", lambda device: (2, first[0].nbytes))
    texts(model, [SHORT], "ar")
    assert model.workspace._idle == [first[0]]
    model.workspace.free_memory()
    assert not model.workspace._idle


def test_an_idle_state_keeps_nothing_of_its_last_pass(model: TwoTowerForCausalLM) -> None:
    sizes = set()
    for _ in range(2):
        llm = LLM(model, rows=2, length=64)
        sizes.add(llm.stats().state_bytes)
        llm.generate([Request(SHORT, GenerationParams.of(mode="ar", max_new_tokens=5))])
        llm.close()
        state = idle(model)
        assert state is llm.core.state
        assert not state.kv_slots.allocated
        assert all(pool.step_inputs is None for pool in state.pools if isinstance(pool, MambaPool))
    assert len(sizes) == 1


def test_a_large_state_is_not_kept(model: TwoTowerForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MAX_IDLE_STATE_BYTES", 1000)
    texts(model, [LONG], "ar")
    assert idle(model) is None


def test_release_frees_the_state_of_calls_that_still_run(model: TwoTowerForCausalLM) -> None:
    texts(model, [SHORT], "ar")
    model.release()
    assert idle(model) is None
    events = model.stream([SHORT], "ar", max_new_tokens=9)
    next(events)
    model.release()
    events.close()
    assert idle(model) is None  # it was borrowed before


@pytest.mark.parametrize("narrow", [lambda model: model.to(torch.float32), lambda model: model.context.float()])
def test_a_state_lent_before_the_model_was_converted_is_not_used(
    model: TwoTowerForCausalLM, narrow: Callable[[TwoTowerForCausalLM], object]
) -> None:
    """Also if only a tower is converted, without a call to the model."""
    events = model.stream([SHORT], "ar", max_new_tokens=9)
    next(events)
    narrow(model)
    events.close()
    llm = LLM(model, rows=1, length=len(SHORT) + 9, block_size=16)
    assert llm.core.state.dtype == torch.float32


def test_inference_mode_leaves_nothing_that_cannot_be_written_to(model: TwoTowerForCausalLM) -> None:
    for mode in sorted(KINDS):
        wanted = texts(model, [LONG, SHORT], mode)
        with torch.inference_mode():
            assert texts(model, [LONG, SHORT], mode) == wanted  # in a state that the caller made
            assert texts(model, [LONG, SHORT], mode) == wanted
        assert texts(model, [LONG, SHORT], mode) == wanted


def test_what_was_abandoned_is_used_again(model: TwoTowerForCausalLM) -> None:
    wanted = texts(model, [SHORT, LONG], "diffusion")
    state = idle(model)
    for end in ("close", "del", "throw"):
        events = model.stream([SHORT, LONG], max_new_tokens=12, block_size=8)
        next(events)
        assert idle(model) is None
        if end == "close":
            events.close()
        elif end == "throw":
            with pytest.raises(KeyError, match="caller"):
                events.throw(KeyError("caller"))  # an exception may occur at any point, so the state is not reused
        del events
        gc.collect()
        assert (idle(model) is state) == (end != "throw")
        assert texts(model, [SHORT, LONG], "diffusion") == wanted
    never = model.stream([SHORT, LONG], max_new_tokens=12, block_size=8)
    state = idle(model)
    never.close()
    assert idle(model) is state is not None


def test_streams_that_take_turns_have_a_state_each(model: TwoTowerForCausalLM) -> None:
    params = {"max_new_tokens": 12, "block_size": 4}
    prompts = [LONG, SHORT, [9], LONG]
    wanted = [generate(model, [prompt], GenerationParams.of(**params))[0].tokens for prompt in prompts]
    streams = [model.stream([prompt], **params) for prompt in prompts]
    written: list[list[int]] = [[] for _ in streams]
    for _ in range(3):
        for place, stream in enumerate(streams):
            written[place] += next(stream).tokens
    assert written == wanted


# --- closing an engine ------------------------------------------------------------------------------------------------


def test_an_engine_is_closed_once(model: TwoTowerForCausalLM) -> None:
    """A second close does not return its state again."""
    request = Request(SHORT, GenerationParams.of(mode="ar", max_new_tokens=5))
    llm = LLM(model, rows=1, length=32)
    llm.add_request(request)
    llm.step()
    llm.close()
    assert not llm.has_work
    assert llm.step() == []
    first = LLM(model, rows=1, length=32)
    llm.close()
    second = LLM(model, rows=1, length=32)
    assert first.core.state is llm.core.state
    assert first.core.state is not second.core.state
    with pytest.raises(TwoTowerError, match="this engine is closed; make another"):
        llm.add_request(request)


def test_a_refused_list_leaves_nothing_in_the_engine(model: TwoTowerForCausalLM) -> None:
    llm = LLM(model, rows=2, length=32)
    asked = [Request(SHORT, GenerationParams.of(mode="ar", max_new_tokens=n)) for n in (3, 300)]
    with pytest.raises(ArgumentError, match="300"):
        llm.generate(asked)
    assert not llm.has_work


# --- bounds and copies ------------------------------------------------------------------------------------------------


def test_controllers_are_bounded() -> None:
    own = Workspace()
    params = [GenerationParams.of(mode="verified", block_size=size) for size in range(2, MAX_CONTROLLERS + 40)]
    kept = [own.draft_controller(each, 1, 10) for each in params]
    assert len(own._controllers) == MAX_CONTROLLERS
    assert own.draft_controller(params[-1], 1, 10) is kept[-1]
    assert own.draft_controller(params[0], 1, 10) is not kept[0]  # least recently used
    fixed = GenerationParams.of(mode="verified", draft_steps=2)
    assert own.draft_controller(fixed, 1, 10) is not own.draft_controller(fixed, 1, 10)
    own.release()
    assert not own._controllers


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_a_workspace_of_their_own(
    model: TwoTowerForCausalLM, copied: Callable[[TwoTowerForCausalLM], TwoTowerForCausalLM]
) -> None:
    keys = set(model.state_dict())
    wanted = texts(model, [LONG], "verified", draft_steps=None)
    generate(model, [SHORT], GenerationParams.of(mode="auto", max_new_tokens=4))
    assert idle(model) is not None
    assert model.workspace._controllers
    assert set(model.state_dict()) == keys
    assert pickle.dumps(model.workspace) == pickle.dumps(Workspace())
    other = copied(model)
    assert other.workspace is not model.workspace
    assert idle(other) is None
    assert not other.workspace._controllers
    assert not other.workspace.mode_chooser.costs
    assert texts(other, [LONG], "verified", draft_steps=None)[0][0] == wanted[0][0]


def test_a_state_is_known_by_its_shape(model: TwoTowerForCausalLM) -> None:
    state = model.new_state(3, 0, 50)
    assert StateShape.of(state) == StateShape(3, 50, torch.float64, torch.device("cpu"))


# --- mode "auto" ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "measured"), [(1, 1), (2, 2), (5, 8)])
def test_auto_measures_for_the_size_of_the_batch(model: TwoTowerForCausalLM, rows: int, measured: int) -> None:
    params = GenerationParams.of(mode="auto", max_new_tokens=4, block_size=4)
    generate(model, [SHORT] * rows, params)
    assert list(model.workspace.mode_chooser.costs) == [(measured, 4)]
    list(model.stream([SHORT] * rows, "auto", max_new_tokens=4, block_size=4))
    assert list(model.workspace.mode_chooser.costs) == [(measured, 4)]
    assert resolve(model, params, rows)[1]
