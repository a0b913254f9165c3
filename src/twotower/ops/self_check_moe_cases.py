"""The inputs of the self-check for mixtures of experts: routers, experts, activations."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from twotower.ops.reference.int8 import quantize
from twotower.ops.reference.routing import Routing
from twotower.ops.self_check import Case
from twotower.ops.self_check_inputs import Randn, make_case, packed_copy, packings_of
from twotower.specs import Activation


def route_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """One group and several, normalised or not; on a GPU also the released sizes. No selection is a near tie."""

    def arguments(rule: Routing) -> tuple[object, ...]:
        randn = Randn(7, device)
        return randn(17, 45).to(dtype), randn(12, 45).to(dtype) / 8, randn(12), rule

    rules = (Routing(1, 1, 2, True, 2.5), Routing(3, 2, 3, False, 2.5), Routing(4, 1, 2, True, 2.5))
    small = [make_case(f"{rule.n_group} groups", arguments, rule) for rule in rules]
    small += [
        make_case(f"softmax, normalised {rule.normalise}", softmax_route_arguments, rule, device, dtype)
        for rule in (Routing(1, 1, 3, True, 1.0, "softmax"), Routing(1, 1, 2, False, 2.0, "softmax"))
    ]
    return small + [make_case("128 experts", released_route_arguments, device, dtype)] * (device.type == "cuda")


def released_route_arguments(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Routing]:
    """The arguments of `route` at the released sizes."""
    randn = Randn(15, device)
    hidden, weight = randn(5, 2688).to(dtype), (randn(128, 2688) / 2688**0.5).to(dtype)
    return hidden, weight, randn(128) / 8, Routing(1, 1, 6, True, 2.5)


def softmax_route_arguments(
    rule: Routing, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Routing]:
    """The arguments of `route` without a selection bias."""
    randn = Randn(16, device)
    return randn(9, 45).to(dtype), randn(11, 45).to(dtype) / 4, None, rule


def experts_cases(
    device: torch.device,
    dtype: torch.dtype,
    width: int = 37,
    inner: int = 21,
    packings: tuple[bool, ...] | None = None,
) -> list[Case]:
    """Few and many tokens, unselected experts, odd widths; packed and not. On a GPU also large and released sizes."""

    def arguments(tokens: int, top: int, count: int, width: int, inner: int, packed: bool) -> tuple[object, ...]:
        randn = Randn(6, device)
        up, down = (randn(count, *shape).to(dtype) for shape in ((inner, width), (width, inner)))
        hidden, topk_ids = randn(tokens, width).to(dtype) / 4, randn(tokens, count).argsort(-1)[:, :top]
        copies = packed_copy(up, packed), packed_copy(down, packed)
        return hidden, topk_ids.contiguous(), randn(tokens, top).abs(), up, down, copies

    sizes = [(1, 2, 7, width, inner), (19, 3, 7, width, inner)]
    if device.type == "cuda":
        sizes += [(96, 3, 7, width, inner), (2, 2, 3, 2688, 1856)]
    return [
        make_case(f"{size[0]} tokens, {size[1]} experts each{', packed' * packed}", arguments, *size, packed)
        for size in sizes
        for packed in packings or packings_of(device)
    ]


def experts_int8_cases(device: torch.device, dtype: torch.dtype, width: int = 37, inner: int = 21) -> list[Case]:
    """The unpacked cases of `experts`."""

    def arguments(case: Case) -> tuple[object, ...]:
        *routed, up, down, _ = case.arguments()
        assert isinstance(up, Tensor)
        assert isinstance(down, Tensor)
        return *routed, *quantize(up), *quantize(down)

    return [make_case(case.name, arguments, case) for case in experts_cases(device, dtype, width, inner, (False,))]


def gated_experts_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The cases of `experts` with a gate, each with another activation."""

    def arguments(case: Case, activation: str) -> tuple[object, ...]:
        *routed, up, down, copies = case.arguments()
        assert isinstance(up, Tensor)
        assert isinstance(copies, tuple)
        gate = up.flip(1)
        packed = packed_copy(gate, copies[0] is not None)
        return *routed, gate, up, down, activation, (packed, *copies)

    cases = zip(experts_cases(device, dtype), ("silu", "gelu", "gelu_tanh", "relu2"), strict=False)
    return [make_case(f"{case.name}, {activation}", arguments, case, activation) for case, activation in cases]


def gated_experts_int8_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The unpacked cases of `experts` with a gate."""

    def arguments(case: Case) -> tuple[object, ...]:
        *routed, up, down, _ = case.arguments()
        assert isinstance(up, Tensor)
        assert isinstance(down, Tensor)
        return *routed, quantize(up.flip(1)), quantize(up), quantize(down), "silu"

    return [make_case(case.name, arguments, case) for case in experts_cases(device, dtype, packings=(False,))]


def activate_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Every activation with and without a gate, over small and large values, of an odd width."""

    def arguments(activation: Activation, gated: bool) -> tuple[object, ...]:
        randn = Randn(17, device)
        up, gate = randn(2, 3, 85).to(dtype), (randn(2, 3, 85) * 4).to(dtype)
        return up if gated else gate, gate if gated else None, activation

    return [
        make_case(f"{activation}, gated {gated}", arguments, activation, gated)
        for activation in get_args(Activation)
        for gated in (True, False)
    ]
