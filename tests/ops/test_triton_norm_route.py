"""Triton norms and routers against their references, over all arguments, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
import triton_mode
from torch import Tensor

from twotower.ops.reference import norm, routing
from twotower.ops.reference.norm import Order
from twotower.ops.reference.routing import Routing
from twotower.ops.self_check_inputs import Randn
from twotower.ops.self_check_moe_cases import released_route_arguments, route_cases
from twotower.ops.triton.launch import MAX_NORM_WIDTH

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import norm as triton_norm  # noqa: E402
from twotower.ops.triton import routing as triton_route  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- norms -----------------------------------------------------------------------------------------------------------


Modulation = tuple[Tensor, Tensor] | None


def norm_arguments(
    width: int, dtype: torch.dtype, stream: torch.dtype, order: Order | None, rows: int = 2, length: int = 3
) -> tuple[Tensor, Tensor, float, Modulation, Order]:
    randn = Randn(0, DEVICE)
    x, weight = (randn(rows, length, width) * 3).to(stream), (randn(width) / 4 + 1).to(dtype)
    parts = (randn(rows, 6, 1, width) / 2).to(dtype)  # a layer uses a slice of it
    return x, weight, 1e-5, None if order is None else (parts[:, 3], parts[:, 4]), order or "before"


def check_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    modulation: Modulation = None,
    order: Order = "before",
    offset: float = 0.0,
) -> Tensor:
    wide = None if modulation is None else (modulation[0].double(), modulation[1].double())
    expected = norm.rms_norm(x.double(), weight.double(), eps, wide, order, offset)
    found = triton_norm.rms_norm(x, weight, eps, modulation, order, offset)
    assert found.dtype == weight.dtype
    assert found.is_contiguous()
    share = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[weight.dtype]  # the interpreter truncates to bf16
    torch.testing.assert_close(found.double(), expected, rtol=share, atol=1e-6 * float(expected.abs().max()))
    return found


@DTYPES
@pytest.mark.parametrize("order", [None, "before", "after"])
@pytest.mark.parametrize("width", [1, 83, 256, 2688])
def test_norm(width: int, order: Order | None, dtype: torch.dtype) -> None:
    check_norm(*norm_arguments(width, dtype, dtype, order))


@pytest.mark.parametrize("order", [None, "before", "after"])
def test_norm_of_an_fp32_stream(order: Order | None) -> None:
    """An fp32 residual stream (residual_in_fp32) with bf16 weights."""
    check_norm(*norm_arguments(40, torch.bfloat16, torch.float32, order))


@DTYPES
@pytest.mark.parametrize("order", [None, "before", "after"])
def test_norm_with_an_offset(order: Order | None, dtype: torch.dtype) -> None:
    """Weights near 0, as in Gemma: in bf16 the sum with the offset must not be rounded."""
    x, weight, eps, modulation, _ = norm_arguments(83, dtype, dtype, order)
    check_norm(x, (weight - 1) / 64, eps, modulation, order or "before", 1.0)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_of_small_tokens(eps: float) -> None:
    x, weight, *_ = norm_arguments(40, torch.float32, torch.float32, None)
    check_norm(x * 1e-3, weight, eps)
    check_norm(x * 0, weight, eps)


def test_norm_of_slices() -> None:
    x, weight, eps, modulation, order = norm_arguments(40, torch.float32, torch.float32, "before", rows=4, length=8)
    assert modulation is not None
    shift, scale = modulation
    for part in (x[:, -1:], x[:, 1::2], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        check_norm(part, weight, eps, modulation, order)
    check_norm(x, weight, eps, (shift, scale.contiguous()), order)
    check_norm(x, weight, eps, (shift.expand(4, 2, 40).mT.contiguous().mT[:, :1], scale), order)
    check_norm(x[1::2], weight, eps, (shift[1::2], scale[1::2]), "after")


def test_tokens_too_wide_for_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "rms_norm", lambda *_: "the reference")
    x = torch.zeros(1, 1, MAX_NORM_WIDTH + 1, device=DEVICE)
    assert triton_norm.rms_norm(x, x[0, 0], 1e-5) == "the reference"


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_a_norm_of_no_tokens(shape: tuple[int, int]) -> None:
    x, weight, eps, *_ = norm_arguments(40, torch.bfloat16, torch.float32, None)
    found = triton_norm.rms_norm(x[: shape[0], : shape[1]], weight, eps)
    assert found.shape == (*x[: shape[0], : shape[1]].shape[:2], 40)
    assert found.dtype == torch.bfloat16


# --- routers ---------------------------------------------------------------------------------------------------------


SOFTMAX = Routing(1, 1, 3, True, 1.0, "softmax")


def route_arguments(
    tokens: int, width: int, experts: int, dtype: torch.dtype, rule: Routing
) -> tuple[Tensor, Tensor, Tensor, Routing]:
    randn = Randn(0, DEVICE)
    weight = (randn(experts, width) / width**0.5).to(dtype)
    bias = randn(experts).abs()  # positive: no tie with a masked expert, which scores 0
    return randn(tokens, width).to(dtype), weight, bias, rule


def check_route(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: Routing) -> tuple[Tensor, Tensor]:
    """Ids, in order, and weights equal the reference's."""
    expected = routing.route(hidden.double(), weight.double(), None if bias is None else bias.double(), rule)
    choice, chosen = triton_route.route(hidden, weight, bias, rule)
    assert torch.equal(choice, expected[0])
    assert (choice.dtype, chosen.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(chosen.double(), expected[1], rtol=2e-6, atol=1e-7)
    return choice, chosen


@DTYPES
@pytest.mark.parametrize(
    ("experts", "rule"),
    [
        (8, Routing(1, 1, 3, True, 2.5)),
        (7, Routing(1, 1, 7, False, 1.0)),  # all of them
        (12, Routing(4, 2, 3, True, 1.5)),
        (12, Routing(3, 1, 4, False, 1)),
        (5, Routing(5, 2, 2, True, 2.5)),  # groups of one
        (40, Routing(2, 2, 1, True, 2.5)),
    ],
)
def test_route(experts: int, rule: Routing, dtype: torch.dtype) -> None:
    check_route(*route_arguments(3, 45, experts, dtype, rule))


@DTYPES
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("experts", "rule"),
    [
        (8, SOFTMAX),
        (7, SOFTMAX._replace(top=7, normalise=False)),
        (60, SOFTMAX._replace(top=4, factor=2.0, normalise=False)),
        (12, SOFTMAX._replace(n_group=4, topk_group=2)),
        (9, Routing(1, 1, 2, True, 1.0)),
    ],
)
def test_scores_and_biases_of_other_routers(experts: int, rule: Routing, biased: bool, dtype: torch.dtype) -> None:
    """Softmax over all experts, before the selection; with and without a bias of the selection."""
    hidden, weight, bias, _ = route_arguments(3, 45, experts, dtype, rule)
    check_route(hidden, weight * 3, bias if biased else None, rule)


def test_softmax_of_large_logits() -> None:
    """Logits near 500 or −500: exponentials without the maximum would overflow, or all be 0."""
    hidden, weight, _, rule = route_arguments(4, 60, 12, torch.float32, SOFTMAX._replace(normalise=False))
    weight[:, 0] = 500
    for sign in (1, -1):
        hidden[:, 0] = sign
        expected = routing.route(hidden.double(), weight.double(), None, rule)
        choice, chosen = triton_route.route(hidden, weight, None, rule)
        assert torch.equal(choice, expected[0])
        torch.testing.assert_close(chosen.double(), expected[1], rtol=3e-4, atol=0)


@pytest.mark.parametrize(("tokens", "width", "experts"), [(1, 1, 4), (17, 400, 20), (2, 2688, 128), (2, 30, 300)])
def test_route_of_other_sizes(tokens: int, width: int, experts: int) -> None:
    """More tokens, columns and experts than one program handles."""
    check_route(*route_arguments(tokens, width, experts, torch.bfloat16, Routing(1, 1, 2, True, 2.5)))


def test_masked_groups_score_zero() -> None:
    """Masked groups score 0. If all kept scores are negative, masked experts are selected, the lowest id first."""
    hidden, weight, bias, rule = route_arguments(4, 30, 12, torch.float32, Routing(3, 1, 5, True, 1.0))
    choice, _ = triton_route.route(hidden, weight, bias * 0 - 3, rule)
    kept = routing.route(hidden.double(), weight.double(), bias.double() * 0 - 3, rule._replace(top=12))[0][:, 8:]
    for ids, group in zip(choice.tolist(), (kept // 4)[:, 0].tolist(), strict=True):
        assert ids == [e for e in range(12) if e // 4 != group][:5]


def test_ties_go_to_the_lowest_id() -> None:
    """Ties: scores of exactly 1, equal experts, equal groups."""
    hidden = torch.ones(2, 16, device=DEVICE)
    weight = torch.full((12, 16), 10.0, device=DEVICE)
    for rule, expected in ((Routing(1, 1, 3, True, 1.0), [0, 1, 2]), (Routing(3, 2, 5, True, 1.0), [0, 1, 2, 3, 4])):
        choice, chosen = triton_route.route(hidden, weight, torch.zeros(12, device=DEVICE), rule)
        assert choice.tolist() == [expected] * 2
        torch.testing.assert_close(chosen, torch.full_like(chosen, 1 / rule.top))


@DTYPES
@pytest.mark.parametrize("rule", [Routing(3, 2, 3, True, 2.5), SOFTMAX], ids=["sigmoid", "softmax"])
def test_routing_does_not_depend_on_other_tokens(rule: Routing, dtype: torch.dtype) -> None:
    """Bit-identical beside other tokens. NaN scores still give valid expert ids."""
    hidden, weight, bias, _ = route_arguments(18, 420, 12, dtype, rule)
    hidden[3] = torch.nan
    choice, chosen = triton_route.route(hidden, weight, bias, rule)
    assert ((choice >= 0) & (choice < 12)).all()
    for token in (0, 4, 17):
        alone = triton_route.route(hidden[token : token + 1], weight, bias, rule)
        assert torch.equal(alone[0][0], choice[token])
        assert torch.equal(alone[1][0], chosen[token])


def test_route_of_slices_and_of_several_dtypes() -> None:
    hidden, weight, bias, rule = route_arguments(6, 50, 8, torch.bfloat16, Routing(2, 1, 2, True, 2.5))
    check_route(hidden[::2], weight, bias, rule)
    check_route(hidden.mT.contiguous().mT, weight.mT.contiguous().mT, bias, rule)
    check_route(hidden, weight.float(), bias, rule)
    check_route(hidden.float(), weight, bias.bfloat16(), rule)
    assert triton_route.route(hidden[:0], weight, bias, rule)[0].shape == (0, 2)


@DTYPES
def test_no_case_is_a_near_tie(dtype: torch.dtype) -> None:
    """The self-check inputs of `route` have no near ties, so rounding cannot change the selection."""
    given = [case.arguments() for case in route_cases(torch.device("cpu"), dtype)]
    for hidden, weight, bias, rule in (*given, released_route_arguments(torch.device("cpu"), dtype)):
        logits = hidden.double() @ weight.double().T
        biased = logits if rule.scores == "softmax" else logits.sigmoid() + bias  # no case has softmax and a bias
        if rule.n_group > 1:
            grouped = biased.unflatten(-1, (rule.n_group, -1))
            best = grouped.topk(2).values.sum(-1)
            of_groups = best.sort(descending=True).values
            assert (of_groups[:, rule.topk_group - 1] - of_groups[:, rule.topk_group]).min() > 1e-3
            kept = torch.zeros_like(best).scatter(-1, best.topk(rule.topk_group).indices, 1.0)
            biased = (grouped * kept[..., None]).flatten(-2)
        best = biased.sort(descending=True).values[:, : rule.top + 1]
        assert (best[:, :-1] - best[:, 1:]).min() > 1e-3
