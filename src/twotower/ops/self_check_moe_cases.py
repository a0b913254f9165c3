"""The inputs of the self-check for mixtures of experts: routers, experts, activations."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from twotower.ops.reference import int4
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


class Mixture(NamedTuple):
    """Tokens, experts of a token, and the kind of the experts."""

    tokens: int
    top: int
    activation: Activation
    gated: bool


MIXTURES = (
    Mixture(1, 2, "relu2", gated=False),
    Mixture(19, 3, "relu2", gated=False),
    Mixture(1, 3, "silu", gated=True),
    Mixture(19, 2, "silu", gated=True),
    Mixture(5, 2, "gelu", gated=True),
    Mixture(5, 2, "gelu_tanh", gated=True),
)


def experts_cases(device: torch.device, dtype: torch.dtype, as_int8: bool = False) -> list[Case]:
    """Experts with and without a gate, packed and not: few and many tokens, unselected experts, odd widths.

    On a GPU also many tokens and released sizes.
    """

    def arguments(mixture: Mixture, packed: bool, sizes: tuple[int, int, int]) -> tuple[object, ...]:
        tokens, top, activation, gated = mixture
        randn, (count, width, inner) = Randn(6, device), sizes
        up, down = (randn(count, *shape).to(dtype) for shape in ((inner, width), (width, inner)))
        hidden, topk_ids = randn(tokens, width).to(dtype) / 4, randn(tokens, count).argsort(-1)[:, :top]
        weights = up.flip(1) if gated else None, up, down
        routed = hidden, topk_ids.contiguous(), randn(tokens, top).abs()
        if as_int8:
            return *routed, *(None if one is None else quantize(one) for one in weights), activation
        copies = tuple(None if one is None else packed_copy(one, packed) for one in weights)
        return *routed, *weights, activation, copies

    odd = (7, 37, 21)  # experts, width, inner width
    packings = (False,) if as_int8 else packings_of(device)
    chosen = [(mixture, packed, odd) for mixture in MIXTURES for packed in packings]
    if device.type == "cuda":
        chosen += [(mixture._replace(tokens=96), False, odd) for mixture in MIXTURES[1:4:2]]
        chosen += [(mixture._replace(tokens=2), False, (3, 2688, 1856)) for mixture in MIXTURES[1:4:2]]
    return [
        make_case(f"{mixture}, packed {packed}", arguments, mixture, packed, sizes) for mixture, packed, sizes in chosen
    ]


def experts_int8_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The unpacked cases of `experts`."""
    return experts_cases(device, dtype, as_int8=True)


def experts_int4_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The unpacked cases of `experts`."""

    def arguments(case: Case) -> tuple[object, ...]:
        *routed, gate, up, down, activation, _ = case.arguments()
        assert isinstance(up, Tensor)
        data = (int4.quantize(one) if isinstance(one, Tensor) else None for one in (gate, up, down))
        return *routed, *data, up.shape[1], activation

    every = experts_cases(device, dtype)
    return [make_case(case.name, arguments, case) for case in every if case.name.endswith("packed False")]


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
