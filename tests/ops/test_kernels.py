"""Each fast kernel against its reference, over all its arguments, in float64: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.families.nemotron_h import spec_of
from twotower.model.layer_io import context_visible
from twotower.model.moe import Router
from twotower.model.packed_layout import TILE, Layout
from twotower.nemotron_h_fields import NemotronHFields
from twotower.ops.reference.attention import QueryTile, block_attention, tiled_attention
from twotower.ops.reference.conv import causal_conv, causal_conv_sequential
from twotower.ops.reference.experts import experts_dense, experts_gathered, experts_grouped, experts_sorted
from twotower.ops.reference.ssd import final_state, pass_states, ssd_block, ssd_chunked, ssd_sequential
from twotower.ops.registry import REGISTRY, report, select
from twotower.ops.self_check_cases import ODD_SIZES, mamba_block_arguments
from twotower.specs import Activation

pytestmark = pytest.mark.code_path
F64 = torch.float64


def same(fast: Callable[..., Any], slow: Callable[..., Any], tensors: dict[str, Tensor | None]) -> None:
    """Compares results, and gradients of every floating-point argument for a random cotangent."""
    gradients = []
    outs = []
    for function in (fast, slow):
        leaves = {
            name: t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
            for name, t in tensors.items()
        }
        out = function(**leaves)
        out = out if isinstance(out, tuple) else (out,)
        outs.append(out)
        torch.manual_seed(7)  # the same cotangents for both
        sum((o * torch.randn(o.shape, dtype=F64)).sum() for o in out).backward()
        gradients.append({n: t.grad for n, t in leaves.items() if t is not None and t.requires_grad})
    assert len(outs[0]) == len(outs[1])
    for actual, expected in zip(*outs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    for name, expected in gradients[1].items():
        if expected is not None:
            torch.testing.assert_close(
                gradients[0][name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )


# --- the output norm of Mamba -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [backend.name for backend in REGISTRY["mamba_block"]])
def test_the_gate_before_and_after_the_norm(backend: str) -> None:
    kernel = next(b for b in REGISTRY["mamba_block"] if b.name == backend)
    cpu = torch.device("cpu")
    if (reason := kernel.unsupported_reason(cpu, torch.float32)) is not None:
        pytest.skip(f"{backend} {reason}")
    *arguments, weights = mamba_block_arguments(ODD_SIZES, 9, cpu, torch.float32)
    gate = F.silu(arguments[0][..., : weights.inner])

    def group_norm(x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (weights.n_groups, -1))
        return (grouped / (grouped.square().mean(-1, keepdim=True) + weights.eps).sqrt()).flatten(2)

    gated, _ = kernel.function(*arguments, weights._replace(norm="none", norm_weight=None), True)
    expected = {
        "after_gate": group_norm(gated) * weights.norm_weight,
        "before_gate": group_norm(gated / gate) * weights.norm_weight * gate,
    }
    for norm, out in expected.items():
        found, _ = kernel.function(*arguments, weights._replace(norm=norm), True)
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-4)


# --- SSD ----------------------------------------------------------------------------------------------------------


def scan_arguments(length: int, groups: int, state: bool, padded: bool, seed: int = 0) -> dict[str, Tensor | None]:
    """Three rows, four heads, with padding (dt = 0) on the left, in the middle and on the right."""
    torch.manual_seed(seed)
    rows, heads, width, size = 3, 4, 5, 6
    dt = torch.rand(rows, length, heads, dtype=F64) * 2
    if padded:
        dt[0, : length // 3] = 0
        dt[1, length // 3 : length // 2 + 1] = 0
        dt[2, length // 2 :] = 0
    decay_rate = torch.linspace(0.01, 16, heads, dtype=F64)  # from heads that keep their state to heads that forget it
    return {
        "x": torch.randn(rows, length, heads, width, dtype=F64),
        "dt": dt,
        "log_decay": -dt * decay_rate,
        "B": torch.randn(rows, length, groups, size, dtype=F64),
        "C": torch.randn(rows, length, groups, size, dtype=F64),
        "state": torch.randn(rows, heads, width, size, dtype=F64) if state else None,
    }


SCANS = pytest.mark.parametrize(
    ("length", "groups", "state", "padded"),
    [(1, 1, False, False), (1, 4, True, True), (7, 2, True, True), (16, 4, False, True), (33, 1, True, False)],
)


@SCANS
def test_a_block_is_one_chunk_of_the_recurrence(length: int, groups: int, state: bool, padded: bool) -> None:
    same(ssd_block, lambda **a: ssd_sequential(**a)[0], scan_arguments(length, groups, state, padded))


@SCANS
def test_final_state_equals_the_recurrence(length: int, groups: int, state: bool, padded: bool) -> None:
    arguments = scan_arguments(length, groups, state, padded)
    C = arguments.pop("C")
    same(final_state, lambda **a: ssd_sequential(**a, C=C)[1], arguments)


@pytest.mark.parametrize("chunk", [1, 4, 5, 33, 40])
@pytest.mark.parametrize(("groups", "state", "padded"), [(1, False, True), (2, True, True), (4, True, False)])
def test_chunks_of_any_size_give_the_recurrence(chunk: int, groups: int, state: bool, padded: bool) -> None:
    """Outputs and the state before each chunk, also with a partial last chunk."""

    def slow(**a: Any) -> tuple[Tensor, Tensor]:
        length = a["x"].shape[1]
        first = a["x"].new_zeros(3, 4, 5, 6) if a["state"] is None else a["state"]
        before = [first]
        for end in range(chunk, length, chunk):
            part = {name: v if name == "state" else v[:, :end] for name, v in a.items()}
            before.append(ssd_sequential(**part)[1])
        return ssd_sequential(**a)[0], torch.stack(before, 1)

    same(lambda **a: ssd_chunked(**a, chunk=chunk), slow, scan_arguments(33, groups, state, padded))


@pytest.mark.parametrize(
    ("chunks", "state", "fresh"),
    [
        (1, True, "none"),
        *((n, state, fresh) for n in (2, 64, 65, 130) for state in (False, True) for fresh in ("none", "some", "all")),
        pytest.param(4200, True, "some", marks=pytest.mark.slow),
    ],
)
def test_pass_states(chunks: int, state: bool, fresh: str) -> None:
    """The state before each chunk equals the recurrence since the last fresh chunk; also in nested groups.

    "some": fresh chunks include the first and the last of a group, and several in a row.
    """
    arguments = scan_arguments(2 * chunks, 2, state, padded=False)
    C, first = arguments.pop("C"), arguments.pop("state")
    arguments["dt"] = arguments["dt"] / 8  # slow heads accumulate many chunks
    arguments["log_decay"] = arguments["log_decay"] / 8
    starts = torch.zeros(3, chunks, dtype=torch.bool)
    if fresh == "all":
        starts[:] = True
    elif fresh == "some":
        starts[1] = torch.rand(chunks, generator=torch.Generator().manual_seed(0)) < 0.2
        starts[2, [n for n in (0, 9, 10, 11, 12, 60) if n < chunks]] = True

    def fast(state: Tensor | None, **a: Tensor) -> Tensor:
        added = final_state(**{n: v.unflatten(1, (-1, 2)).flatten(0, 1) for n, v in a.items()}, state=None)
        totals = a["log_decay"].unflatten(1, (-1, 2)).sum(2)
        return pass_states(added.unflatten(0, (3, -1)), totals, state, None if fresh == "none" else starts)

    def slow(state: Tensor | None, **a: Tensor) -> Tensor:
        h = torch.zeros(3, 4, 5, 6, dtype=F64) if state is None else state
        before = []
        for n in range(chunks):
            h = torch.where(starts[:, n, None, None, None], 0.0, h)
            before.append(h)
            h = ssd_sequential(**{name: v[:, 2 * n : 2 * n + 2] for name, v in a.items()}, C=C[:, :2], state=h)[1]
        return torch.stack(before, dim=1)

    same(fast, slow, {**arguments, "state": first})


def test_a_token_with_dt_zero_has_no_effect() -> None:
    """Values at padding, however large, change neither the state nor the outputs of other tokens."""
    clean = scan_arguments(12, 2, True, padded=True)
    dirty = {name: v.clone() for name, v in clean.items()}
    padding = clean["dt"][..., 0] == 0
    assert padding.any()
    for name in ("x", "B", "C"):
        dirty[name][padding] = 1e6
    for kernel in (lambda **a: ssd_block(**a), lambda **a: ssd_chunked(**a, chunk=5)[0]):
        assert torch.equal(kernel(**clean)[~padding], kernel(**dirty)[~padding])
    clean.pop("C"), dirty.pop("C")
    assert torch.equal(final_state(**clean), final_state(**dirty))


def test_the_scan_keeps_its_digits_over_many_chunks() -> None:
    """Very different decays in one fp32 sequence.

    Differences of long cumulative sums would lose all digits. Unmasked future decays would overflow in the gradients.
    """
    arguments = {n: v.float() for n, v in scan_arguments(400, 2, True, padded=False).items()}
    exact = ssd_sequential(**{n: v.double() for n, v in arguments.items()})[0]
    arguments["log_decay"].requires_grad_()
    fast, before = ssd_chunked(**arguments, chunk=16)
    assert ((fast - exact).abs().max() / exact.abs().max()) < 1e-5
    (gradient,) = torch.autograd.grad(fast.sum() + before.sum(), [arguments["log_decay"]])
    assert gradient.isfinite().all()


# --- convolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize(("window", "bias"), [(True, True), (False, True), (True, False), (False, False)])
def test_causal_convolution(length: int, taps: int, window: bool, bias: bool) -> None:
    torch.manual_seed(0)
    arguments = {
        "x": torch.randn(2, length, 6, dtype=F64),
        "window": torch.randn(2, taps - 1, 6, dtype=F64) if window else None,
        "weight": torch.randn(6, 1, taps, dtype=F64),
        "bias": torch.randn(6, dtype=F64) if bias else None,
    }
    same(causal_conv, causal_conv_sequential, arguments)


# --- experts ------------------------------------------------------------------------------------------------------


def expert_arguments(
    tokens: int, per_token: int, gated: bool = False, experts: int = 6, dtype: torch.dtype = F64
) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    return {
        "gate": torch.randn(experts, 16, 8, dtype=dtype) if gated else None,
        "hidden": torch.randn(tokens, 8, dtype=dtype),
        "topk_ids": torch.rand(tokens, experts).topk(per_token).indices,
        "weight": torch.rand(tokens, per_token, dtype=torch.promote_types(dtype, torch.float32)),
        "up": torch.randn(experts, 16, 8, dtype=dtype),
        "down": torch.randn(experts, 8, 16, dtype=dtype),
    }


@pytest.mark.parametrize("kernel", [experts_sorted, experts_gathered])
@pytest.mark.parametrize(("tokens", "per_token"), [(1, 1), (1, 6), (2, 2), (19, 3)])
@pytest.mark.parametrize(
    ("activation", "gated"), [("relu2", False), ("silu", False), ("silu", True), ("gelu", True), ("gelu_tanh", True)]
)
def test_experts(
    kernel: Callable[..., Tensor], tokens: int, per_token: int, activation: Activation, gated: bool
) -> None:
    functions = (partial(function, activation=activation) for function in (kernel, experts_dense))
    same(*functions, expert_arguments(tokens, per_token, gated))


def test_an_unselected_expert_is_not_read() -> None:
    """Weights of unselected experts may be invalid. (The dense reference would read them.)"""
    arguments: dict[str, Any] = expert_arguments(5, 2, gated=True) | {"activation": "silu"}
    arguments["topk_ids"] %= 2
    expected = experts_sorted(**arguments)
    for name in ("gate", "up", "down"):
        arguments[name][2:] = torch.nan
    assert torch.equal(experts_sorted(**arguments), expected)
    torch.testing.assert_close(experts_gathered(**arguments), expected)


def _grouped_mm_unsupported_reason(device: str, dtype: torch.dtype) -> str | None:
    """Why torch._grouped_mm does not run here (tries a call), or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch._grouped_mm(probe, probe[None], offs=torch.tensor([16], dtype=torch.int32, device=device))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    # Equal up to rounding: a few roundings to the 8 bits of bf16.
    [("cpu", torch.float32, 1e-6), ("cpu", torch.bfloat16, 2e-2), ("cuda", torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize(("tokens", "per_token"), [(1, 1), (64, 3)])
def test_grouped_experts(device: str, dtype: torch.dtype, tolerance: float, tokens: int, per_token: int) -> None:
    reason = _grouped_mm_unsupported_reason(device, dtype)
    if reason:
        pytest.skip(f"experts_grouped is not tested on {device} in {dtype}: {reason}")
    arguments = {
        n: t if t is None else t.to(device) for n, t in expert_arguments(tokens, per_token, dtype=dtype).items()
    }
    wide = {n: t if t is None or not t.is_floating_point() else t.double() for n, t in arguments.items()}
    exact = experts_dense(**wide, activation="relu2")
    grouped = experts_grouped(**arguments, activation="relu2")
    assert grouped.dtype == dtype
    assert (grouped - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("gated", [False, True])
def test_grouped_experts_of_odd_widths(gated: bool) -> None:
    """torch refuses rows that are not whole 16 bytes; in the forward pass, and for gradients."""
    torch.manual_seed(0)
    up, gate, down = (torch.randn(5, *shape, requires_grad=True) for shape in ((13, 10), (13, 10), (10, 13)))
    hidden, weight = torch.randn(9, 10, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    matrices = gate if gated else None, up, down
    routed = hidden, torch.rand(9, 5).topk(2).indices, weight
    results = [function(*routed, *matrices, "silu") for function in (experts_grouped, experts_dense)]
    cotangent = torch.randn(9, 10)
    leaves = [hidden, weight, *(matrix for matrix in matrices if matrix is not None)]
    gradients = [torch.autograd.grad((out * cotangent).sum(), leaves) for out in results]
    for actual, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(("width", "inner"), [(10, 13), (37, 21), (8, 12), (24, 8)])
def test_grouped_experts_of_odd_widths_in_bf16(width: int, inner: int) -> None:
    """In bf16 the widths must be multiples of 8 for torch; others are padded, not refused."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(5, *shape, generator=generator) for shape in ((inner, width), (width, inner)))
    hidden, weight = torch.randn(9, width, generator=generator), torch.rand(9, 2, generator=generator)
    matrices = [part.bfloat16() for part in (hidden, up, down)]
    chosen = torch.rand(9, 5, generator=generator).topk(2).indices
    found = experts_grouped(matrices[0], chosen, weight, None, *matrices[1:], "relu2")
    exact = experts_dense(
        matrices[0].double(), chosen, weight.double(), None, *(p.double() for p in matrices[1:]), "relu2"
    )
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 2e-2 * exact.abs().max()


# --- the router ---------------------------------------------------------------------------------------------------


def route_slowly(config: NemotronHFields, scores: list[float], bias: list[float]) -> dict[int, float]:
    """One token's experts and weights, by the rule of the published implementation."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // config.n_group
    best = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
    kept = sorted(range(config.n_group), key=lambda g: -best[g])[: config.topk_group]
    biased = [b if e // size in kept else 0.0 for e, b in enumerate(biased)]
    chosen = sorted(range(len(scores)), key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


def router_of(config: NemotronHFields) -> Router:
    moe = spec_of(config).moe
    assert moe is not None
    return Router(moe, config.hidden_size)


@pytest.mark.parametrize(
    ("n_group", "topk_group", "norm", "least_bias"),
    [(1, 1, True, 0.0), (3, 2, False, 0.0), (4, 1, True, 0.0), (12, 5, True, 0.0), (3, 2, True, -3.0)],
    ids=["one group", "groups", "one group kept", "groups of one", "left-out experts win"],
)
def test_router(n_group: int, topk_group: int, norm: bool, least_bias: float) -> None:
    """Last case: all kept scores are negative, so the four masked experts, with score 0, are selected."""
    config = NemotronHFields(
        hybrid_override_pattern="E",
        hidden_size=8,
        vocab_size=4,
        n_routed_experts=12,
        num_experts_per_tok=4 if least_bias < 0 else 3,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    torch.manual_seed(0)
    router = router_of(config).double()
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.uniform_(least_bias, least_bias + 0.5)
    hidden = torch.randn(20, 8, dtype=F64)
    choice, weight = router(hidden)
    scores = torch.sigmoid(hidden @ router.weight.T)
    for token in range(20):
        expected = route_slowly(config, scores[token].tolist(), router.e_score_correction_bias.tolist())
        assert dict(zip(choice[token].tolist(), weight[token].tolist(), strict=True)) == pytest.approx(expected)


def test_the_selection_bias_changes_the_choice_but_not_the_weights() -> None:
    config = NemotronHFields(
        hybrid_override_pattern="E", hidden_size=4, vocab_size=4, num_experts_per_tok=1, norm_topk_prob=False
    )
    router = router_of(config)
    torch.nn.init.zeros_(router.weight)
    router.e_score_correction_bias[5] = 100.0
    choice, weight = router(torch.ones(1, 4))
    assert choice.tolist() == [[5]]
    assert weight.tolist() == [[0.5]]  # sigmoid(0)


# --- attention ----------------------------------------------------------------------------------------------------


def attend_slowly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | None,
    context: tuple[Tensor, Tensor] | None = None,
    context_mask: Tensor | None = None,
) -> Tensor:
    """Attention by its definition: one softmax per query over its visible keys."""
    out = torch.empty_like(q)
    rows, heads, length, width = q.shape
    for b in range(rows):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for i in range(length):
                sees = torch.ones(length, dtype=torch.bool)
                if block_mask is not None:
                    sees = block_mask[b % block_mask.shape[0], i]
                keys, values = k[b, g][sees], v[b, g][sees]
                if context is not None:
                    exists = torch.ones(context[0].shape[2], dtype=torch.bool)
                    if context_mask is not None:
                        exists = context_mask[b, i % context_mask.shape[1]]
                    keys = torch.cat([context[0][b, g][exists], keys])
                    values = torch.cat([context[1][b, g][exists], values])
                scores = keys @ q[b, h, i] / math.sqrt(width)
                out[b, h, i] = (scores.exp() / scores.exp().sum()) @ values
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", ["none", "shared", "per row"])
@pytest.mark.parametrize("context", ["none", "all", "ragged"])
def test_block_attention(kv_heads: int, block: str, context: str) -> None:
    """Ragged: row 0 has no context, row 1 part of the context, row 2 all of it."""
    torch.manual_seed(0)
    length, past = 4, 6
    causal = torch.ones(1, length, length, dtype=torch.bool).tril()
    padded = causal.repeat(3, 1, 1)
    padded[1, :, 2] = torch.eye(length, dtype=torch.bool)[:, 2]
    block_mask = {"none": None, "shared": causal, "per row": padded}[block]
    context_mask = torch.arange(past) < torch.tensor([0, 3, past])[:, None, None] if context == "ragged" else None
    tensors = {
        "q": torch.randn(3, 4, length, 5, dtype=F64),
        "k": torch.randn(3, kv_heads, length, 5, dtype=F64),
        "v": torch.randn(3, kv_heads, length, 5, dtype=F64),
    }
    if context != "none":
        tensors |= {name: torch.randn(3, kv_heads, past, 5, dtype=F64) for name in ("past_k", "past_v")}

    def calling(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None = None, past_v: Tensor | None = None) -> Tensor:
            return kernel(q, k, v, block_mask, None if past_k is None else (past_k, past_v), context_mask)

        return call

    same(calling(block_attention), calling(attend_slowly), tensors)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tile", [3, 4, 11])
@pytest.mark.parametrize("own", [False, True])
def test_tiled_attention(kv_heads: int, tile: int, own: bool) -> None:
    """Each query attends to the keys of its mask row: k from `first` to the tile's end; `own`: the tile's own keys."""
    torch.manual_seed(0)
    length = 11
    heads = {"q": 4, **dict.fromkeys("kv", kv_heads), **dict.fromkeys(("own_k", "own_v") if own else (), kv_heads)}
    tensors = {name: torch.randn(2, n, length, 6, dtype=F64) for name, n in heads.items()}
    past, present = (torch.rand(2, length, length) < 0.5 for _ in range(2))
    tiles = []
    for lo in range(0, length, tile):
        hi = min(lo + tile, length)
        past[:, lo:hi, hi:] = False
        present[:, lo:hi, :lo] = present[:, lo:hi, hi:] = False
        (present if own else past)[:, range(lo, hi), range(lo, hi)] = True  # every query has a visible key
        first = lo // 2  # as with a window
        past[:, lo:hi, :first] = False
        mask = past[:, lo:hi, first:hi]
        mask = torch.cat([mask, present[:, lo:hi, lo:hi]], dim=-1) if own else mask
        tiles.append(QueryTile(lo, hi, mask[:, None], first))

    def fast(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None = None, own_v: Tensor | None = None) -> Tensor:
        return tiled_attention(q, k, v, tiles, None if own_k is None or own_v is None else (own_k, own_v))

    def slow(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None = None, own_v: Tensor | None = None) -> Tensor:
        if own_k is None or own_v is None:
            return attend_slowly(q, k, v, past)
        mask = torch.cat([past, present], dim=-1)
        return attend_slowly(q, torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2), mask)

    same(fast, slow, tensors)


# --- documents in packed rows -------------------------------------------------------------------------------------

# Two rows of five blocks of 4: leading tokens, a document end inside a block, adjacent documents, padding.
DOCUMENTS = torch.tensor(
    [
        [-1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, 2, 2],
        [0, 0, 0, 0, -1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 2, 2, -1, -1, -1, -1],
    ]
)


def test_layout_of_blocks() -> None:
    layout = Layout(DOCUMENTS, 4)
    assert layout.blocks == 5
    assert torch.equal(layout.token_mask, DOCUMENTS != -1)
    assert layout.block_document.tolist() == [[0, 0, 1, -1, 2], [0, 1, 1, 2, -1]]
    assert [[i for i, f in enumerate(row) if f] for row in layout.starts_document.tolist()] == [
        [0, 2, 3, 4],
        [0, 1, 3, 4],
    ]


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("taps", [1, 3, 6])
def test_layout_windows(block_size: int, taps: int) -> None:
    """The inputs before each block of the same document, else zeros; also across several short blocks."""
    layout = Layout(DOCUMENTS, block_size)
    columns = torch.arange(1.0, 41.0, dtype=F64).reshape(2, 20, 1).expand(2, 20, 3)
    found = layout.windows(columns, taps)
    assert found.shape == (2, 20 // block_size, taps, 3)
    for row in range(2):
        for block, owner in enumerate(layout.block_document[row].tolist()):
            for tap in range(taps):
                column = block * block_size - taps + tap
                kept = column >= 0 and DOCUMENTS[row, column] == owner
                assert (found[row, block, tap] == (columns[row, column] if kept else 0)).all()


@pytest.mark.parametrize("length", [20, 2 * TILE + 20])
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 150])
def test_layout_tiles(length: int, block_size: int, window: int | None) -> None:
    """The visible keys, query by query."""
    documents = F.pad(DOCUMENTS, (length - 20, 0), value=0)
    layout = Layout(documents, block_size)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    together = documents[:, :, None] == documents[:, None]
    block = key // block_size
    causal = together & (key <= query)
    start = query // block_size * block_size
    past = together & (key < start)
    if window is not None:
        causal, past = causal & (query - key < window), past & (key >= start - (window - 1))
    assert torch.equal(past, together & context_visible(key, start[:, 0], window))
    own = together & (block == query // block_size)
    for found, wanted in ((layout.causal_tiles(window), [causal]), (layout.denoiser_tiles(window), [past, own])):
        tiles = list(found)
        assert [tile.lo for tile in tiles] == [0, *(tile.hi for tile in tiles[:-1])]
        assert tiles[-1].hi == length
        for lo, hi, mask, first in tiles:
            assert hi - lo <= TILE
            assert lo % block_size == 0
            assert first == (0 if window is None else max(lo - (window - 1), 0) // 8 * 8)
            parts = [wanted[0][:, lo:hi, first:hi], *(w[:, lo:hi, lo:hi] for w in wanted[1:])]
            assert torch.equal(mask[:, 0], torch.cat(parts, dim=-1))
            assert mask.any(-1).all()  # every query has a key, also at padding
            assert not any(w[:, lo:hi, hi:].any() for w in wanted)  # no visible key is outside the tile
            assert not wanted[0][:, lo:hi, :first].any()


# --- the registry -------------------------------------------------------------------------------------------------


def test_the_registry_names_a_backend_and_a_reason_for_every_operation() -> None:
    cpu = torch.device("cpu")
    rows = report(cpu, torch.float32)
    assert [op for op, _, _ in rows] == list(REGISTRY)
    assert all(why for _, _, why in rows)
    assert select("experts", cpu, torch.float32, differentiable=True).name == "sorted-loop"
    assert "needs CUDA" in {op: why for op, _, why in rows}["experts"]
