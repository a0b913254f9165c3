"""The C++ kernels as functions of tensors, with the signatures of their references in torch.

They support fp32 and bf16. bf16, int8 and int4 weights are upcast in registers, so bf16 weights take half, int8 weights
a quarter and int4 weights a seventh of the memory traffic on every processor. Processors with AVX-512 BF16 multiply
packed bf16 weights in bf16 and add the products in fp32.
The kernels have no gradients; under autograd the references run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower import options
from twotower.ops import cpu_target
from twotower.ops.cpu.library import library
from twotower.ops.cpu.packed_weights import packed_size
from twotower.ops.precision import has_fast_bf16_matmul
from twotower.ops.reference import int4, int8, integer
from twotower.ops.reference.attention import PLAIN, AttentionOptions, CachedKV
from twotower.ops.reference.kv_write import AppendPositions, TensorPair
from twotower.ops.reference.mamba_block import MambaStepInputs, MambaWeights, empty_step_inputs, in_slots
from twotower.ops.reference.norm import Order
from twotower.ops.reference.rope import HeadNorms, Rotation
from twotower.specs import Activation, GateNorm

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
# Largest numbers of tokens at which these kernels beat torch, measured on two AVX-512 cores.
# SMALL_BATCH, one product with unpacked weights: fp32 1.3 to 3 × as fast at 16, equal near 48, half as fast at 128.
# SMALL_BATCH_TOWER, a whole tower in one call against layer by layer: fp32 equal at 128.
# MAX_TOKENS limits the memory of a pass where the kernels are faster at any number of tokens. That is bf16 without bf16
# instructions (1.3 × with AVX-512, 3 × with AVX2), packed bf16 with AVX-512 BF16, and packed fp32 (0.9 to 1.3 × from 64
# tokens on, 1.2 to 2.4 × below).
SMALL_BATCH, SMALL_BATCH_TOWER, MAX_TOKENS = 48, 128, 2048
Storage = Literal["rows", "packed", "quantized"]  # of weights: as torch stores them, a packed copy, int8 or int4
ACTIVATIONS: dict[Activation, int] = {"relu2": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}  # enum Activation
GATE_NORMS: dict[GateNorm, int] = {"after_gate": 0, "before_gate": 1, "none": 2}  # enum GateNorm
_KINDS = {"i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
# i int, l long, f float, p pointer. The first argument is the dtype (0 fp32, 1 bf16), the last the number of threads.
SIGNATURES = {
    "linear_": "ipppppp" + "llli",
    "pack_": "ipplll",
    "experts_": "ippp" + "ppppppppp" + "plllll" + "ii",
    "route_": "ippppp" + "llllll" + "iif",
    "rms_norm_": "iippppp" + "llll" + "iff",
    "activate_": "ippp" + "li",
    "norm_and_rotate_": "ipppppppp" + "lllll" + "iff",
    "mamba_block_": "ippppp" + "pppppp" + "p" + "ppppp" + "lllllll" + "fffi",
    "state_update_": "ilppp" + "lllllll",
    "kv_append_": "ilpppppp" + "llll",
    "argmax_": "ipppplll",
    "tower_": "ippp" + "pppppppl" + "pppppppp" + "i",
    "ar_steps_": "ipplppppp",
    "read_drafts_": "ippppppppp",
    "one_pass_rounds_": "ippppl" + "ppppppp",
    "fill_blocks_": "ippplpp",
    "attention_": "ipppppi" + "pppppp" + "lllll" + "ffl",
}


def cpu_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on a device and dtype, or None."""
    if device.type != "cpu":
        return "needs a CPU device"
    if dtype not in DTYPE_CODES:
        return "supports fp32 and bf16 only"
    found = library()
    return found if isinstance(found, str) else None


def max_tokens(dtype: torch.dtype, storage: Storage, whole_tower: bool = False) -> int:
    """The largest number of tokens at which these kernels are faster than torch.

    dtype: of the tokens. whole_tower: for all layers in one call instead of one product.
    """
    if dtype == torch.bfloat16 and has_fast_bf16_matmul(torch.device("cpu")):
        return MAX_TOKENS if storage == "packed" and multiplies_bf16() and not cpu_target.has_amx() else SMALL_BATCH
    if storage != "rows" or dtype == torch.bfloat16:
        return MAX_TOKENS
    return SMALL_BATCH_TOWER if whole_tower else SMALL_BATCH


def multiplies_bf16() -> bool:
    """Whether the kernels multiply packed bf16 weights in bf16."""
    found = library()
    return not isinstance(found, str) and bool(found.multiplies_bf16())


@cache
def _function(name: str, options_key: str) -> Callable[..., None]:
    """A kernel with its argument types. options_key: `Options.kernels_key` of the options in force."""
    found = library()
    assert not isinstance(found, str)
    function = getattr(found, name)
    function.argtypes = [_KINDS[kind] for kind in SIGNATURES[name] + "i"]
    function.restype = None
    return function


def call(name: str, type_of: Tensor, *arguments: Any) -> None:
    """Calls a kernel for the dtype of `type_of`, with torch's number of threads.

    Tensors are passed as addresses, None as null. The caller keeps the tensors alive and contiguous.
    """
    plain = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    _function(name, options.current().kernels_key)(DTYPE_CODES[type_of.dtype], *plain, torch.get_num_threads())


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """A table of addresses for a kernel. It does not keep the tensors alive."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def can_pack(weight: Tensor) -> bool:
    """Whether a weight can be packed: (…, out, in), contiguous, fp32 or bf16, in host memory."""
    unfit = weight.dim() < 2 or not weight.numel() or not weight.is_contiguous() or weight.is_inference()
    return not unfit and cpu_unsupported_reason(weight.device, weight.dtype) is None


def pack_into(packed: Tensor, weight: Tensor) -> None:
    """Writes the packed copy of a weight (…, out, in). packed: (`packed_size`,)."""
    out, width = weight.shape[-2:]
    call("pack_", weight, weight, packed, weight.numel() // (out * width), out, width)


def pack(weight: Tensor) -> Tensor | None:
    """A packed copy of a weight (…, out, in); None if it cannot be packed."""
    if not can_pack(weight):
        return None
    copy = torch.empty(packed_size(weight), dtype=weight.dtype)
    pack_into(copy, weight)
    return copy


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x (…, in), weight (out, in), bias (out,) or None, packed: the packed weight or None → (…, out)."""
    width = weight.shape[1]
    tokens = x.numel() // width
    limit = max_tokens(x.dtype, "rows" if packed is None else "packed")
    if tokens > limit or not weight.is_contiguous() or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    call("linear_", x, x, weight, packed, None, bias, out, tokens, width, weight.shape[0], 0)
    return out


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `ops.reference.int8.linear`."""
    width, out = int8.weight_shape(q, scale)[::-1]
    tokens = x.numel() // width
    if tokens > max_tokens(x.dtype, "quantized") or not q.is_contiguous():
        return int8.linear(x, q, scale, bias)
    return _linear_quantized(x, q, scale.float(), out, bias, int8_activations=False)


def linear_int4(x: Tensor, data: Tensor, out: int, bias: Tensor | None = None) -> Tensor:
    """As `ops.reference.int4.linear`."""
    width = x.shape[-1]
    tokens = x.numel() // width
    if tokens > max_tokens(x.dtype, "quantized") or not data.is_contiguous():
        return int4.linear(x, data, out, bias)
    return _linear_quantized(x, data, data, out, bias, int8_activations=False)  # the scales are in the data


def linear_w8a8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `ops.reference.integer.linear_w8a8`, with the same bits."""
    if not q.is_contiguous():
        return integer.linear_w8a8(x, q, scale, bias)
    return _linear_quantized(x, q, scale.float(), len(scale), bias, int8_activations=True)


def linear_w4a8(x: Tensor, data: Tensor, out: int, bias: Tensor | None = None) -> Tensor:
    """As `ops.reference.integer.linear_w4a8`, with the same bits."""
    if not data.is_contiguous():
        return integer.linear_w4a8(x, data, out, bias)
    return _linear_quantized(x, data, data, out, bias, int8_activations=True)


def _linear_quantized(
    x: Tensor, packed: Tensor, scale: Tensor, out: int, bias: Tensor | None, int8_activations: bool
) -> Tensor:
    """At most MAX_TOKENS at a time, so that the buffers stay small."""
    width = x.shape[-1]
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    parts = zip(x.view(-1, width).split(MAX_TOKENS), y.view(-1, out).split(MAX_TOKENS), strict=True)
    for tokens, to in parts:
        sizes = len(tokens), width, out, int(int8_activations)
        call("linear_", x, tokens, None, packed, scale, bias, to, *sizes)
    return y


def activate(up: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """As `ops.reference.activation.activate`; rounded once."""
    up, gate = up.contiguous(), None if gate is None else gate.contiguous()
    out = torch.empty_like(up)
    call("activate_", up, up, gate, out, up.numel(), ACTIVATIONS[activation])
    return out


def norm_and_rotate(q: Tensor, k: Tensor, norms: HeadNorms | None, turn: Rotation | None) -> tuple[Tensor, Tensor]:
    """As `ops.reference.rope.norm_and_rotate`; rounded once."""
    q, k = q.contiguous(), k.contiguous()
    cos, sin = (None, None) if turn is None else (part.float().contiguous() for part in (turn.cos, turn.sin))
    weights = (None, None) if norms is None else (norms.q, norms.k)
    outs = torch.empty_like(q), torch.empty_like(k)
    rows, length, heads, width = q.shape
    pairs, interleaved = (0, 0) if turn is None else (turn.cos.shape[-1], int(turn.interleaved))
    eps, offset = (0.0, 0.0) if norms is None else norms[2:]
    sizes = rows * length, heads, k.shape[2], width, pairs, interleaved, eps, offset
    call("norm_and_rotate_", q, q, k, *weights, cos, sin, *outs, *sizes)
    return outs


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    modulation: tuple[Tensor, Tensor] | None = None,
    order: Order = "before",
    offset: float = 0.0,
) -> Tensor:
    """As `ops.reference.norm.rms_norm`."""
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
    sizes = tokens, width, max(each, 1), stride, where
    call("rms_norm_", weight, wide, x, weight, shift, scale, out, *sizes, eps, offset)
    return out


def mamba_block(
    projected: Tensor,
    token_mask: Tensor | None,
    window: Tensor | None,
    state: Tensor | None,
    weights: MambaWeights,
    keep_step_inputs: bool = True,
    slots: Tensor | None = None,
) -> tuple[Tensor, MambaStepInputs | None]:
    """As `ops.reference.mamba_block.mamba_block`."""
    projected = projected.contiguous()
    window, state = in_slots(window, slots), in_slots(state, slots)
    rows, length = projected.shape[:2]
    mixed = projected.new_empty(rows, length, weights.inner)
    kept = None
    if keep_step_inputs:
        xBC = projected.new_empty(rows, length, weights.conv_dim)
        kept = empty_step_inputs(xBC, weights.heads, weights.head_dim, weights.n_groups, weights.state_size)
    token_mask, window, state = (None if part is None else part.contiguous() for part in (token_mask, window, state))
    vectors = [part.float() for part in (weights.dt_bias, weights.A_log, weights.D)]
    heads = weights.heads, weights.head_dim, weights.n_groups, weights.state_size, weights.taps
    call(
        "mamba_block_", projected, projected, token_mask, window, state, None, weights.conv_weight, weights.conv_bias,
        *vectors, weights.norm_weight, mixed, *(kept or [None] * 5), rows, length, *heads, *weights.time_step_limit,
        weights.eps, GATE_NORMS[weights.norm],
    )  # fmt: skip
    return mixed, kept


def state_update(
    pools: Sequence[TensorPair], inputs: Sequence[MambaStepInputs], accepted: Tensor, rows: Tensor | None = None
) -> list[TensorPair]:
    """`ops.reference.mamba_block.state_update` for all layers; the pools change in place."""
    pools = [(window.contiguous(), state.contiguous()) for window, state in pools]
    window, state = pools[0]
    heads, width, size = state.shape[1:]
    count, length, groups = inputs[0].B.shape[:3]
    kept: list[Tensor] = []
    for pair, own in zip(pools, inputs, strict=True):
        kept += [*pair, own.xBC.to(window.dtype).contiguous(), *(part.contiguous() for part in own[1:])]
    table = _addresses(kept)
    call(
        "state_update_", window, len(pools), ctypes.addressof(table), rows, accepted.contiguous(), count, length, heads,
        width, groups, size, window.shape[1] + 1,
    )  # fmt: skip
    return pools


def kv_append(pools: Sequence[TensorPair], new: Sequence[TensorPair], positions: AppendPositions) -> list[TensorPair]:
    """As `ops.reference.kv_write.kv_append`; the pools change in place."""
    pools, kept = list(pools), [part.contiguous() for pair in new for part in pair]
    rows, length, heads, width = kept[0].shape
    into, by = _addresses([part for pair in pools for part in pair]), _addresses(kept)
    positions = AppendPositions(*(part.contiguous() for part in positions))
    call(
        "kv_append_", kept[0], len(kept), ctypes.addressof(into), ctypes.addressof(by), *positions, rows,
        length, heads, width,
    )  # fmt: skip
    return pools


def argmax(logits: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `ops.reference.argmax.argmax`, with the confidence in fp32."""
    logits, excluded = logits.contiguous(), None if excluded is None else excluded.contiguous()
    rows, length, size = logits.shape
    tokens = torch.empty(rows, length, dtype=torch.long)
    confidence = torch.empty(rows, length)
    call("argmax_", logits, logits, excluded, tokens, confidence, rows * length, max(length, 1), size)
    return tokens, confidence


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    causal: bool,
    cached: CachedKV | None = None,
    options: AttentionOptions = PLAIN,
    prefix: Tensor | None = None,
) -> Tensor:
    """As `ops.reference.attention.attention`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    token_mask, prefix = (None if part is None else part.contiguous() for part in (token_mask, prefix))
    past: list[Tensor | None] = [None] * 5
    if cached is not None and cached.max_length:
        past = [cached.k, cached.v, cached.start, cached.stride, cached.lengths]
    out = torch.empty_like(q)
    rows, length, heads, width = q.shape
    sizes = rows, length, heads, k.shape[2], width
    scores = options.scale or 0.0, options.softcap or 0.0, options.window or 0
    call("attention_", q, q, k, v, token_mask, prefix, int(causal), *past, out, *sizes, *scores)
    return out
