"""The compiled kernels as functions of tensors, with the signatures of their torch references.

fp32 and bf16 (widened in registers: bf16 weights cost half the reading, int8 a quarter, whatever the processor's own
arithmetic for them). None builds a graph: under autograd the references work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower import options
from twotower.ops.cpu import packed_weights
from twotower.ops.cpu.library import library
from twotower.ops.precision import has_fast_bf16_matmul
from twotower.ops.reference import experts as torch_experts
from twotower.ops.reference import int8
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.experts import PackedPair
from twotower.ops.reference.kv_write import AppendPositions, TensorPair
from twotower.ops.reference.mamba_block import MambaStepInputs, MambaWeights, empty_step_inputs
from twotower.ops.reference.norm import Order
from twotower.ops.reference.routing import Routing

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
# Tokens up to which reading the weights once, row by row, beats a blocked matrix product (fp32 on two AVX-512 cores:
# 1.3 to 3 × at 16, equal near 48, half as fast at 128); and tokens up to which a whole tower in one call beats the
# layers one by one, whose products may be faster (fp32: equal at 128). Where the processor only emulates bf16, products
# that widen the weights in registers are faster than torch's at any number (1.3 × with AVX-512, 3 × with AVX2). So are
# those with packed weights in fp32 (0.9 to 1.3 × from 64 tokens on, 1.2 to 2.4 × below); the limit is for the memory
# that a pass takes.
SMALL_BATCH, SMALL_BATCH_TOWER, MAX_TOKENS = 48, 128, 2048
_KINDS = {"i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
# i int, l long, f float, p pointer; each begins with the type (0 fp32, 1 bf16) and ends with the number of threads.
SIGNATURES = {
    "linear_": "ipppppplll",
    "pack_": "ipplll",
    "experts_": "ippppppppppl" + "llll",
    "route_": "ippppp" + "llllll" + "if",
    "rms_norm_": "iippppp" + "llll" + "if",
    "mamba_block_": "ippppp" + "pppppp" + "p" + "ppppp" + "lllllll" + "fff",
    "state_update_": "ilppp" + "lllllll",
    "kv_append_": "ilpppppp" + "llll",
    "argmax_": "ipppplll",
    "tower_": "ippp" + "pppppp" + "ippp" + "p" + "ffff",
    "attention_": "ippppi" + "pppppp" + "lllll",
}


def cpu_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve, or None."""
    if device.type != "cpu":
        return "needs host memory"
    if dtype not in DTYPE_CODES:
        return "takes fp32 and bf16"
    found = library()
    return found if isinstance(found, str) else None


def max_tokens(dtype: torch.dtype, whole_tower: bool = False, packed: bool = False) -> int:
    """Tokens up to which these kernels are faster than torch's, one product or (at once) a whole tower, with weights as
    they lie or packed."""
    if dtype == torch.bfloat16 and has_fast_bf16_matmul(torch.device("cpu")):
        return SMALL_BATCH
    if packed or dtype == torch.bfloat16:
        return MAX_TOKENS
    return SMALL_BATCH_TOWER if whole_tower else SMALL_BATCH


@cache
def _function(name: str, options_key: str) -> Callable[..., None]:
    """options_key: `Options.kernels_key` of the options in force."""
    found = library()
    assert not isinstance(found, str)
    function = getattr(found, name)
    function.argtypes = [_KINDS[kind] for kind in SIGNATURES[name] + "i"]
    function.restype = None
    return function


def call(name: str, type_of: Tensor, *arguments: Any) -> None:
    """Tensors go as addresses, None as null; whoever calls keeps them alive and contiguous."""
    plain = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    _function(name, options.current().kernels_key)(DTYPE_CODES[type_of.dtype], *plain, torch.get_num_threads())


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """A table for a kernel; it does not keep the tensors alive."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def pack(weight: Tensor) -> Tensor | None:
    """The packed copy of a weight (…, out, in); None unless it is contiguous fp32 or bf16 in host memory."""
    unfit = weight.dim() < 2 or not weight.numel() or not weight.is_contiguous() or weight.is_inference()
    if unfit or cpu_unsupported_reason(weight.device, weight.dtype) is not None:
        return None
    copy = torch.empty(packed_weights.packed_size(weight), dtype=weight.dtype)
    out, width = weight.shape[-2:]
    call("pack_", weight, weight, copy, weight.numel() // (out * width), out, width)
    return copy


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x (…, in), weight (out, in), bias (out,) or None, packed: the packed weight, if there is one → (…, out)."""
    width = weight.shape[1]
    tokens = x.numel() // width
    if tokens > max_tokens(x.dtype, packed=packed is not None) or not weight.is_contiguous() or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    call("linear_", x, x, weight, packed, None, bias, out, tokens, width, weight.shape[0])
    return out


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `kernels.int8.linear`."""
    width, out = int8.weight_shape(q, scale)[::-1]
    tokens = x.numel() // width
    if tokens > max_tokens(x.dtype, packed=True) or not q.is_contiguous():
        return int8.linear(x, q, scale, bias)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    call("linear_", x, x, None, q, scale.float(), bias, y, tokens, width, out)
    return y


def experts(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor, packed: PackedPair = (None, None)
) -> Tensor:
    """hidden (T, H); choice (T, k); weight (T, k); up (E, I, H); down (E, H, I); packed: both packed → (T, H)."""
    most = max_tokens(hidden.dtype, packed=all(part is not None for part in packed))
    if choice.numel() > most * up.shape[0]:  # as many tokens for an average expert
        return torch_experts.experts_sorted(hidden, choice, weight, up, down)
    hidden, choice, weight = hidden.contiguous(), choice.contiguous(), weight.float().contiguous()
    out = torch.empty_like(hidden)
    matrices = up, packed[0], None, down, packed[1], None
    call("experts_", hidden, hidden, choice, weight, *matrices, out, *choice.shape, *up.shape)
    return out


def experts_int8(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """See `kernels.int8.experts_sorted`."""
    if choice.numel() > max_tokens(hidden.dtype, packed=True) * len(up):
        return int8.experts_sorted(hidden, choice, weight, up, up_scale, down, down_scale)
    hidden, choice, weight = hidden.contiguous(), choice.contiguous(), weight.float().contiguous()
    out = torch.empty_like(hidden)
    matrices = None, up, up_scale.float(), None, down, down_scale.float()
    call("experts_", hidden, hidden, choice, weight, *matrices, out, *choice.shape, *int8.weight_shape(up, up_scale))
    return out


def route(hidden: Tensor, weight: Tensor, bias: Tensor, rule: Routing) -> tuple[Tensor, Tensor]:
    """hidden (T, H), weight (E, H), bias (E,) → expert ids (T, k), their weights (T, k); the lower id wins a tie."""
    hidden, bias = hidden.contiguous(), bias.float()
    tokens = len(hidden)
    choice = torch.empty(tokens, rule.top, dtype=torch.long)
    chosen = torch.empty(tokens, rule.top)
    call(
        "route_", hidden, hidden, weight, bias, choice, chosen, tokens, *weight.shape[::-1],
        rule.n_group, rule.topk_group, rule.top, int(rule.normalise), rule.factor,
    )  # fmt: skip
    return choice, chosen


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, modulation: tuple[Tensor, Tensor] | None = None, order: Order = "before"
) -> Tensor:
    """x (B, L, H), weight (H,), modulation: shift and scale (B, 1, H) → (B, L, H) in weight's dtype."""
    x = x.contiguous()
    width = weight.shape[0]
    tokens = x.numel() // width
    out = x.new_empty(x.shape, dtype=weight.dtype)
    shift, scale, each, stride, where = None, None, 1, 0, 0
    if modulation is not None:
        shift, scale = modulation
        if shift.stride(-1) != 1 or shift.stride() != scale.stride():
            shift, scale = shift.contiguous(), scale.contiguous()
        each, stride, where = tokens // max(len(shift), 1), shift.stride(0), 1 if order == "before" else 2
    wide = int(x.dtype != weight.dtype)
    call("rms_norm_", weight, wide, x, weight, shift, scale, out, tokens, width, max(each, 1), stride, where, eps)
    return out


def mamba_block(
    projected: Tensor,
    valid: Tensor | None,
    window: Tensor | None,
    state: Tensor | None,
    weights: MambaWeights,
    keep_inputs: bool = True,
) -> tuple[Tensor, MambaStepInputs | None]:
    """See `ops.reference.mamba_block.mamba_block`."""
    projected = projected.contiguous()
    rows, length = projected.shape[:2]
    mixed = projected.new_empty(rows, length, weights.inner)
    kept = None
    if keep_inputs:
        xBC = projected.new_empty(rows, length, weights.conv_dim)
        kept = empty_step_inputs(xBC, weights.heads, weights.head_dim, weights.n_groups, weights.state_size)
    valid, window, state = (None if part is None else part.contiguous() for part in (valid, window, state))
    vectors = [part.float() for part in (weights.dt_bias, weights.A_log, weights.D)]
    call(
        "mamba_block_", projected, projected, valid, window, state, None, weights.conv_weight, weights.conv_bias,
        *vectors, weights.norm_weight, mixed, *(kept or [None] * 5), rows, length, weights.heads, weights.head_dim,
        weights.n_groups, weights.state_size, weights.taps, *weights.time_step_limit, weights.eps,
    )  # fmt: skip
    return mixed, kept


def state_update(
    pools: Sequence[TensorPair], inputs: Sequence[MambaStepInputs], accepted: Tensor, rows: Tensor | None = None
) -> list[TensorPair]:
    """`ops.reference.mamba_block.state_update` of each layer's pools and trace; the pools change in place."""
    pools = [(window.contiguous(), state.contiguous()) for window, state in pools]
    window, state = pools[0]
    heads, width, size = state.shape[1:]
    count, length, groups = inputs[0].B.shape[:3]
    kept = [part for pair, own in zip(pools, inputs, strict=True) for part in (
        *pair, own.xBC.to(window.dtype).contiguous(), *(part.contiguous() for part in own[1:]),
    )]  # fmt: skip
    table = _addresses(kept)
    call(
        "state_update_", window, len(pools), ctypes.addressof(table), rows, accepted.contiguous(), count, length, heads,
        width, groups, size, window.shape[1] + 1,
    )  # fmt: skip
    return pools


def kv_append(pools: Sequence[TensorPair], new: Sequence[TensorPair], positions: AppendPositions) -> list[TensorPair]:
    """See `ops.reference.kv_write.kv_append`; the pools change in place."""
    pools, kept = list(pools), [part.contiguous() for pair in new for part in pair]
    rows, length, heads, width = kept[0].shape
    into, by = _addresses([part for pair in pools for part in pair]), _addresses(kept)
    positions = AppendPositions(*(part.contiguous() for part in positions))
    call(
        "kv_append_", kept[0], len(kept), ctypes.addressof(into), ctypes.addressof(by), *positions, rows * length,
        length, heads, width,
    )  # fmt: skip
    return pools


def argmax(logits: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits (B, L, V), excluded (B,) or None → tokens (B, L) and confidence (B, L) fp32."""
    logits, excluded = logits.contiguous(), None if excluded is None else excluded.contiguous()
    rows, length, size = logits.shape
    tokens = torch.empty(rows, length, dtype=torch.long)
    confidence = torch.empty(rows, length)
    call("argmax_", logits, logits, excluded, tokens, confidence, rows * length, max(length, 1), size)
    return tokens, confidence


def attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, causal: bool, cached: CachedKV | None = None
) -> Tensor:
    """See `ops.reference.attention.attention`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    valid = None if valid is None else valid.contiguous()
    past: list[Tensor | None] = [None] * 5
    if cached is not None and cached.max_length:
        past = [cached.k, cached.v, cached.start, cached.stride, cached.lengths]
    out = torch.empty_like(q)
    rows, length, heads, width = q.shape
    call("attention_", q, q, k, v, valid, int(causal), *past, out, rows, length, heads, k.shape[2], width)
    return out
