"""Triton kernels against their torch references, over all their arguments, on a GPU or in Triton's interpreter.

`triton_mode` (imported by conftest) chooses the interpreter where there is no GPU. Attention, norms and routers:
test_triton_attention, test_triton_norm_route.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import triton_mode
from pairwise import pairwise
from tiny_backbones import slow_but, two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM, options
from twotower.ops import registry
from twotower.ops.reference import argmax, mamba_block
from twotower.ops.reference.mamba_block import MambaStepInputs, MambaWeights
from twotower.ops.registry import Backend
from twotower.ops.self_check import find_mismatch
from twotower.ops.self_check_cases import (
    Sizes,
    argmax_arguments,
    argmax_cases,
    mamba_block_arguments,
    mamba_weights,
    state_update_arguments,
)
from twotower.specs import GateNorm

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import argmax as triton_argmax  # noqa: E402
from twotower.ops.triton import mamba_block as triton_mamba  # noqa: E402
from twotower.ops.triton import state_update as triton_state_update  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
TINY_HYBRID = Sizes(heads=8, groups=2, width=16, state=16, taps=4)
TINY_GROUPS = Sizes(heads=6, groups=2, width=12, state=24, taps=4)
SMALL = Sizes(heads=2, groups=1, width=5, state=3, taps=4)
LARGE = Sizes(heads=2, groups=1, width=41, state=200, taps=2)  # heads in two parts
BOTH = pytest.mark.parametrize("sizes", [TINY_HYBRID, TINY_GROUPS], ids=["tiny-hybrid", "tiny-groups"])
# Operations that use Triton where it is supported; bf16 experts only where torch has no grouped GEMM.
OPS = (
    "attention", "mamba_block", "state_update", "argmax", "rms_norm", "norm_and_rotate", "activate", "route",
    "experts_int8", "linear_int8",
)  # fmt: skip
# Tiny backbones and operations that they use: windows, caps, norms with an offset; norms of heads; softmax routers;
# the state of gated DeltaNet layers; Mamba-2 without a norm and with a norm before the gate, beside attention.
BACKBONES = {
    "gemma2": {"attention", "rms_norm", "norm_and_rotate", "activate"},
    "qwen3": {"attention", "rms_norm", "norm_and_rotate", "activate"},
    "mixtral": {"attention", "rms_norm", "norm_and_rotate", "route"},
    "glm4": {"attention", "rms_norm", "norm_and_rotate", "activate"},
    "qwen3_next": {"attention", "rms_norm", "norm_and_rotate", "route", "state_update"},
    "falcon_h1": {"attention", "mamba_block", "state_update"},
    "falcon_h1:norm_first": {"attention", "mamba_block", "state_update"},
}
NORMS = pytest.mark.parametrize("norm", get_args(GateNorm))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype and shape, and equal values up to rounding."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    share = {torch.float32: 5e-6, torch.bfloat16: 8e-3}[expected.dtype]
    scale = expected.float().abs().max().clamp(min=1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(actual.float() / scale, expected.float() / scale, rtol=0, atol=share)


# --- mamba_block -----------------------------------------------------------------------------------------------------


def check_block(*arguments: Any) -> None:
    """The output and the step inputs equal the reference's."""
    expected, kept = mamba_block.mamba_block(*arguments, True)
    mixed, inputs = triton_mamba.mamba_block(*arguments, True)
    close(mixed, expected)
    assert kept is not None
    assert inputs is not None
    for actual, wanted in zip(inputs, kept, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(
    ("sizes", "dtype", "length"),
    [
        *((SMALL, dtype, length) for length in (1, 2, 16, 17, 33) for dtype in (torch.float32, torch.bfloat16)),
        *((TINY_GROUPS, torch.float32, length) for length in (1, 17)),
        *((TINY_HYBRID, torch.bfloat16, length) for length in (1, 16)),
    ],
)
def test_block(sizes: Sizes, dtype: torch.dtype, length: int) -> None:
    """Three rows: full length, half of it, empty."""
    check_block(*mamba_block_arguments(sizes, length, DEVICE, dtype))


@pytest.mark.parametrize(
    ("shape", "norm", "dtype"),
    pairwise(
        [(SMALL, 1), (SMALL, 17), (TINY_GROUPS, 5), (LARGE, 1), (LARGE, 3)],
        get_args(GateNorm),
        [torch.float32, torch.bfloat16],
    ),
)
def test_block_with_any_norm(shape: tuple[Sizes, int], norm: GateNorm, dtype: torch.dtype) -> None:
    """Ragged rows, whose padding has no effect; a row alone; with and without the step inputs."""
    sizes, length = shape
    projected, token_mask, window, state, weights = mamba_block_arguments(sizes, length, DEVICE, dtype)
    weights = with_norm(weights, norm)
    check_block(projected, token_mask, window, state, weights)
    dirty = projected.masked_fill(~token_mask[..., None], torch.nan)
    mixed, kept = triton_mamba.mamba_block(dirty, token_mask, window, state, weights, False)
    assert kept is None
    together, _ = triton_mamba.mamba_block(projected, token_mask, window, state, weights, True)
    assert torch.equal(mixed[token_mask], together[token_mask])
    row = slice(longest := int(token_mask.sum(1).argmax()), longest + 1)
    alone, _ = triton_mamba.mamba_block(projected[row], None, window[row], state[row], weights)
    assert torch.equal(alone, together[row])


def with_norm(weights: MambaWeights, norm: GateNorm) -> MambaWeights:
    return weights._replace(norm=norm, norm_weight=None if norm == "none" else weights.norm_weight)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("token_mask", ["none", "ragged", "left"])
@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_block_without_some_arguments(length: int, token_mask: str, window: bool, state: bool) -> None:
    """Also padding on the left, between the window and the tokens."""
    projected, ragged, seen, before, weights = mamba_block_arguments(SMALL, length, DEVICE, torch.float32, rows=2)
    ragged[1, : length // 2] = True
    padding = {"none": None, "ragged": ragged, "left": ragged.flip(1)}[token_mask]
    check_block(projected, padding, seen if window else None, before if state else None, weights)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("taps", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_block_with_any_convolution(length: int, taps: int, bias: bool) -> None:
    sizes = SMALL._replace(taps=taps)
    projected, token_mask, window, state, _ = mamba_block_arguments(sizes, length, DEVICE, torch.float32, rows=2)
    check_block(projected, token_mask, window, state, mamba_weights(sizes, DEVICE, torch.float32, bias=bias))


@pytest.mark.parametrize(
    "sizes",
    [Sizes(1, 1, 5, 3, 4), Sizes(3, 3, 20, 40, 4), Sizes(8, 1, 64, 128, 4), Sizes(2, 1, 128, 256, 4)],
    ids=["one head", "groups of one", "a group of the 30B model", "two heads of Falcon-H1 7B"],
)
def test_block_of_other_sizes(sizes: Sizes) -> None:
    check_block(*mamba_block_arguments(sizes, 6, DEVICE, torch.bfloat16, rows=2))


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.5, 0.6), (0, 1)])
def test_block_clamps_the_time_step(limit: tuple[float, float]) -> None:
    *arguments, weights = mamba_block_arguments(SMALL, 4, DEVICE, torch.float32)
    check_block(*arguments, weights._replace(time_step_limit=limit))


def test_block_of_extreme_time_steps() -> None:
    """softplus near 0, near the identity, and between, each to the last digits."""
    projected, _, window, state, weights = mamba_block_arguments(SMALL, 16, DEVICE, torch.float32)
    weights = weights._replace(time_step_limit=(0.0, math.inf))
    projected[..., -weights.heads :] = torch.linspace(-40, 40, 16, device=DEVICE)[:, None]
    _, expected = mamba_block.mamba_block(projected, None, window, state, weights)
    _, found = triton_mamba.mamba_block(projected, None, window, state, weights)
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found.dt, expected.dt, rtol=2e-6, atol=1e-30)


def test_values_at_padding_have_no_effect() -> None:
    clean = mamba_block_arguments(SMALL, 9, DEVICE, torch.float32)
    dirty = (clean[0].masked_fill(~clean[1][..., None], torch.nan), *clean[1:])
    (expected, before), (found, after) = (triton_mamba.mamba_block(*arguments) for arguments in (clean, dirty))
    assert before is not None
    assert after is not None
    assert torch.equal(found[clean[1]], expected[clean[1]])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_block_reads_slices_in_place() -> None:
    """Rows, windows and states as slices of larger tensors, as in a pool."""
    projected, token_mask, window, state, weights = mamba_block_arguments(SMALL, 9, DEVICE, torch.float32, rows=6)
    check_block(projected[::2, :7], token_mask[::2, :7], window[1::2], state[3:], weights)
    check_block(projected.transpose(1, 2).contiguous().transpose(1, 2), token_mask, window, state, weights)


@pytest.mark.parametrize(
    ("length", "size", "served"),
    [(64, 3, True), (65, 3, False), (17, 129, False), (1, 512, True), (2, 257, False), (1, 513, False)],
)
def test_longer_blocks_go_to_the_reference(
    length: int, size: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = mamba_block_arguments(Sizes(2, 1, 4, size, 4), length, DEVICE, torch.float32)
    expected, _ = mamba_block.mamba_block(*arguments)
    close(triton_mamba.mamba_block(*arguments)[0], expected)
    monkeypatch.setattr(mamba_block, "mamba_block", lambda *_: "the reference")
    assert (triton_mamba.mamba_block(*arguments) == "the reference") == (not served)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_an_empty_block(shape: tuple[int, int]) -> None:
    projected, token_mask, window, state, weights = mamba_block_arguments(TINY_GROUPS, 4, DEVICE, torch.float32, rows=2)
    rows, length = shape
    mixed, _ = triton_mamba.mamba_block(
        projected[:rows, :length], token_mask[:rows, :length], window[:rows], state[:rows], weights
    )
    assert mixed.shape == (rows, length, weights.inner)


# --- state_update ----------------------------------------------------------------------------------------------------


def check_state_update(
    window: Tensor, state: Tensor, inputs: MambaStepInputs, accepted: Tensor, rows: Tensor | None
) -> None:
    """The pools, changed in place, equal the reference's."""
    expected = mamba_block.state_update(window.clone(), state.clone(), inputs, accepted, rows)
    found = triton_state_update.state_update(window, state, inputs, accepted, rows)
    assert found[0] is window
    assert found[1] is state
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted)


@BOTH
@DTYPES
@pytest.mark.parametrize("length", [1, 2, 17])
def test_state_update(sizes: Sizes, dtype: torch.dtype, length: int) -> None:
    check_state_update(*state_update_arguments(sizes, length, DEVICE, dtype))


@pytest.mark.parametrize("taps", [1, 2, 4, 6])
def test_state_update_with_any_number_of_tokens(taps: int) -> None:
    """0, 1, …, L tokens per row, all slots in order; also with a window longer than the new inputs."""
    length = 4
    window, state, inputs, _, _ = state_update_arguments(
        TINY_GROUPS._replace(taps=taps), length, DEVICE, torch.float32, slots=(0, 1, 2, 3, 4)
    )
    for shift in range(2):
        accepted = (torch.arange(5, device=DEVICE) + shift) % (length + 1)
        check_state_update(window.clone(), state.clone(), inputs, accepted, None)


@pytest.mark.parametrize("slots", [(2,), (4, 1), (1, 2, 3, 4, 0)])
def test_state_update_keeps_other_slots(slots: tuple[int, ...]) -> None:
    window, state, inputs, accepted, rows = state_update_arguments(TINY_GROUPS, 3, DEVICE, torch.float32, slots)
    before = window.clone(), state.clone()
    check_state_update(window, state, inputs, accepted, rows)
    others = [slot for slot in range(5) if slot not in slots]
    assert all(torch.equal(now[others], then[others]) for now, then in zip((window, state), before, strict=True))
    idle = rows[accepted == 0]
    assert torch.equal(state[idle], before[1][idle])


@pytest.mark.parametrize("length", [1, 3])
def test_state_update_of_large_heads(length: int) -> None:
    """A head in two parts, one with fewer rows."""
    check_state_update(*state_update_arguments(LARGE, length, DEVICE, torch.float32))


def test_state_update_of_wide_windows() -> None:
    """More channels than one program handles."""
    sizes = Sizes(heads=2, groups=1, width=140, state=20, taps=4)
    check_state_update(*state_update_arguments(sizes, 5, DEVICE, torch.bfloat16))


@pytest.mark.parametrize("given", [True, False])
def test_state_update_of_long_blocks(given: bool) -> None:
    """The reference runs, and the pools still change in place."""
    slots = (3, 0, 4) if given else (0, 1, 2, 3, 4)
    arguments = state_update_arguments(SMALL, 65, DEVICE, torch.float32, slots)
    check_state_update(*arguments[:4], arguments[4] if given else None)


def test_state_update_with_a_blocks_own_inputs() -> None:
    """Block by block through the kernels and through the references: the states stay equal."""
    projected, token_mask, window, state, weights = mamba_block_arguments(SMALL, 12, DEVICE, torch.bfloat16)
    pools = [(window.clone(), state.clone()) for _ in range(2)]
    for part in (projected[:, :5], projected[:, 5:6], projected[:, 6:]):
        outs = []
        for i, (block, state_update) in enumerate(
            (
                (mamba_block.mamba_block, mamba_block.state_update),
                (triton_mamba.mamba_block, triton_state_update.state_update),
            )
        ):
            length = part.shape[1]
            mixed, inputs = block(part, token_mask[:, :length], *pools[i], weights, True)
            assert inputs is not None
            accepted = torch.tensor([length, 0, length // 2], device=DEVICE)
            pools[i] = state_update(*pools[i], inputs, accepted, None)
            outs.append(mixed)
        close(outs[1], outs[0])
    for actual, expected in zip(pools[1], pools[0], strict=True):
        close(actual, expected)


# --- argmax ----------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("size", [1, 7, 64, 4096, 9001])
def test_argmax(dtype: torch.dtype, size: int) -> None:
    """Many equal logits; the rows exclude no token, the best token and the last token."""
    logits, excluded = argmax_arguments(size, DEVICE, dtype)
    if size == 1:
        excluded[:] = -1
    expected, found = argmax.argmax(logits, excluded), triton_argmax.argmax(logits, excluded)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("find", [argmax.argmax, triton_argmax.argmax])
def test_argmax_by_its_definition(find: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argmax, "TILE_BYTES", 4 * 50 * 2)  # tiles of two positions
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 3, 50, generator=generator) * 3).to(DEVICE)
    logits[0, 1, 10:] = -torch.inf
    logits[2, 2] = 1.0  # all are equal
    excluded = torch.tensor([3, -1, 0], device=DEVICE)
    tokens, confidence = find(logits, excluded)
    rest = logits.clone()
    rest[0, :, 3] = rest[2, :, 0] = -torch.inf
    assert torch.equal(tokens, rest.argmax(-1))
    assert tokens[2, 2] == 1
    torch.testing.assert_close(confidence, rest.softmax(-1).amax(-1))
    assert confidence.dtype == torch.float32


@pytest.mark.parametrize("find", [argmax.argmax, triton_argmax.argmax])
def test_argmax_of_slices_and_of_nothing(find: Callable[..., tuple[Tensor, Tensor]]) -> None:
    logits, excluded = argmax_arguments(40, DEVICE, torch.float32)
    whole = find(logits, excluded)
    for part in (logits[:, 1:], logits.transpose(0, 2).contiguous().transpose(0, 2)[:, 1:]):
        assert all(torch.equal(a, b[:, 1:]) for a, b in zip(find(part, excluded), whole, strict=True))
    assert [tuple(t.shape) for t in find(logits[:, :0], excluded)] == [(3, 0), (3, 0)]


# --- the registry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def triton_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Triton enabled with empty selection caches; clears the caches afterwards."""
    for op, backends in registry.REGISTRY.items():
        monkeypatch.setitem(registry.REGISTRY, op, tuple(b for b in backends if b.name != "native"))
    _forget()
    with options.override(triton=True):
        yield monkeypatch
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    registry._select.cache_clear()
    registry._unsupported_reason.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_kernels_that_pass_the_self_check_are_used(dtype: torch.dtype, triton_on: pytest.MonkeyPatch) -> None:
    """The self-check passes with the cases that run on every machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = {op: (backend, why) for op, backend, why in registry.report(DEVICE, dtype)}
    for op in OPS:
        assert registry.select(op, DEVICE, dtype).name == rows[op][0] == "triton"
        assert "passed its self-check" in rows[op][1]


def _garbage(projected: Tensor, token_mask: Any, window: Any, state: Any, weights: MambaWeights, inputs: bool) -> Any:
    mixed, kept = mamba_block.mamba_block(projected, token_mask, window, state, weights, inputs)
    return mixed * 1.05, kept


def _no_number(*arguments: Any) -> Any:
    mixed, kept = mamba_block.mamba_block(*arguments)
    return mixed * torch.nan, kept


def _raises(*_: Any) -> Any:
    raise RuntimeError("ptxas died")


def _narrow(*arguments: Any) -> Any:
    mixed, kept = mamba_block.mamba_block(*arguments)
    return mixed[..., 1:], kept


def _forgets(*arguments: Any) -> Any:
    return mamba_block.mamba_block(*arguments)[0], None


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_garbage, r"differs from its reference on 6 heads of 12, 1 tokens: result 0 by 5\.\de-02, tolerance 0\.0001"),
        (_no_number, "result 0 by nan"),
        (_raises, "raised RuntimeError on 6 heads of 12, 1 tokens: ptxas died"),
        (_narrow, "the shape"),
        (_forgets, "gave less than its reference on 6 heads of 12, 1 tokens"),
    ],
)
def test_a_broken_kernel_is_not_used_and_warns(
    broken: Callable[..., Any],
    said: str,
    triton_on: pytest.MonkeyPatch,
    random_model: Callable[..., TwoTowerForCausalLM],
) -> None:
    """The reference is used instead; the model's results do not change, and `report` says why."""
    model = random_model("M*", seed=3).to(DEVICE)
    tokens = torch.arange(12, device=DEVICE).view(2, 6)
    with options.override(triton=False):
        expected = model.extend(tokens, model.new_state(2, 8))
    for op in set(OPS) - {"mamba_block"}:
        triton_on.setitem(registry.REGISTRY, op, registry.REGISTRY[op][-1:])
    right, reference = registry.REGISTRY["mamba_block"]
    wrong = Backend("triton", broken, right.description, right.unsupported_reason, compiled=True)
    triton_on.setitem(registry.REGISTRY, "mamba_block", (wrong, reference))
    with pytest.warns(RuntimeWarning, match=said):
        assert registry.select("mamba_block", DEVICE, torch.float32) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warns only once
        assert registry.select("mamba_block", DEVICE, torch.float32) is reference
        (row,) = (row for row in registry.report(DEVICE, torch.float32) if row[0] == "mamba_block")
    assert row[1] == "torch"
    assert "triton is not used: it " in row[2]
    assert torch.equal(model.extend(tokens, model.new_state(2, 8)), expected)


def test_a_wrong_token_is_found() -> None:
    """One wrong token of many, with correct confidences."""

    def broken(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        tokens, confidence = argmax.argmax(logits, excluded)
        tokens[0, 0] += 1
        return tokens, confidence

    said = find_mismatch(broken, argmax.argmax, argmax_cases(DEVICE, torch.float32))
    assert said == "differs from its reference on a vocabulary of 13: result 0 in 1 of 6 numbers"


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "interpret", "why"),
    [
        (DEVICE, torch.float32, False, True, "turned off by TWOTOWER_TRITON=0"),
        (DEVICE, torch.float64, True, True, "supports fp32 and bf16 only"),
        (torch.device("cpu"), torch.float32, True, False, "needs CUDA"),
        (torch.device("meta"), torch.float32, True, True, "needs CUDA"),
    ],
)
def test_unsupported_reasons(
    device: torch.device, dtype: torch.dtype, triton: bool, interpret: bool, why: str, triton_on: pytest.MonkeyPatch
) -> None:
    with options.override(triton=triton, triton_interpret=interpret):
        found = {op: (backend, said) for op, backend, said in registry.report(device, dtype)}
    for op in OPS:
        assert found[op][0] != "triton"
        assert why in found[op][1]


def test_without_the_package(triton_on: pytest.MonkeyPatch) -> None:
    triton_on.setattr(importlib.util, "find_spec", lambda name: None)
    assert registry.select("state_update", DEVICE, torch.float32).name == "torch"
    assert (
        "needs the package triton" in {op: why for op, _, why in registry.report(DEVICE, torch.float32)}["state_update"]
    )


def test_gradients_go_through_the_reference(triton_on: pytest.MonkeyPatch) -> None:
    triton_on.setattr(registry.self_check, "find_mismatch", lambda *_: None)
    with torch.enable_grad():
        assert registry.select("mamba_block", DEVICE, torch.float32).name == "torch"
    assert registry.select("mamba_block", DEVICE, torch.float32).name == "triton"
    assert registry.select("mamba_block", DEVICE, torch.float32, differentiable=True).name == "torch"


@pytest.mark.parametrize("length", [1, 6])
def test_a_model_through_the_kernels(
    length: int, triton_on: pytest.MonkeyPatch, random_model: Callable[..., TwoTowerForCausalLM]
) -> None:
    """Prefill, a denoised block, an extend, a rollback, one token: both towers' logits, and the state."""
    triton_on.setattr(registry.self_check, "find_mismatch", lambda *_: None)

    def outputs() -> list[Tensor]:
        model = random_model("M*", seed=5, mamba_num_heads=2, n_groups=1).to(DEVICE)
        state = model.new_state(3, 40)
        tokens = torch.arange(3 * 9, device=DEVICE).view(3, 9)
        rows = torch.tensor([2, 0], device=DEVICE)
        model.extend(tokens[:2, :length], state, torch.tensor([length, 0], device=DEVICE), rows)
        drafted = model.denoise(tokens[:, :length], torch.full((3,), 0.5, device=DEVICE), state.view())
        scored = model.extend(tokens[:, :length], state)
        state.rollback(state.lengths - torch.tensor([0, 1, length], device=DEVICE))
        after = model.extend(tokens[:, :1], state)
        state.commit_state()
        pools = [t for pool in state.pools if hasattr(pool, "ssm_state") for t in (pool.conv_window, pool.ssm_state)]
        return [drafted, scored, after, *pools]

    with options.override(triton=False):
        assert registry.select("state_update", DEVICE, torch.float32).name == "torch"
        reference = outputs()
    assert registry.select("state_update", DEVICE, torch.float32).name == "triton"
    for found, expected in zip(outputs(), reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", slow_but(("falcon_h1:norm_first", "mixtral", "gemma2"), BACKBONES))
def test_other_backbones_through_the_kernels(name: str, triton_on: pytest.MonkeyPatch) -> None:
    """Prefill beyond the window, a denoised block, an extend, a rollback, one token."""
    triton_on.setattr(registry.self_check, "find_mismatch", lambda *_: None)
    model = two_tower(name).to(DEVICE)

    def outputs() -> list[Tensor]:
        state = model.new_state(2, 60)
        tokens = (torch.arange(2 * 40, device=DEVICE) * 7 % 150).view(2, 40)
        model.prefill(tokens[:, :30], torch.tensor([30, 11], device=DEVICE), state)
        drafted = model.denoise(tokens[:, :4], torch.full((2,), 0.5, device=DEVICE), model.reader(state).view())
        scored = model.extend(tokens[:, 30:34], state)
        state.rollback(state.lengths - torch.tensor([1, 3], device=DEVICE))
        after = model.extend(tokens[:, :1], state)
        assert scored is not None
        assert after is not None
        return [drafted, scored, after]

    with options.override(triton=False):
        reference = outputs()
    used = Counter[str]()
    for op, (first, *others) in list(registry.REGISTRY.items()):
        if first.name == "triton":
            triton_on.setitem(registry.REGISTRY, op, (_counted(first, op, used), *others))
    _forget()
    found = outputs()
    assert used.keys() >= BACKBONES[name]
    for actual, expected in zip(found, reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


def test_kernels_read_slots_of_windows(triton_on: pytest.MonkeyPatch) -> None:
    """Ragged passes whose tokens move in the slots, a rollback across the seam, and a block wider than the window."""
    triton_on.setattr(registry.self_check, "find_mismatch", lambda *_: None)
    model = two_tower("gemma2").to(DEVICE)
    tokens = (torch.arange(2 * 60, device=DEVICE) * 7 % 150).view(2, 60)

    def outputs(longest_pass: int) -> list[Tensor]:
        state, found = model.new_state(2, 60, None, longest_pass), []
        for start, dropped in ((0, 0), (17, 3), (34, 17)):
            counts = torch.tensor([17, 17 - start // 4], device=DEVICE)
            logits = model.extend(tokens[:, start : start + 17], state, counts)
            assert logits is not None
            found += [row[:count] for row, count in zip(logits, counts.tolist(), strict=True)]
            state.rollback(state.lengths - counts.clamp(max=dropped))
        found.append(model.denoise(tokens[:, :27], None, model.reader(state).view()))
        moved = [group.slots.window.first.any() for group in state.kv_groups if group.slots.window is not None]
        assert moved == [longest_pass == 17]
        return found

    with options.override(triton=False):
        reference = outputs(600)
    used = Counter[str]()
    first, *others = registry.REGISTRY["attention"]
    triton_on.setitem(registry.REGISTRY, "attention", (_counted(first, "attention", used), *others))
    _forget()
    for actual, expected in zip(outputs(17), reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)
    assert used["attention"] == 4 * len(model.spec.pattern.replace("-", ""))


def _counted(backend: Backend, op: str, used: Counter[str]) -> Backend:
    def counted(*arguments: Any) -> Any:
        used[op] += 1
        return backend.function(*arguments)

    return replace(backend, function=counted)
