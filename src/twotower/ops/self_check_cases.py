"""The inputs of the self-check (`self_check`): small arguments for every operation, on which kernels are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.reference import int4
from twotower.ops.reference.int8 import quantize
from twotower.ops.reference.kv_write import AppendPositions
from twotower.ops.reference.mamba_block import MambaStepInputs, MambaWeights
from twotower.ops.reference.rope import HeadNorms, Rotation
from twotower.ops.self_check import Case
from twotower.ops.self_check_attention_cases import attention_cases
from twotower.ops.self_check_inputs import Randn, int8_activations, lengths_up_to, make_case, packed_copy, packings_of
from twotower.ops.self_check_moe_cases import (
    activate_cases,
    experts_cases,
    experts_int4_cases,
    experts_int8_cases,
    route_cases,
)
from twotower.specs import GateNorm


class Sizes(NamedTuple):
    """Sizes of a Mamba-2 mixer: H heads of width P in G groups, state size N, K convolution taps."""

    heads: int
    groups: int
    width: int
    state: int
    taps: int


ODD_SIZES = Sizes(heads=6, groups=2, width=12, state=24, taps=3)
FALCON_SIZES = Sizes(heads=24, groups=1, width=128, state=256, taps=4)
RELEASED_SIZES = Sizes(heads=64, groups=8, width=64, state=128, taps=4)


def mamba_block_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """A block and a single token; rows of different lengths, one empty; each row starts from its own state.

    Also a norm before the gate, and no norm, with rows in other slots.
    """

    def arguments(norm: GateNorm) -> tuple[object, ...]:
        *inputs, weights = mamba_block_arguments(ODD_SIZES, 5, device, dtype)
        weights = weights._replace(norm=norm, norm_weight=None if norm == "none" else weights.norm_weight)
        return *inputs, weights, True, torch.tensor((2, 0, 1), device=device)

    others: tuple[GateNorm, ...] = ("before_gate", "none")
    cases = _mamba_cases(device, lambda sizes, length: (*mamba_block_arguments(sizes, length, device, dtype), True))
    return cases + [make_case(f"norm: {norm}", arguments, norm) for norm in others]


def state_update_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The same sizes for two layers, three of five slots; each row accepts another number of tokens."""

    def arguments(sizes: Sizes, length: int) -> tuple[object, ...]:
        window, state, inputs, accepted, rows = state_update_arguments(sizes, length, device, dtype)
        other = MambaStepInputs(*(part * 0.5 for part in inputs))
        return ((window, state), (window * 2, state * 3)), (inputs, other), accepted, rows

    return _mamba_cases(device, arguments)


def _mamba_cases(device: torch.device, arguments: Callable[[Sizes, int], tuple[object, ...]]) -> list[Case]:
    """Odd sizes; on a GPU also the released sizes (slow in the interpreter). 33 tokens need the most shared memory.

    There also heads of Falcon-H1, which a program computes in parts.
    """
    released = [(RELEASED_SIZES, length) for length in (1, 16, 33)] + [(FALCON_SIZES, length) for length in (1, 16)]
    released = released if device.type == "cuda" else []
    pairs = [(ODD_SIZES, 1), (ODD_SIZES, 19), *released]
    return [
        Case(f"{sizes.heads} heads of {sizes.width}, {length} tokens", partial(arguments, sizes, length))
        for sizes, length in pairs
    ]


def kv_append_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Two layers; rows of different lengths, one without tokens, one whose slots end within the block."""

    def arguments(length: int) -> tuple[object, ...]:
        randn = Randn(10, device)
        pools = tuple((randn(161, 12).to(dtype), randn(161, 12).to(dtype)) for _ in range(2))
        start, stride, lengths = torch.tensor([[90, 0, 30], [20, 6, 30], [7, 5, 0]], device=device)
        token_mask = lengths_up_to(length, 3, device)
        step = torch.arange(length, device=device)
        counts = (step < token_mask[:, None]) & (lengths[:, None] + step < stride[:, None])
        new = tuple(
            tuple(randn(3, length, 3, 12).to(dtype) * counts[..., None, None] for _ in "kv") for _ in range(2)
        )  # zeros at padding: the reference writes them to the last vector
        for pair in pools:
            for pool in pair:
                pool[-1] = 0
        return pools, new, AppendPositions(start, stride, lengths, token_mask)

    return [make_case(f"{length} tokens", arguments, length) for length in (1, 9)]


def argmax_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """A small odd vocabulary with ties, and a large vocabulary."""
    return [
        Case(f"a vocabulary of {size}", partial(argmax_arguments, size, device, dtype))
        for size in (13, 131072 + 1 if device.type == "cuda" else 4096 + 1)
    ]


def draft_sweep_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Vocabularies in one part and in several; rows with masks from the start, behind a prefix, apart, and without.

    All sums are exact in bf16: logits are halves, and terms small integers, with many ties.
    """

    def arguments(size: int, rank: int, first: int) -> tuple[object, ...]:
        randn = Randn(22, device)
        logits = (randn(4, 5, size) * 4).round() / 2
        weights = tuple(randn(size, rank).clamp(-1, 1).round().to(dtype) for _ in range(2))
        masked = torch.ones(4, 5, device=device, dtype=torch.bool)
        masked[:, :first] = False
        masked[1, :4], masked[2, 3], masked[3] = False, False, False
        tokens, before = (torch.arange(count, device=device) * 3 % size for count in (20, 4))
        known = tokens.view(4, 5), torch.full((4, 5), 0.5, device=device)
        return logits.to(dtype), known, masked, before, weights, first

    sizes = (13, 3, 0), (700, 8, 1), *(((131072 + 1, 12, 0),) if device.type == "cuda" else ())
    return [make_case(f"a vocabulary of {size[0]}, rank {size[1]}", arguments, *size) for size in sizes]


def mamba_weights(sizes: Sizes, device: torch.device, dtype: torch.dtype, bias: bool = True) -> MambaWeights:
    """Random weights whose heads decay over a few to many tokens; weights that checkpoints keep in fp32 are fp32."""
    randn = Randn(1, device)
    inner = sizes.heads * sizes.width
    channels = inner + 2 * sizes.groups * sizes.state
    return MambaWeights(
        randn(channels, 1, sizes.taps).to(dtype) * 0.5,
        randn(channels).to(dtype) * 0.3 if bias else None,
        randn(sizes.heads) - 2,
        randn(sizes.heads) * 0.7 + 1,
        randn(sizes.heads),
        randn(inner).to(dtype) * 0.2 + 1,
        sizes.groups,
        sizes.width,
        1e-5,
        (0.01, 1.5),
    )


def mamba_block_arguments(
    sizes: Sizes, length: int, device: torch.device, dtype: torch.dtype, rows: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor, MambaWeights]:
    """The arguments of `mamba_block` except the last: rows of 0, …, `length` tokens, each from its own state."""
    randn = Randn(2, device)
    weights = mamba_weights(sizes, device, dtype)
    projected = randn(rows, length, weights.inner + weights.conv_dim + weights.heads)
    window = randn(rows, weights.taps - 1, weights.conv_dim)
    state = randn(rows, weights.heads, weights.head_dim, weights.state_size)
    token_mask = torch.arange(length, device=device) < lengths_up_to(length, rows, device)[:, None]
    return projected.to(dtype), token_mask, window.to(dtype), state, weights


def state_update_arguments(
    sizes: Sizes, length: int, device: torch.device, dtype: torch.dtype, slots: tuple[int, ...] = (3, 0, 4)
) -> tuple[Tensor, Tensor, MambaStepInputs, Tensor, Tensor]:
    """The arguments of `state_update`: rows that accept 0, …, `length` tokens, in the given slots of five."""
    randn = Randn(3, device)
    rows = len(slots)
    channels = sizes.heads * sizes.width + 2 * sizes.groups * sizes.state
    dt = randn(rows, length, sizes.heads).abs()
    inputs = MambaStepInputs(
        randn(rows, length, channels).to(dtype),
        randn(rows, length, sizes.heads, sizes.width),
        dt,
        -0.5 * dt,
        randn(rows, length, sizes.groups, sizes.state),
    )
    window = randn(5, sizes.taps - 1, channels).to(dtype)
    state = randn(5, sizes.heads, sizes.width, sizes.state)
    return window, state, inputs, lengths_up_to(length, rows, device), torch.tensor(slots, device=device)


def argmax_arguments(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (3, 2, size) with many ties, all equal at one position; and each row's excluded token: none, the best,
    another.
    """
    logits = (Randn(4, device)(3, 2, size) * 8).round() / 2
    logits[2, 1] = 1.0
    best = logits[1, 0].argmax()
    return logits.to(dtype), torch.stack([best * 0 - 1, best, best * 0 + size - 1])


# --- matrix products, norms, rotations -------------------------------------------------------------------------------


PRODUCTS = ((1, 67, 35, True), (3, 96, 64, False), (16, 131, 70, True), (21, 512, 33, False))  # tokens, in, out, bias
# Split-K at a released size, the largest tiles, and programs that sum all parts.
GPU_PRODUCTS = ((16, 4096, 2688, False), (70, 2688, 131, True), (200, 1024, 2688, False))


def linear_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """One token, several, more than a tile; odd widths; with and without bias; packed and not."""

    def arguments(tokens: int, width: int, out: int, bias: bool, packed: bool) -> tuple[object, ...]:
        randn = Randn(5, device)
        weight = randn(out, width).to(dtype)
        x, bias_drawn = randn(tokens, width).to(dtype), randn(out).to(dtype) if bias else None
        return x, weight, bias_drawn, packed_copy(weight, packed)

    return [
        make_case(f"{size[0]} tokens of width {size[1]}{', packed' * packed}", arguments, *size, packed)
        for size in PRODUCTS
        for packed in packings_of(device)
    ]


def linear_int8_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The cases of `linear` with a row of zeros; on a GPU also larger ones."""

    def arguments(tokens: int, width: int, out: int, bias: bool) -> tuple[object, ...]:
        randn = Randn(10, device)
        weight = randn(out, width)
        weight[out // 2] = 0
        return randn(tokens, width).to(dtype), *quantize(weight), randn(out).to(dtype) if bias else None

    sizes = PRODUCTS + GPU_PRODUCTS * (device.type == "cuda")
    return [make_case(f"{size[0]} tokens of width {size[1]}", arguments, *size) for size in sizes]


def linear_int4_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The cases of `linear_int8` with a group of zeros, and one with a short last run."""

    def arguments(tokens: int, width: int, out: int, bias: bool) -> tuple[object, ...]:
        randn = Randn(20, device)
        weight = randn(out, width)
        weight[out // 2, :32] = 0
        return randn(tokens, width).to(dtype), int4.quantize(weight), out, randn(out).to(dtype) if bias else None

    sizes = (*PRODUCTS, (5, 60, 17, False), *GPU_PRODUCTS * (device.type == "cuda"))
    return [make_case(f"{size[0]} tokens of width {size[1]}", arguments, *size) for size in sizes]


def low_rank_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """One layer, and several with one input; ranks below, at and above a tile; tokens of which some, all or none act.

    On a GPU also the input projection of the released Mamba layers.
    """

    def arguments(tokens: int, width: int, outs: tuple[int, ...], rank: int) -> tuple[object, ...]:
        randn = Randn(21, device)
        x = randn(tokens, width).to(dtype)
        adapters = tuple(
            (randn(rank, width).to(dtype) / width**0.5, randn(out, rank).to(dtype) / rank**0.5) for out in outs
        )
        acts = torch.arange(tokens, device=device) % 5 > 1 if tokens > 1 else torch.ones(1, device=device).bool()
        return tuple(randn(tokens, out).to(dtype) for out in outs), x, adapters, acts

    sizes: tuple[tuple[int, int, tuple[int, ...], int], ...] = (
        (1, 67, (35,), 3),
        (16, 130, (70, 16, 33), 16),
        (40, 600, (64, 131), 33),
        (5, 48, (20, 30, 40, 50), 70),
    )
    sizes += ((16, 2688, (10304,), 16), (96, 2688, (4096, 256, 256), 32)) * (device.type == "cuda")
    return [make_case(f"{size[0]} tokens of width {size[1]}, rank {size[3]}", arguments, *size) for size in sizes]


def rms_norm_cases(device: torch.device, dtype: torch.dtype, width: int | None = None) -> list[Case]:
    """Each order of norm and modulation, a residual stream in fp32 with bf16 weights, and an offset of the weight.

    width: None: an odd width, on a GPU the released width.
    """
    width = width or (2688 if device.type == "cuda" else 83)

    def arguments(order: str | None, stream: torch.dtype, rows: int = 3) -> tuple[object, ...]:
        randn = Randn(8, device)
        x, weight = randn(rows, 5, width).to(stream), (randn(width) / 4 + 1).to(dtype)
        both = randn(rows, 2, 1, width).to(dtype) / 2  # strided, like the time network's output
        return x, weight, 1e-5, *((None,) if order is None else ((both[:, 0], both[:, 1]), order))

    kinds = ((None, dtype), ("before", dtype), ("after", dtype), ("before", torch.float32))
    cases = [
        make_case(f"modulation {order}, a stream of {stream}", arguments, order, stream) for order, stream in kinds
    ]
    return [*cases, make_case("an offset", offset_norm_arguments, width, device, dtype)]


def offset_norm_arguments(width: int, device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    """The arguments of `rms_norm` with modulation after the norm, which multiplies by 1 + weight."""
    randn = Randn(18, device)
    x, weight, shift, scale = randn(3, 5, width), randn(width) / 4, randn(3, 1, width) / 2, randn(3, 1, width) / 2
    return x.to(dtype), weight.to(dtype), 1e-5, (shift.to(dtype), scale.to(dtype)), "after", 1.0


def norm_and_rotate_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Halves and neighbours, of whole heads and of a part of odd width; with and without norms; norms alone."""

    def arguments(width: int, pairs: int, interleaved: bool, normed: bool) -> tuple[object, ...]:
        randn = Randn(19, device)
        angles = randn(3, 5, pairs) * 9
        q, k = randn(3, 5, 6, width).to(dtype), randn(3, 5, 2, width).to(dtype)
        norms = HeadNorms(randn(width).to(dtype), randn(width).to(dtype), 1e-5, 1.0) if normed else None
        return q, k, norms, Rotation(angles.cos(), angles.sin(), interleaved) if pairs else None

    sizes = (64, 32, False, False), (12, 6, True, True), (45, 11, False, True), (80, 20, True, False)
    return [
        make_case(f"{2 * size[1]} of {size[0]} dimensions, interleaved {size[2]}, norms {size[3]}", arguments, *size)
        for size in (*sizes, (24, 0, False, True))
    ]


# The self-check cases of each operation.
CASES: dict[str, Callable[[torch.device, torch.dtype], list[Case]]] = {
    "attention": attention_cases,
    "mamba_block": mamba_block_cases,
    "state_update": state_update_cases,
    "kv_append": kv_append_cases,
    "argmax": argmax_cases,
    "draft_sweep": draft_sweep_cases,
    "linear": linear_cases,
    "rms_norm": rms_norm_cases,
    "norm_and_rotate": norm_and_rotate_cases,
    "activate": activate_cases,
    "route": route_cases,
    "experts": experts_cases,
    "low_rank": low_rank_cases,
    "linear_int8": linear_int8_cases,
    "linear_int4": linear_int4_cases,
    "experts_int8": experts_int8_cases,
    "experts_int4": experts_int4_cases,
    "linear_w8a8": int8_activations(linear_int8_cases),
    "linear_w4a8": int8_activations(linear_int4_cases),
    "experts_w8a8": int8_activations(experts_int8_cases),
    "experts_w4a8": int8_activations(experts_int4_cases),
}
