"""Triton kernels of experts and int8 products against their torch references, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import triton_mode
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.quantize import quantize_
from twotower.ops import registry, self_check_cases
from twotower.ops.reference import experts, int8
from twotower.ops.self_check import _as_float64 as as_float64
from twotower.ops.self_check import find_mismatch
from twotower.ops.self_check_cases import Randn
from twotower.specs import Activation

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton kernels are not tested: the package triton is not installed", allow_module_level=True)

triton_mode.mend_interpreter()

from twotower.ops.triton import experts as triton_experts  # noqa: E402
from twotower.ops.triton import gemm  # noqa: E402
from twotower.ops.triton import int8 as triton_int8  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KINDS = pytest.mark.parametrize(
    ("dtype", "as_int8"), [(torch.float32, False), (torch.bfloat16, True)], ids=["fp32", "bf16-int8"]
)
INT8 = pytest.mark.parametrize("as_int8", [False, True], ids=["plain", "int8"])


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
    """Weights of `count` experts from `width` to `inner` and back, plain or int8, and the expected results."""

    def __init__(
        self,
        count: int,
        width: int,
        inner: int,
        dtype: torch.dtype,
        as_int8: bool,
        seed: int = 1,
        activation: Activation = "relu2",
        gated: bool = False,
    ) -> None:
        self.randn = Randn(seed, DEVICE)
        self.count, self.width, self.dtype, self.activation = count, width, dtype, activation
        up, down = self.randn(count, inner, width) / width**0.5, self.randn(count, width, inner) / inner**0.5
        gate = self.randn(count, inner, width) * 2 / width**0.5 if gated else None
        self.function = triton_experts.experts_int8 if as_int8 else triton_experts.experts
        self.reference = int8.experts_sorted if as_int8 else experts.experts_sorted
        self.weights: list[Any] = [
            None if one is None else int8.quantize(one) if as_int8 else one.to(dtype) for one in (gate, up, down)
        ]

    def tokens(self, tokens: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, topk_ids, weight."""
        hidden, choice = self.randn(tokens, self.width).to(self.dtype), self.randn(tokens, self.count).argsort(-1)
        return hidden, choice[:, :top], self.randn(tokens, top).abs()

    def __call__(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        return self.function(hidden, choice, weight, *self.weights, self.activation)

    def check(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> None:
        wide = map(as_float64, self.weights)
        expected = self.reference(hidden.double(), choice, weight.double(), *wide, self.activation)
        close(self(hidden, choice, weight), expected, self.dtype)


# --- experts ----------------------------------------------------------------------------------------------------------


@INT8
@DTYPES
@pytest.mark.parametrize(("tokens", "top"), [(1, 3), (6, 1), (40, 3)])
def test_any_number_of_tokens(tokens: int, top: int, dtype: torch.dtype, as_int8: bool) -> None:
    """Seven experts, some unselected; fewer pairs than experts, and more than a tile per expert."""
    mixture = Mixture(7, 40, 24, dtype, as_int8)
    mixture.check(*mixture.tokens(tokens, top))


@INT8
@DTYPES
@pytest.mark.parametrize(("width", "inner"), [(1, 1), (37, 70), (304, 16)])
def test_any_width(width: int, inner: int, dtype: torch.dtype, as_int8: bool) -> None:
    """Sizes that are multiples of tiles and panels or not; several steps per sum; several programs."""
    mixture = Mixture(3, width, inner, dtype, as_int8)
    mixture.check(*mixture.tokens(5, 2))


@INT8
@DTYPES
@pytest.mark.parametrize(
    ("activation", "gated"), [*((activation, True) for activation in get_args(Activation)), ("silu", False)]
)
def test_any_activation(activation: Activation, gated: bool, dtype: torch.dtype, as_int8: bool) -> None:
    """A token; more than a tile per expert; unselected experts; several programs, with a partial last one."""
    mixture = Mixture(5, 37, 70, dtype, as_int8, activation=activation, gated=gated)
    for tokens in (1, 34):
        mixture.check(*mixture.tokens(tokens, 2))


@KINDS
def test_gated_experts_of_one_token_among_others(dtype: torch.dtype, as_int8: bool) -> None:
    mixture = Mixture(6, 40, 24, dtype, as_int8, activation="silu", gated=True)
    hidden, choice, weight = mixture.tokens(20, 3)
    result = mixture(hidden, choice, weight)
    hidden[1] = torch.nan
    assert same(mixture(hidden[2:3], choice[2:3], weight[2:3]), result[2:3])
    found = mixture(hidden, choice, weight)
    assert torch.equal(found[2:], result[2:])
    assert found[1].isnan().all()
    assert mixture(hidden[:0], choice[:0], weight[:0]).shape == (0, 40)


@INT8
@pytest.mark.parametrize("count", [1, 2, 17])
def test_any_number_of_experts(count: int, as_int8: bool) -> None:
    mixture = Mixture(count, 20, 12, torch.float32, as_int8)
    for tokens in (1, count // 2, 10):
        mixture.check(*mixture.tokens(tokens, min(count, 2)))


@INT8
@pytest.mark.parametrize(("tokens", "expert"), [(5, 0), (16, 8), (17, 4), (40, 8)])
def test_one_expert_for_all(tokens: int, expert: int, as_int8: bool) -> None:
    """The first expert, one in the middle, the last."""
    mixture = Mixture(9, 24, 16, torch.bfloat16, as_int8)
    hidden, choice, weight = mixture.tokens(tokens, 1)
    mixture.check(hidden, torch.full_like(choice, expert), weight)


@INT8
def test_no_tokens(as_int8: bool) -> None:
    mixture = Mixture(3, 8, 8, torch.float32, as_int8)
    assert mixture(*mixture.tokens(0, 2)).shape == (0, 8)
    assert torch.equal(mixture(*mixture.tokens(4, 0)), torch.zeros(4, 8, device=DEVICE))


@KINDS
def test_strided_tensors(dtype: torch.dtype, as_int8: bool) -> None:
    mixture = Mixture(5, 24, 16, dtype, as_int8)
    hidden, choice, weight = mixture.tokens(12, 2)
    expected = mixture(hidden, choice.contiguous(), weight)
    wider = mixture.randn(12, 3, 24).to(dtype)
    wider[:, 1] = hidden
    for x in (wider[:, 1], hidden.t().contiguous().t()):
        assert torch.equal(mixture(x, choice, weight.t().contiguous().t()), expected)
    assert torch.equal(mixture(hidden, choice.int(), weight), expected)


@KINDS
@pytest.mark.parametrize("together", [4, 34])
def test_a_tokens_result_does_not_depend_on_its_neighbours(together: int, dtype: torch.dtype, as_int8: bool) -> None:
    """Also if another token is NaN, and in whatever tile the token's pairs are."""
    mixture = Mixture(6, 40, 24, dtype, as_int8)
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


@INT8
@pytest.mark.parametrize("tokens", [1, 30])
def test_unselected_experts_are_not_read(tokens: int, as_int8: bool) -> None:
    """Memory behind the last expert and unused entries of the tile list are not read either."""
    mixture = Mixture(8, 24, 16, torch.float32, as_int8)
    hidden, choice, weight = mixture.tokens(tokens, 2)
    choice = choice % 3 * 2 + 1  # 1, 3 and 5, possibly one of them twice
    expected = mixture(hidden, choice, weight)
    for own in mixture.weights[1:]:
        (own[1] if as_int8 else own)[[0, 2, 4, 6, 7]] = torch.nan
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


def check_linear(tokens: int, width: int, out: int, dtype: torch.dtype, bias: bool) -> None:
    randn = Randn(3, DEVICE)
    x, (q, scale) = randn(2, tokens, width)[:1].to(dtype), int8.quantize(randn(out, width))
    own = randn(out).to(dtype) if bias else None
    expected = int8.linear(x.double(), q, scale.double(), None if own is None else own.double())
    close(triton_int8.linear_int8(x, q, scale, own), expected, dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 17, 70])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (15, 17), (131, 70)])
def test_linear(tokens: int, width: int, out: int, dtype: torch.dtype) -> None:
    check_linear(tokens, width, out, dtype, bias=out == 17)


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1024, 1500])
def test_linear_with_split_k(width: int, bias: bool, dtype: torch.dtype) -> None:
    """Few outputs with long sums: split-K, with a shorter last part."""
    check_linear(3, width, 20, dtype, bias)


def test_split_k_covers_the_sum_and_fills_a_gpu() -> None:
    assert triton_int8.split_k(4096, 42, 128) == (7, 640)
    assert triton_int8.split_k(2688, 2048, 128) == (1, 2688)
    for width in (1, 100, 512, 1500, 3712, 10000):
        for programs in (1, 7, 100, 263, 300):
            parts, part = triton_int8.split_k(width, programs, 128)
            assert (parts - 1) * part < width <= parts * part
            assert part % 128 == 0


@DTYPES
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    randn = Randn(4, DEVICE)
    x, (q, scale) = randn(12, 1100).to(dtype), int8.quantize(randn(40, 1100))
    together = triton_int8.linear_int8(x, q, scale)
    x[3] = torch.nan
    for some in (slice(0, 3), slice(5, 6), slice(4, 12)):
        assert same(triton_int8.linear_int8(x[some], q, scale), together[some])
    wider = torch.cat([x, x], 1)[:, :1100]
    assert same(triton_int8.linear_int8(wider, q, scale)[4:], together[4:])


def test_many_tokens_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "linear", lambda *_: "the reference")
    q, scale = int8.quantize(Randn(5, DEVICE)(3, 4))
    most = triton_int8.MAX_TOKENS
    assert triton_int8.linear_int8(torch.ones(most + 1, 4, device=DEVICE), q, scale) == "the reference"
    assert triton_int8.linear_int8(torch.ones(2, most // 2, 4, device=DEVICE), q, scale) != "the reference"


# --- int8 to bf16 -----------------------------------------------------------------------------------------------------


def test_the_assembly_converts_every_byte() -> None:
    """Evaluates the PTX text by the definition of its instructions: Triton's interpreter cannot run it."""
    text = gemm.INT8_TO_BF16.value
    for first in range(256):
        second, third, fourth = (first * 7 + 3) % 256, first ^ 0x5A, 255 - first
        found = _run(text, first | second << 8 | third << 16 | fourth << 24)
        signed = [n - 256 if n > 127 else n for n in (first, second, third, fourth)]
        assert found == [signed[0::2], signed[1::2]]


def _run(text: str, word: int) -> list[list[float]]:
    """The bf16 values of $0 and $1, low half first, for $2 = `word`."""
    known = {"$2": word}

    def value(name: str) -> int:
        return known[name] if name in known else int(name, 0)

    for line in re.findall(r"^ +([a-z].*);$", text, re.MULTILINE):
        op, target, *given = re.split(r",? +", line)
        if op in ("mov.b32", "shr.u32", "lop3.b32"):
            a, *more = map(value, given)
            if op == "shr.u32":
                a >>= more[0]
            elif op == "lop3.b32":
                assert more[2] == 0xEA  # (a & b) | c
                a = a & more[0] | more[1]
            known[target] = a
        elif op == "fma.rn.bf16x2":
            a, b, c = (torch.tensor([v & 0xFFFF, v >> 16], dtype=torch.int32) for v in map(value, given))
            exact = _bf16(a) * _bf16(b) + _bf16(c)
            assert torch.equal(exact.bfloat16().double(), exact)
            low, high = exact.bfloat16().view(torch.int16).int().bitwise_and(0xFFFF).tolist()
            known[target] = low | high << 16
        else:
            assert op == ".reg", line
    return [_bf16(torch.tensor([known[n] & 0xFFFF, known[n] >> 16], dtype=torch.int32)).tolist() for n in ("$0", "$1")]


def _bf16(bits: Tensor) -> Tensor:
    return (bits << 16).view(torch.float32).double()


# --- the compiler ----------------------------------------------------------------------------------------------------


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Compiles each kernel for an H100, as its wrapper launches it; needs no GPU."""
    assert triton_mode.compiled("products", cache_dir=tmp_path) == {
        "_group_kernel", "_expert_kernel", "_combine_kernel", "_linear_kernel", "_reduce_splits_kernel",
    }  # fmt: skip


# --- the registry -----------------------------------------------------------------------------------------------------


@DTYPES
def test_experts_pass_their_self_check(dtype: torch.dtype) -> None:
    """test_triton.py checks the others; for this operation a GPU may prefer torch's grouped GEMM."""
    (backend,) = (b for b in registry.REGISTRY["experts"] if b.name == "triton")
    reference = registry.REGISTRY["experts"][-1].function
    assert find_mismatch(backend.function, reference, self_check_cases.CASES["experts"](DEVICE, dtype)) is None


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_through_the_kernels(
    quantized: bool, monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., TwoTowerForCausalLM]
) -> None:
    """Two rows, a prompt and a block: both towers' logits equal those of the other backends."""
    model = random_model("E-", seed=5, mlp_bias=True).to(DEVICE)
    model = quantize_(model) if quantized else model
    tokens = torch.arange(2 * 9, device=DEVICE).view(2, 9)

    def logits() -> list[Tensor]:
        registry._select.cache_clear()
        state = model.new_state(2, 20)
        return [
            model.extend(tokens, state),
            model.denoise(tokens[:, :4], torch.full((2,), 0.5, device=DEVICE), state.view()),
        ]

    expected = logits()
    for op in ("experts", "experts_int8", "linear_int8"):
        (backend,) = (b for b in registry.REGISTRY[op] if b.name == "triton")
        monkeypatch.setitem(
            registry.REGISTRY, op, (replace(backend, unsupported_reason=lambda *_: None, compiled=False),)
        )
    found = logits()
    for op in ("experts_int8", "linear_int8") if quantized else ("experts",):
        assert registry.select(op, DEVICE, torch.float32).name == "triton"
    monkeypatch.undo()
    registry._select.cache_clear()
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_expert_backends() -> None:
    """Triton where torch has no backend that reads selected experts once; never after a backend that copies weights."""
    names = {op: [b.name for b in backends] for op, backends in registry.REGISTRY.items()}
    assert names["experts"][:2] == ["grouped-gemm", "triton"]
    assert names["experts_int8"][:2] == ["triton", "grouped-gemm"]
    assert names["linear_int8"][0] == "triton"
