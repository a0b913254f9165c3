"""Time conditioning of the denoiser: adaLN-single, as in PixArt-α.

One small network maps t to (shift, scale, gate); each layer adds its own table to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from twotower.model.linear import Linear
from twotower.model.norm import RMSNorm
from twotower.ops.precision import accumulation_dtype
from twotower.specs import LayerKind

MAX_CACHED_TIMES = 64  # cached values of t; a block of 16 positions has 17
SINUSOID_SIZE = 256
MODULATE_BEFORE_NORM = frozenset("M*PD")  # MoE and MLP layers modulate after the norm


class Modulation(NamedTuple):
    """Shift, scale and gate of one layer, each (B, 1, H)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class LayerModulations(Sequence[Modulation]):
    """The modulation of each layer, in one tensor: parts (B, 3·layers, 1, H)."""

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts
        each = parts.unbind(1)
        self._layers = [Modulation(*each[at : at + 3]) for at in range(0, len(each), 3)]

    @classmethod
    def of(cls, modulation: Sequence[Modulation]) -> LayerModulations:
        """The modulation of each layer as one tensor; a copy if it is not."""
        if isinstance(modulation, LayerModulations):
            return modulation
        return cls(torch.stack([part for layer in modulation for part in layer], 1))

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Modulation]:
        return iter(self._layers)

    @overload
    def __getitem__(self, layer: int) -> Modulation: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Modulation]: ...
    def __getitem__(self, layer: int | slice) -> Modulation | Sequence[Modulation]:
        return self._layers[layer]


def timestep_sinusoid(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t (B,) in [0, 1] → (B, 256): cosines, then sines, of t·1000·exp(−ln(10000)·k/128).

    Computed in at least fp32: in bf16, t·1000 would be off by up to 4.
    """
    acc = accumulation_dtype(dtype)
    half = SINUSOID_SIZE // 2
    k = torch.arange(half, dtype=acc, device=t.device)
    angles = (t.to(acc) * 1000.0)[:, None] * torch.exp(-math.log(10000.0) * k / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimestepEmbedder(nn.Module):
    """Embeds t: sinusoid → Linear, SiLU, Linear."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(SINUSOID_SIZE, hidden), nn.SiLU(), Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(timestep_sinusoid(t, next(self.parameters()).dtype))
        return out


class TimeConditioning(nn.Module):
    """t (B,) → one `Modulation` per layer. The submodules have the names of the released checkpoint."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.t_embedder = TimestepEmbedder(hidden)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(hidden, 3 * hidden))
        self.scale_shift_tables = nn.ParameterList(nn.Parameter(torch.zeros(3, hidden)) for _ in range(layers))
        self._cached: dict[tuple[float, torch.dtype], Tensor] = {}  # valid for `_weights`
        self._weights: list[tuple[int, int]] = []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the identity: shift 0, scale 0, gate 1. A denoiser copied from a backbone then computes the same."""
        for parameter in self.t_block.parameters():
            nn.init.zeros_(parameter)
        for table in self.scale_shift_tables:
            nn.init.zeros_(table)
            with torch.no_grad():
                table[2].fill_(1.0)

    def forward(self, t: Tensor) -> LayerModulations:
        if not len(t) or torch.is_grad_enabled() or t.device.type != "cpu" or torch._C._len_torch_dispatch_stack():
            parts = self._parts(t)
        else:
            self._clear_if_weights_changed()
            rows = [self._cached_parts(value, t) for value in t.tolist()]
            parts = rows[0] if len(rows) == 1 else torch.cat(rows)
        return LayerModulations(parts)

    def of_layer(self, t: Tensor, layer: int) -> Modulation:
        """t (B,) → the `Modulation` of one layer, for work that runs the layers one by one."""
        shared = self.t_block(self.t_embedder(t)).unflatten(-1, self.scale_shift_tables[layer].shape)
        return Modulation(*(shared + self.scale_shift_tables[layer])[:, :, None].unbind(1))

    def _parts(self, t: Tensor) -> Tensor:
        """t (B,) → (B, 3·layers, 1, H): shift, scale and gate of every layer, in one operation."""
        shared: Tensor = self.t_block(self.t_embedder(t)).unflatten(-1, self.scale_shift_tables[0].shape)  # (B, 3, H)
        tables = torch.stack(tuple(self.scale_shift_tables))  # (layers, 3, H)
        return (shared[:, None] + tables).flatten(1, 2)[:, :, None]

    def _cached_parts(self, value: float, like: Tensor) -> Tensor:
        """`_parts` of one t, cached. Computing them takes a fifth of a pass of the bundled model on a CPU."""
        key, cached = (value, like.dtype), self._cached  # another thread may replace the dict meanwhile
        parts = cached.get(key)
        if parts is None:
            parts = cached[key] = self._parts(like.new_tensor([value]))
        return parts

    def _clear_if_weights_changed(self) -> None:
        weights = [(weight.data_ptr(), weight._version) for weight in self.parameters()]
        if weights != self._weights or len(self._cached) > MAX_CACHED_TIMES:
            self._cached, self._weights = {}, weights


def modulated_norm(x: Tensor, norm: RMSNorm | None, kind: LayerKind, modulation: Modulation | None) -> Tensor:
    """The normed and modulated input of a layer's mixer; the order of the two depends on the layer's kind.

    norm: None for a layer that norms only its mixer's output; then x itself is modulated.
    """
    if norm is None:
        return x if modulation is None else x * (1 + modulation.scale) + modulation.shift
    if modulation is None:
        return norm(x)
    return norm(x, (modulation.shift, modulation.scale), "before" if kind in MODULATE_BEFORE_NORM else "after")
