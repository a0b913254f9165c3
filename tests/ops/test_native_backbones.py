"""The C++ kernels of other backbones against their torch references: every option, rows alone and in batches."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from test_native import CPU, NARROW, SIZES, attention_arguments
from torch import Tensor

from twotower.ops import registry, self_check_cases
from twotower.ops.cpu import kernels, library, moe_kernels
from twotower.ops.reference import int8, rope
from twotower.ops.reference.attention import AttentionOptions
from twotower.ops.reference.experts import experts_dense
from twotower.ops.reference.rope import HeadNorms, Rotation, rotation
from twotower.ops.reference.routing import Routing, route
from twotower.ops.self_check import Case, find_mismatch
from twotower.ops.self_check_inputs import Randn
from twotower.specs import Activation, GateNorm, RopeSpec

if isinstance(library.library(), str):
    pytest.skip(f"the compiled kernels are not tested: {library.library()}", allow_module_level=True)

pytestmark = pytest.mark.code_path
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

# --- attention --------------------------------------------------------------------------------------------------------

OPTIONS = [
    AttentionOptions(window=1), AttentionOptions(window=6), AttentionOptions(window=255), AttentionOptions(window=1024),
    AttentionOptions(scale=0.05, softcap=2.0), AttentionOptions(scale=0.4, window=40, softcap=20.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "length", "causal", "ragged", "dtype"),
    pairwise(OPTIONS, [1, 9, 16, 33], [True, False], [True, False], NARROW),
)
def test_attention_with_any_option(
    options: AttentionOptions, length: int, causal: bool, ragged: bool, dtype: torch.dtype
) -> None:
    """Context lengths around the window, one softmax chunk and one task; heads of a width that is not a vector's."""
    contexts = (0, 5, 6, 41, 256, 1024, 1300)
    q, k, v, token_mask, cached = attention_arguments(length, 6, 2, 40, contexts, ragged)
    q, k, v = (part.to(dtype) for part in (q, k, v))
    cached = cached._replace(k=cached.k.to(dtype), v=cached.v.to(dtype))
    wide = cached._replace(k=cached.k.double(), v=cached.v.double())
    expected = registry.attention.attention(q.double(), k.double(), v.double(), token_mask, causal, wide, options)
    found = kernels.attention(q, k, v, token_mask, causal, cached, options).double()
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_a_query_with_options_is_bit_identical_in_any_batch(options: AttentionOptions, causal: bool) -> None:
    q, k, v, _, cached = attention_arguments(33, 6, 2, 32, (0, 40, 250, 1100))
    lengths = torch.tensor([33, 1, 16, 7])
    token_mask = torch.arange(33) < lengths[:, None]
    together = kernels.attention(q, k, v, token_mask, causal, cached, options)
    for row, length in enumerate(lengths.tolist()):
        part = slice(row, row + 1)
        own = cached._replace(
            start=cached.start[part], stride=cached.stride[part], lengths=cached.lengths[part],
            max_length=int(cached.lengths[row]),
        )  # fmt: skip
        alone = kernels.attention(q[part, :length], k[part, :length], v[part, :length], None, causal, own, options)
        assert torch.equal(alone[0], together[row, :length])
        if causal:
            first = kernels.attention(q[part, :1], k[part, :1], v[part, :1], None, causal, own, options)
            assert torch.equal(first[0, 0], together[row, 0])


@pytest.mark.parametrize("causal", [True, False])
def test_keys_outside_every_window_are_not_read(causal: bool) -> None:
    """They are NaN here, and in the rows of a pool that were freed."""
    q, k, v, _, cached = attention_arguments(9, 4, 2, 24, (40, 300, 2300))
    options = AttentionOptions(window=17)
    expected = kernels.attention(q, k, v, None, causal, cached, options)
    for start, stride, length in zip(*(part.tolist() for part in cached[2:5]), strict=True):
        for head in range(2):
            for pool in (cached.k, cached.v):
                pool[start + head * stride : start + head * stride + length - 16] = torch.nan
    assert expected.isfinite().all()
    assert torch.equal(kernels.attention(q, k, v, None, causal, cached, options), expected)


def test_a_window_ends_at_the_same_key_in_any_block() -> None:
    """A token's output is that of single steps, up to the order of its sums, whatever block it is read in."""
    q, k, v, _, _ = attention_arguments(30, 4, 2, 24, (0,))
    whole = kernels.attention(q, k, v, None, True, None, AttentionOptions(window=7))
    for token in range(30):
        first = max(token - 6, 0)
        own = slice(first, token + 1)
        alone = kernels.attention(q[:, own], k[:, own], v[:, own], None, True)
        torch.testing.assert_close(alone[:, -1], whole[:, token], rtol=1e-5, atol=1e-6)


# --- rotary position embedding ----------------------------------------------------------------------------------------


def turn_of(pairs: int, interleaved: bool, positions: Tensor) -> Rotation:
    frequencies = tuple(10000.0 ** (-i / pairs) for i in range(pairs))
    return rotation(positions, RopeSpec(inverse_frequencies=frequencies, interleaved=interleaved), torch.float32)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "pairs"), [(2, 1), (12, 6), (16, 8), (40, 10), (64, 32), (66, 33), (128, 32)])
def test_norm_and_rotation_of_any_size(
    width: int, pairs: int, interleaved: bool, normed: bool, dtype: torch.dtype
) -> None:
    """Whole heads and parts of them; positions of rows differ; a token is bit-identical alone."""
    randn = Randn(1, CPU)
    q, k = randn(3, 5, 6, width).to(dtype), randn(3, 5, 2, width).to(dtype)
    norms = HeadNorms(randn(width).to(dtype), randn(width).to(dtype), 1e-5, 1.0) if normed else None
    turn = turn_of(pairs, interleaved, torch.arange(5) + torch.tensor([[0], [3], [4000]]))
    wide = turn._replace(cos=turn.cos.double(), sin=turn.sin.double())
    wide_norms = None if norms is None else norms._replace(q=norms.q.double(), k=norms.k.double())
    exact = rope.norm_and_rotate(q.double(), k.double(), wide_norms, wide)
    found = kernels.norm_and_rotate(q, k, norms, turn)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-2
    for actual, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    if not normed:
        assert torch.equal(found[0][..., 2 * pairs :], q[..., 2 * pairs :])
    for row in range(3):
        one, own = (slice(row, row + 1), slice(2, 3)), turn._replace(cos=turn.cos[row, 2:3], sin=turn.sin[row, 2:3])
        alone = kernels.norm_and_rotate(q[one], k[one], norms, own)
        assert torch.equal(alone[0][0, 0], found[0][row, 2])
        assert torch.equal(alone[1][0, 0], found[1][row, 2])


# --- activations, experts, router -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_everywhere(activation: Activation) -> None:
    """Over the range of floats: tails, zeros, infinities; a value does not depend on its place."""
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.tensor([0.0, 1e-30, -1e-30, 80.0, -80.0, 1e8, -1e8])])
    exact = {
        "relu2": F.relu(x.double()).square(), "silu": F.silu(x.double()), "gelu": F.gelu(x.double()),
        "gelu_tanh": F.gelu(x.double(), approximate="tanh"),
    }[activation]  # fmt: skip
    found = kernels.activate(x, None, activation)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-7)
    gated = kernels.activate(torch.full_like(x, 3.0), x, activation)
    assert torch.equal(gated, found * 3.0)
    for start in (1, 5, 17):
        assert torch.equal(kernels.activate(x[start:], None, activation), found[start:])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("packed", [(), ("gate",), ("up", "down"), ("gate", "up", "down")], ids=str)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 33, 21), (19, 48, 64)])
def test_gated_experts_with_any_weights_packed(
    tokens: int, width: int, inner: int, packed: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Equal with and without packed copies up to the order of sums; a token is bit-identical alone."""
    randn = Randn(2, CPU)
    shapes = {"gate": (5, inner, width), "up": (5, inner, width), "down": (5, width, inner)}
    weights = {name: (randn(*shape) / shape[-1] ** 0.5).to(dtype) for name, shape in shapes.items()}
    copies = tuple(kernels.pack(weights[name]) if name in packed else None for name in weights)
    hidden, ids, weight = randn(tokens, width).to(dtype), randn(tokens, 5).argsort(-1)[:, :2], randn(tokens, 2).abs()
    ids = ids.contiguous()
    exact = experts_dense(hidden.double(), ids, weight.double(), *(w.double() for w in weights.values()), "silu")
    found = moe_kernels.experts(hidden, ids, weight, *weights.values(), "silu", copies)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    for token in {0, tokens - 1}:
        own = slice(token, token + 1)
        alone = moe_kernels.experts(hidden[own], ids[own], weight[own], *weights.values(), "silu", copies)
        assert torch.equal(alone[0], found[token])


@pytest.mark.parametrize("dtype", NARROW)
def test_gated_experts_in_int8(dtype: torch.dtype) -> None:
    randn = Randn(3, CPU)
    gate, up, down = (int8.quantize(randn(5, *shape) / 6) for shape in ((21, 33), (21, 33), (33, 21)))
    hidden, ids, weight = randn(7, 33).to(dtype), randn(7, 5).argsort(-1)[:, :2].contiguous(), randn(7, 2).abs()
    wide = [int8.unpack(q, scale, torch.float64) * scale[..., None] for q, scale in (gate, up, down)]
    exact = experts_dense(hidden.double(), ids, weight.double(), *wide, "gelu_tanh")
    found = moe_kernels.experts_int8(hidden, ids, weight, gate, up, down, "gelu_tanh")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    for token in range(7):
        own = slice(token, token + 1)
        alone = moe_kernels.experts_int8(hidden[own], ids[own], weight[own], gate, up, down, "gelu_tanh")
        assert torch.equal(alone[0], found[token])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_routers(normalise: bool, scores: Any, bias: bool) -> None:
    """Softmax scores are stable for large logits; ties go to the lower id."""
    randn = Randn(4, CPU)
    rule = Routing(1, 1, 3, normalise, 1.5, scores)
    weight, chosen = randn(11, 45), randn(11) if bias else None
    for size in (0.1, 1.0, 60.0):
        hidden = randn(9, 45) * size
        ids, weights = moe_kernels.route(hidden, weight, chosen, rule)
        exact_ids, exact = route(
            hidden.double(), weight.double(), None if chosen is None else chosen.double(), rule
        )  # fmt: skip
        if size < 60.0:  # otherwise scores of 0 and 1 are ties in fp32 only
            assert torch.equal(ids, exact_ids)
        torch.testing.assert_close(weights.double(), exact, rtol=1e-4, atol=1e-6)
        alone = moe_kernels.route(hidden[4:5], weight, chosen, rule)
        assert torch.equal(alone[0][0], ids[4])
        assert torch.equal(alone[1][0], weights[4])
    ids, _ = moe_kernels.route(torch.ones(1, 4), torch.ones(6, 4), None, rule)
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(2, 3, 4, 20), (4, 64), (2, 5, 576)])
def test_norms_with_an_offset_over_heads_and_widths(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    randn = Randn(5, CPU)
    x, weight = randn(*shape).to(dtype), (randn(shape[-1]) / 4).to(dtype)
    exact = registry.norm.rms_norm(x.double(), weight.double(), 1e-6, offset=1.0)
    found = kernels.rms_norm(x, weight, 1e-6, offset=1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(kernels.rms_norm(x[-1:], weight, 1e-6, offset=1.0)[0], found[-1])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("norm", ["before_gate", "none"])
@pytest.mark.parametrize("length", [1, 8, 21])
@pytest.mark.parametrize("sizes", SIZES)
def test_mamba_blocks_with_a_norm_before_the_gate_or_none(
    sizes: self_check_cases.Sizes, length: int, norm: GateNorm, dtype: torch.dtype
) -> None:
    """A token is bit-identical alone."""
    *inputs, weights = self_check_cases.mamba_block_arguments(sizes, length, CPU, dtype)
    weights = weights._replace(norm=norm, norm_weight=None if norm == "none" else weights.norm_weight)
    case = Case(norm, lambda: (*inputs, weights))
    assert find_mismatch(kernels.mamba_block, registry.mamba_block.mamba_block, [case]) is None
    projected, _, window, state = inputs
    together, _ = kernels.mamba_block(projected, None, window, state, weights)
    alone, _ = kernels.mamba_block(projected[1:2, :1], None, window[1:2], state[1:2], weights)
    assert torch.equal(alone[0, 0], together[1, 0])
