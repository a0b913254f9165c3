"""Triton kernels of experts, and of int8 and int4 products, against their references, on a GPU or interpreted."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
import triton_mode
from torch import Tensor

from twotower import TwoTowerForCausalLM, options
from twotower.checkpoint.quantize import quantize_
from twotower.ops import registry, self_check_cases
from twotower.ops.reference import experts, int4, int8
from twotower.ops.self_check import _as_float64 as as_float64
from twotower.ops.self_check import find_mismatch
from twotower.ops.self_check_cases import Randn
from twotower.specs import Activation

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import experts as triton_experts  # noqa: E402
from twotower.ops.triton import gemm  # noqa: E402
from twotower.ops.triton import linear as triton_linear  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
Scheme = Literal["plain", "int8", "int4"]
SCHEMES = pytest.mark.parametrize("scheme", ["plain", "int8", "int4"])
KINDS = pytest.mark.parametrize(
    ("dtype", "scheme"),
    [(torch.float32, "plain"), (torch.bfloat16, "int8"), (torch.bfloat16, "int4")],
    ids=["fp32", "bf16-int8", "bf16-int4"],
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """expected: in float64. The tolerances are those of the self-check."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    share = {torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
    scale = expected.abs().max().clamp(min=1e-30) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=share)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Bit-identical on a GPU. The interpreter uses numpy, whose last digits depend on the position of a row."""
    return torch.equal(actual, expected) if DEVICE.type == "cuda" else torch.allclose(actual, expected, 1e-2, 1e-4)


class Mixture:
    """Weights of `count` experts from `width` to `inner` and back, and the expected results."""

    def __init__(
        self,
        count: int,
        width: int,
        inner: int,
        dtype: torch.dtype,
        scheme: Scheme,
        seed: int = 1,
        activation: Activation = "relu2",
        gated: bool = False,
    ) -> None:
        self.randn = Randn(seed, DEVICE)
        self.count, self.width, self.dtype = count, width, dtype
        up, down = self.randn(count, inner, width) / width**0.5, self.randn(count, width, inner) / inner**0.5
        gate = self.randn(count, inner, width) * 2 / width**0.5 if gated else None
        self.function, self.reference, make = {
            "plain": (triton_experts.experts, experts.experts_sorted, lambda one: one.to(dtype)),
            "int8": (triton_experts.experts_int8, int8.experts_sorted, int8.quantize),
            "int4": (triton_experts.experts_int4, int4.experts_sorted, int4.quantize),
        }[scheme]
        self.weights: list[Any] = [None if one is None else make(one) for one in (gate, up, down)]
        self.rest = (inner, activation) if scheme == "int4" else (activation,)

    def tokens(self, tokens: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, topk_ids, weight."""
        hidden, choice = self.randn(tokens, self.width).to(self.dtype), self.randn(tokens, self.count).argsort(-1)
        return hidden, choice[:, :top], self.randn(tokens, top).abs()

    def __call__(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        return self.function(hidden, choice, weight, *self.weights, *self.rest)

    def check(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> None:
        wide = map(as_float64, self.weights)
        expected = self.reference(hidden.double(), choice, weight.double(), *wide, *self.rest)
        close(self(hidden, choice, weight), expected, self.dtype)


# --- experts ----------------------------------------------------------------------------------------------------------


@SCHEMES
@DTYPES
@pytest.mark.parametrize(("tokens", "top"), [(1, 3), (6, 1), (40, 3)])
def test_any_number_of_tokens(tokens: int, top: int, dtype: torch.dtype, scheme: Scheme) -> None:
    """Seven experts, some unselected; fewer pairs than experts, and more than a tile per expert."""
    mixture = Mixture(7, 40, 24, dtype, scheme)
    mixture.check(*mixture.tokens(tokens, top))


@SCHEMES
@DTYPES
@pytest.mark.parametrize(("width", "inner"), [(1, 1), (37, 70), (304, 16)])
def test_any_width(width: int, inner: int, dtype: torch.dtype, scheme: Scheme) -> None:
    """Sizes that are multiples of tiles and panels or not; several steps per sum; several programs."""
    mixture = Mixture(3, width, inner, dtype, scheme)
    mixture.check(*mixture.tokens(5, 2))


@KINDS
@pytest.mark.parametrize(
    ("activation", "gated"), [*((activation, True) for activation in get_args(Activation)), ("silu", False)]
)
def test_any_activation(activation: Activation, gated: bool, dtype: torch.dtype, scheme: Scheme) -> None:
    """A token; more than a tile per expert; unselected experts; several programs, with a partial last one."""
    mixture = Mixture(5, 37, 70, dtype, scheme, activation=activation, gated=gated)
    for tokens in (1, 34):
        mixture.check(*mixture.tokens(tokens, 2))


@KINDS
def test_gated_experts_of_one_token_among_others(dtype: torch.dtype, scheme: Scheme) -> None:
    mixture = Mixture(6, 40, 24, dtype, scheme, activation="silu", gated=True)
    hidden, choice, weight = mixture.tokens(20, 3)
    result = mixture(hidden, choice, weight)
    hidden[1] = torch.nan
    assert same(mixture(hidden[2:3], choice[2:3], weight[2:3]), result[2:3])
    found = mixture(hidden, choice, weight)
    assert torch.equal(found[2:], result[2:])
    assert found[1].isnan().all()
    assert mixture(hidden[:0], choice[:0], weight[:0]).shape == (0, 40)


@SCHEMES
@pytest.mark.parametrize("count", [1, 17])
def test_any_number_of_experts(count: int, scheme: Scheme) -> None:
    mixture = Mixture(count, 20, 12, torch.float32, scheme)
    for tokens in (1, count // 2, 10):
        mixture.check(*mixture.tokens(tokens, min(count, 2)))


@SCHEMES
@pytest.mark.parametrize(("tokens", "expert"), [(16, 0), (17, 4), (40, 8)])
def test_one_expert_for_all(tokens: int, expert: int, scheme: Scheme) -> None:
    """The first expert, one in the middle, the last."""
    mixture = Mixture(9, 24, 16, torch.bfloat16, scheme)
    hidden, choice, weight = mixture.tokens(tokens, 1)
    mixture.check(hidden, torch.full_like(choice, expert), weight)


@SCHEMES
def test_no_tokens(scheme: Scheme) -> None:
    mixture = Mixture(3, 8, 8, torch.float32, scheme)
    assert mixture(*mixture.tokens(0, 2)).shape == (0, 8)
    assert torch.equal(mixture(*mixture.tokens(4, 0)), torch.zeros(4, 8, device=DEVICE))


@KINDS
def test_strided_tensors(dtype: torch.dtype, scheme: Scheme) -> None:
    mixture = Mixture(5, 24, 16, dtype, scheme)
    hidden, choice, weight = mixture.tokens(12, 2)
    expected = mixture(hidden, choice.contiguous(), weight)
    wider = mixture.randn(12, 3, 24).to(dtype)
    wider[:, 1] = hidden
    for x in (wider[:, 1], hidden.t().contiguous().t()):
        assert torch.equal(mixture(x, choice, weight.t().contiguous().t()), expected)
    assert torch.equal(mixture(hidden, choice.int(), weight), expected)


@KINDS
@pytest.mark.parametrize("together", [4, 34])
def test_a_tokens_result_does_not_depend_on_its_neighbours(together: int, dtype: torch.dtype, scheme: Scheme) -> None:
    """Also if another token is NaN, and in whatever tile the token's pairs are."""
    mixture = Mixture(6, 40, 24, dtype, scheme)
    hidden, choice, weight = mixture.tokens(together, 3)
    result = mixture(hidden, choice, weight)
    turned = torch.arange(together, device=DEVICE).flip(0)
    assert same(mixture(hidden[turned], choice[turned], weight[turned]), result[turned])
    spoilt = hidden.clone()
    spoilt[1] = torch.nan
    found = mixture(spoilt, choice, weight)
    others = torch.arange(together, device=DEVICE) != 1
    assert torch.equal(found[others], result[others])
    assert found[1].isnan().all()
    assert same(mixture(hidden[2:3], choice[2:3], weight[2:3]), result[2:3])


@SCHEMES
@pytest.mark.parametrize("tokens", [1, 30])
def test_unselected_experts_are_not_read(tokens: int, scheme: Scheme) -> None:
    """Memory behind the last expert and unused entries of the tile list are not read either."""
    mixture = Mixture(8, 24, 16, torch.float32, scheme)
    hidden, choice, weight = mixture.tokens(tokens, 2)
    choice = choice % 3 * 2 + 1  # 1, 3 and 5, possibly one of them twice
    expected = mixture(hidden, choice, weight)
    for own in mixture.weights[1:]:
        scales = own if scheme == "plain" else own[1] if scheme == "int8" else own[..., :32].view(torch.bfloat16)
        scales[[0, 2, 4, 6, 7]] = torch.nan
    assert torch.equal(mixture(hidden, choice, weight), expected)
    assert not expected.isnan().any()


@pytest.mark.parametrize(
    ("pairs", "count", "rows"), [(6, 33, 16), (33, 33, 16), (34, 33, 16), (200, 7, 32), (900, 5, 64)]
)
def test_group_by_expert(pairs: int, count: int, rows: int) -> None:
    """Every pair once, ordered by expert; each tile has one expert; at most as many tiles as programs."""
    choice = (Randn(2, DEVICE)(pairs, 1).abs() * count / 3).long().clamp(max=count - 1)
    order, items = triton_experts.group_by_expert(choice, count, rows)
    flat = choice.flatten()
    assert torch.equal(order.long(), flat.argsort(stable=True))
    visited = []
    for expert, begin, end in items.tolist():
        if expert >= 0:
            places = range(begin, min(begin + rows, end))
            assert {int(flat[order[i]]) for i in places} == {expert}
            visited += places
    assert sorted(visited) == list(range(pairs))
    assert len(items) <= min(pairs, count) + pairs // rows


@pytest.mark.parametrize(("tokens", "rows"), [(1, 16), (16, 16), (96, 16), (500, 32), (2048, 64), (9000, 64)])
def test_tiles_grow_with_the_tokens_of_an_expert(tokens: int, rows: int) -> None:
    assert triton_experts.rows_per_tile(6 * tokens, 128, torch.bfloat16) == rows
    assert triton_experts.rows_per_tile(6 * tokens, 128, torch.float32) == min(rows, 32)


# --- dense products ---------------------------------------------------------------------------------------------------

LINEARS = pytest.mark.parametrize("scheme", ["int8", "int4"])
PRODUCTS: dict[str, tuple[Callable[..., Any], ...]] = {  # kernel, reference, weight → its arguments
    "int8": (triton_linear.linear_int8, int8.linear, int8.quantize),
    "int4": (triton_linear.linear_int4, int4.linear, lambda weight: (int4.quantize(weight), len(weight))),
}


def check_linear(scheme: Scheme, tokens: int, width: int, out: int, dtype: torch.dtype, bias: bool) -> None:
    randn = Randn(3, DEVICE)
    kernel, reference, make = PRODUCTS[scheme]
    x, weight = randn(2, tokens, width)[:1].to(dtype), make(randn(out, width))
    own = randn(out).to(dtype) if bias else None
    expected = reference(x.double(), *map(as_float64, weight), None if own is None else own.double())
    close(kernel(x, *weight, own), expected, dtype)


@LINEARS
@DTYPES
@pytest.mark.parametrize(
    ("tokens", "width", "out"), [(0, 15, 17), (1, 1, 1), (1, 131, 70), (17, 15, 17), (17, 288, 64), (70, 131, 70)]
)
def test_linear(tokens: int, width: int, out: int, dtype: torch.dtype, scheme: Scheme) -> None:
    check_linear(scheme, tokens, width, out, dtype, bias=out == 17)


@LINEARS
@DTYPES
@pytest.mark.parametrize(("width", "bias"), [(1024, True), (1500, False)])
@pytest.mark.parametrize("split", [True, False])
def test_linear_with_split_k(
    split: bool, width: int, bias: bool, dtype: torch.dtype, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few outputs with long sums, with a shorter last part: a program sums one part, or all."""
    monkeypatch.setattr(triton_linear, "PROGRAMS", 3)
    check_linear(scheme, 3, width, 20 if split else 150, dtype, bias)


def test_split_k_covers_the_sum_and_fills_a_gpu() -> None:
    assert triton_linear.split_k(4096, 42) == (7, 640)
    assert triton_linear.split_k(2688, 2048) == (1, 2688)
    for width in (1, 100, 512, 1500, 3712, 10000):
        for programs in (1, 7, 100, 263, 300):
            parts, part = triton_linear.split_k(width, programs)
            assert (parts - 1) * part < width <= parts * part
            assert part % 128 == 0


@LINEARS
@DTYPES
def test_a_row_does_not_depend_on_its_neighbours(
    dtype: torch.dtype, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the other rows fill several tiles, so that one program sums all parts."""
    monkeypatch.setattr(triton_linear, "PROGRAMS", 4)
    randn = Randn(4, DEVICE)
    kernel, _, make = PRODUCTS[scheme]
    x, weight = randn(40, 1100).to(dtype), make(randn(24, 1100))
    together = kernel(x, *weight)
    x[3] = torch.nan
    for some in (slice(0, 3), slice(5, 6), slice(4, 12), slice(4, 40)):
        assert same(kernel(x[some], *weight), together[some])
    wider = torch.cat([x, x], 1)[:12, :1100]
    assert same(kernel(wider, *weight)[4:], together[4:12])


@LINEARS
def test_many_tokens_go_to_the_reference(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _, make = PRODUCTS[scheme]
    monkeypatch.setattr({"int8": int8, "int4": int4}[scheme], "linear", lambda *_: "the reference")
    weight = make(Randn(5, DEVICE)(3, 4))
    most = {"int8": triton_linear.MAX_TOKENS, "int4": triton_linear.MAX_TOKENS_INT4}[scheme]
    assert kernel(torch.ones(most + 1, 4, device=DEVICE), *weight) == "the reference"
    assert kernel(torch.ones(2, most // 2, 4, device=DEVICE), *weight) != "the reference"


def test_an_int4_row_that_is_not_finite_spoils_no_other_row() -> None:
    """Also in a width that 32 does not divide, where the last group is read again beyond the sum."""
    weight, x = Randn(6, DEVICE)(20, 70), Randn(7, DEVICE)(2, 70)
    expected = triton_linear.linear_int4(x, int4.quantize(weight), 20)
    weight[3, 69], weight[17, 0] = torch.nan, torch.inf
    found = triton_linear.linear_int4(x, int4.quantize(weight), 20)
    assert not found[:, [3, 17]].isfinite().any()
    others = [n for n in range(20) if n not in (3, 17)]
    assert torch.equal(found[:, others], expected[:, others])


# --- int8 and int4 to bf16 --------------------------------------------------------------------------------------------


def test_the_assembly_converts_every_int8_byte() -> None:
    """Evaluates the PTX text by the definition of its instructions: Triton's interpreter cannot run it."""
    for first in range(256):
        second, third, fourth = (first * 7 + 3) % 256, first ^ 0x5A, 255 - first
        word = first | second << 8 | third << 16 | fourth << 24
        found = _run(gemm.INT8_TO_BF16.value, {"$2": word}, ("$0", "$1"))
        signed = [n - 256 if n > 127 else n for n in (first, second, third, fourth)]
        assert found == [signed[0::2], signed[1::2]]


def test_the_assembly_dequantizes_every_int4_byte() -> None:
    """Weights are the exact products, rounded once. The four bytes can have scales of their own."""
    scales = torch.tensor([1.0, -0.0123, 3e-20, 2.5e20]).bfloat16()
    bits = [_bits(scale) for scale in scales]
    for first in range(256):
        of_word = (first, (first * 7 + 3) % 256, first ^ 0x5A, 255 - first)
        word = sum(byte << 8 * i for i, byte in enumerate(of_word))
        given = {"$4": word, "$5": bits[0] | bits[1] << 16, "$6": bits[2] | bits[3] << 16}
        found = _run(gemm.INT4_TO_BF16.value, given, ("$0", "$1", "$2", "$3"))
        halves = torch.tensor([[byte & 15 for byte in of_word], [byte >> 4 for byte in of_word]]) - 8
        assert found == (halves * scales.double()).bfloat16().double().view(4, 2).tolist()


def _run(text: str, given: dict[str, int], wanted: tuple[str, ...]) -> list[list[float]]:
    """The pairs of bf16 values in the registers `wanted`, low half first."""
    known = dict(given)

    def value(name: str) -> int:
        return known[name] if name in known else int(name, 0)

    for line in re.findall(r"^ +([a-z].*);$", text, re.MULTILINE):
        op, target, *names = re.split(r",? +", line)
        a, b, c = (*map(value, names), 0, 0)[:3]
        if op == "fma.rn.bf16x2":
            halves = [_bf16(v & 0xFFFF) for v in (a, b, c)], [_bf16(v >> 16) for v in (a, b, c)]
            low, high = (_bits((x * y + z).bfloat16()) for x, y, z in halves)
            known[target] = low | high << 16
        elif op == "prmt.b32":
            known[target] = sum(((a | b << 32) >> 8 * (c >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            assert op != "lop3.b32" or value(names[3]) == 0xEA
            known[target] = {"mov.b32": a, "and.b32": a & b, "shr.u32": a >> (b & 31), "lop3.b32": a & b | c}[op]
    return [[float(_bf16(known[n] & 0xFFFF)), float(_bf16(known[n] >> 16))] for n in wanted]


def _bf16(bits: int) -> Tensor:
    return (torch.tensor(bits, dtype=torch.int32) << 16).view(torch.float32).double()


def _bits(number: Tensor) -> int:
    return int(number.view(torch.int16)) & 0xFFFF


# --- the registry -----------------------------------------------------------------------------------------------------


@DTYPES
def test_experts_pass_their_self_check(dtype: torch.dtype) -> None:
    """test_triton.py checks the others; for this operation a GPU may prefer torch's grouped GEMM."""
    (backend,) = (b for b in registry.REGISTRY["experts"] if b.name == "triton")
    reference = registry.REGISTRY["experts"][-1].function
    assert find_mismatch(backend.function, reference, self_check_cases.CASES["experts"](DEVICE, dtype)) is None


@pytest.mark.parametrize("plan", ["none", "int8", "int4"])
def test_a_model_through_the_kernels(
    plan: str, monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., TwoTowerForCausalLM]
) -> None:
    """Two rows, a prompt and a block: both towers' logits equal those of the other backends."""
    model = random_model("E-", seed=5, mlp_bias=True).to(DEVICE)
    model = model if plan == "none" else quantize_(model, plan)
    tokens = torch.arange(2 * 9, device=DEVICE).view(2, 9)

    def logits() -> list[Tensor]:
        registry._select.cache_clear()
        state = model.new_state(2, 20)
        return [
            model.extend(tokens, state),
            model.denoise(tokens[:, :4], torch.full((2,), 0.5, device=DEVICE), state.view()),
        ]

    expected = logits()
    used = {"none": ("experts",), "int8": ("experts_int8", "linear_int8"), "int4": ("experts_int4", "linear_int4")}
    for op in ("experts", "experts_int8", "linear_int8", "experts_int4", "linear_int4"):
        (backend,) = (b for b in registry.REGISTRY[op] if b.name == "triton")
        monkeypatch.setitem(
            registry.REGISTRY, op, (replace(backend, unsupported_reason=lambda *_: None, compiled=False),)
        )
    found = logits()
    for op in used[plan]:
        assert registry.select(op, DEVICE, torch.float32).name == "triton"
    monkeypatch.undo()
    registry._select.cache_clear()
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_few_pairs_take_the_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option grouped_pairs, and where grouped GEMM would pad widths; both backends compute the same."""
    usable = tuple(
        replace(b, unsupported_reason=lambda *_: None, compiled=False) if b.name in ("grouped-gemm", "triton") else b
        for b in registry.REGISTRY["experts"]
    )
    monkeypatch.setitem(registry.REGISTRY, "experts", usable)
    monkeypatch.setattr(registry, "_select", registry._select.__wrapped__)

    def name(few: bool) -> str:
        return registry.select("experts", DEVICE, torch.bfloat16, False, few).name

    assert (name(few=False), name(few=True)) == ("grouped-gemm", "triton")
    hidden, choice = torch.zeros(16, 24), torch.zeros(16, 2, dtype=torch.long)
    assert not registry.few_pairs(hidden, choice, 16)  # the default: always grouped GEMM
    assert registry.few_pairs(hidden, choice, 13)
    for pairs, few in ((32, False), (33, True)):
        with options.override(grouped_pairs=pairs):
            assert registry.few_pairs(hidden, choice, 16) == few
    generator = torch.Generator().manual_seed(1)
    hidden, up, down = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 24), (4, 16, 24), (4, 24, 16))
    )
    routed = hidden, torch.rand(5, 4, generator=generator).topk(2).indices, torch.rand(5, 2, generator=generator)
    grouped, triton = (b.function(*routed, None, up, down, "relu2") for b in usable[:2])
    assert (grouped - triton).abs().max() <= 2e-2 * grouped.abs().max()


def test_the_order_of_the_expert_backends() -> None:
    """Triton where torch has no backend that reads selected experts once; never after a backend that copies weights."""
    names = {op: [b.name for b in backends] for op, backends in registry.REGISTRY.items()}
    assert names["experts"][:2] == ["grouped-gemm", "triton"]
    for bits in ("int8", "int4"):
        assert names[f"experts_{bits}"][:2] == ["triton", "grouped-gemm"]
        assert names[f"linear_{bits}"][0] == "triton"
