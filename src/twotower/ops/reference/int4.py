"""Weight-only int4: w[n, k] ≈ scale[n, k // 32] · q[n, k], q in −8…7, a bf16 scale for each row and group of 32 inputs.

A weight takes 4.5 bits. If m is the value of largest magnitude in a group, the scale is −m / 8, −m / 8.5 or m / 7,
whichever has the least squared error. Scales can be negative. q · scale has at most 12 significant bits, so a
dequantised weight is exact in fp32.

Layout: data (…, ⌈out / 16⌉, ⌈in / 32⌉, 288) uint8. A panel has 16 rows, as in int8, and a block has one group of them:

    bytes 0…31      16 scales in bf16, one a row
    bytes 32…287    4 runs of 8 inputs; a run has 4 bytes for each of the 16 rows, so it is (16, 4)
    byte b of these   input b in the low half, input b + 4 in the high half, each as q + 8

Missing rows and inputs have q = 0. The last group may therefore be shorter. A pass over the bytes in their order is a
pass over the weights. A run is one AVX-512 register: a lane has 8 weights of a row, and the low or the high halves of
its bytes are 4 unsigned weights for a dot product with 4 signed bytes (VNNI), in the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import upcast
from twotower.ops.reference.experts import (
    combine,
    expert_mlp,
    group_pairs,
    grouped_product,
    loop_over_experts,
    weighted_sum,
)
from twotower.ops.reference.int8 import CHUNK, CHUNK_GPU, PANEL
from twotower.specs import Activation

GROUP, RUN = 32, 8  # inputs of a group and of a run
SCALES = 2 * PANEL  # bytes of the scales of a block
BLOCK = SCALES + GROUP * PANEL // 2  # bytes
LOW, HIGH = -8, 7
Sized = tuple[Tensor, int]  # data, and the number of outputs, which data does not tell
DIVISORS = (-8.0, -8.5, 7.0)  # candidates for the scale: m / divisor; the first of equal errors counts


def data_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the data of a weight (…, out, in)."""
    *lead, out, width = shape
    return (*lead, -(-out // PANEL), -(-width // GROUP), BLOCK)


def quantize(weight: Tensor) -> Tensor:
    """weight (…, out, in) of any float dtype → data, see the layout."""
    data = torch.empty(data_shape(tuple(weight.shape)), dtype=torch.uint8, device=weight.device)
    quantize_into(data, weight.detach())
    return data


def quantize_into(data: Tensor, weight: Tensor) -> None:
    """Fills data as in `quantize` from weight (…, out, in), which may be on another device, in chunks.

    A group of zeros stays zero. A row with a value that is not finite never gives finite products.
    """
    for panels, rows in _chunks(data, weight):
        grouped = _grouped(rows.to(data.device, torch.float32))
        q, scale = _rounded(grouped)
        panels.copy_(_blocks(q, scale))


def pack_into(data: Tensor, q: Tensor, scale: Tensor) -> None:
    """Fills data from q (…, out, in), any integer dtype, and scale (…, out, ⌈in / 32⌉) in bf16."""
    for (panels, rows), (_, scales) in zip(_chunks(data, q), _chunks(data, scale), strict=True):
        scales = F.pad(scales.to(data.device), (0, 0, 0, len(panels) * PANEL - len(scales)))
        panels.copy_(_blocks(_grouped(rows.to(data.device, torch.int8)), scales.unflatten(0, (-1, PANEL))))


def integers(data: Tensor, out: int, width: int) -> Tensor:
    """q of data as (…, out, width) int8."""
    return _every_integer(data)[..., :out, :width]


def scales(data: Tensor, out: int) -> Tensor:
    """The scales of data as (…, out, ⌈in / 32⌉) bf16."""
    return _every_scale(data)[..., :out, :]


def dequantize(data: Tensor, out: int, width: int, dtype: torch.dtype) -> Tensor:
    """The weight (…, out, width) in `dtype`; exact in fp32 and float64."""
    wide = torch.promote_types(dtype, torch.float32)
    grouped: Tensor = _every_integer(data).to(wide).unflatten(-1, (-1, GROUP))
    weight: Tensor = (grouped * _every_scale(data).to(wide)[..., None]).to(dtype).flatten(-2)
    return weight[..., :out, :width]


def linear(x: Tensor, data: Tensor, out: int, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (…, in), data of a weight (out, in), bias (out,) or None → (…, out)."""
    return F.linear(x, dequantize(data, out, x.shape[-1], x.dtype), bias)


def experts_sorted(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """`experts.experts_sorted` with int4 weights; gate None: experts without a gate.

    gate, up, down: data of (E, width, H), (E, width, H) and (E, H, width). Computes in at least fp32, as the kernels
    do: in bf16 the weights would be rounded too.
    """

    matrices = with_sizes(gate, up, down, width, hidden.shape[1])

    def mlp(expert: int, rows: Tensor) -> Tensor:
        return expert_mlp(rows, *matrices, activation, lambda x, own: linear(x, own[0][expert], own[1]))

    return loop_over_experts(upcast(hidden), topk_ids, weight, len(up), mlp).to(hidden.dtype)


def experts_gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """`experts_sorted` with static shapes and no host read: dequantises the weights of each pair."""
    pairs = topk_ids.flatten()

    def product(x: Tensor, own: Sized) -> Tensor:
        return (dequantize(own[0][pairs], own[1], x.shape[1], x.dtype) @ x[:, :, None])[:, :, 0]

    x = upcast(hidden).repeat_interleave(topk_ids.shape[1], 0)
    out = expert_mlp(x, *with_sizes(gate, up, down, width, hidden.shape[1]), activation, product)
    return weighted_sum(out, weight).to(hidden.dtype)


def experts_grouped(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """`experts_sorted` with grouped GEMMs (bf16 on CUDA), all experts dequantised, one projection at a time.

    Uses `experts_gathered` if there are fewer pairs than experts.
    """
    if topk_ids.numel() < len(up):
        return experts_gathered(hidden, topk_ids, weight, gate, up, down, width, activation)
    order, ends = group_pairs(topk_ids, len(up))

    def product(x: Tensor, own: Sized) -> Tensor:
        return grouped_product(x, dequantize(*own, x.shape[1], x.dtype), ends)

    gathered = hidden[order // topk_ids.shape[1]]
    out = expert_mlp(gathered, *with_sizes(gate, up, down, width, hidden.shape[1]), activation, product)
    return combine(out, order, weight)


def with_sizes(
    gate: Tensor | None, up: Tensor, down: Tensor, width: int, hidden: int
) -> tuple[Sized | None, Sized, Sized]:
    """The matrices of all experts with their numbers of outputs, as `expert_mlp` takes them."""
    return None if gate is None else (gate, width), (up, width), (down, hidden)


# --- the layout -------------------------------------------------------------------------------------------------------


def _chunks(data: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some panels of data and their rows of a matrix, which is (…, out, in) as the weight; none on the meta device."""
    if data.is_meta:
        return
    if data.dim() > 3:
        for parts in zip(data, rows, strict=True):
            yield from _chunks(*parts)
        return
    most = CHUNK_GPU if data.device.type == "cuda" else CHUNK
    many = max(most // (max(data.shape[1], 1) * GROUP * PANEL), 1)
    for i in range(0, len(data), many):
        yield data[i : i + many], rows[i * PANEL : (i + many) * PANEL]


def _grouped(rows: Tensor) -> Tensor:
    """Rows (n, in) → (⌈n / 16⌉, 16, ⌈in / 32⌉, 32), zero where there is no row or input."""
    padded = F.pad(rows, (0, -rows.shape[1] % GROUP, 0, -len(rows) % PANEL))
    return padded.view(len(padded) // PANEL, PANEL, -1, GROUP)


def _blocks(q: Tensor, scale: Tensor) -> Tensor:
    """q (p, 16, g, 32) int8 and scale (p, 16, g) bf16 → (p, g, 288)."""
    halves = (q - LOW).to(torch.uint8).unflatten(-1, (GROUP // RUN, 2, RUN // 2))
    packed = halves[..., 0, :] | halves[..., 1, :] << 4
    of_rows = scale.transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat([of_rows, packed.permute(0, 2, 3, 1, 4).flatten(2)], -1)


def _every_integer(data: Tensor) -> Tensor:
    """q of all rows and inputs, also of those that the weight does not have."""
    runs = data[..., SCALES:].unflatten(-1, (GROUP // RUN, PANEL, 1, RUN // 2))
    q = torch.cat([runs & 15, runs >> 4], -2).to(torch.int8) + LOW
    return q.movedim(-3, -5).flatten(-4).flatten(-3, -2)


def _every_scale(data: Tensor) -> Tensor:
    return data[..., :SCALES].contiguous().view(torch.bfloat16).transpose(-1, -2).flatten(-3, -2)


def _rounded(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (p, 16, g, 32) in fp32 → q and scale."""
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    best = _with_scale(grouped, largest / DIVISORS[0])
    for divisor in DIVISORS[1:]:
        other = _with_scale(grouped, largest / divisor)
        better = other[2] < best[2]
        best = (other[0].where(better, best[0]), other[1].where(better, best[1]), other[2].where(better, best[2]))
    return best[0].nan_to_num(0.0).to(torch.int8), best[1].squeeze(-1)


def _with_scale(grouped: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q in fp32, the scale rounded to bf16, and the squared error of each group."""
    narrow = scale.to(torch.bfloat16) + 0.0  # no negative zero
    wide = narrow.float()
    q = (grouped / wide.where(wide != 0, 1.0)).round_().clamp_(LOW, HIGH)
    return q, narrow, (q * wide - grouped).square_().sum(-1, keepdim=True)
