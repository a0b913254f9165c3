"""The context's state as the denoiser sees it when the towers sit on different devices.

Once per block only what is new crosses: the K/V columns appended since the last time and the current Mamba
states. Everything that crosses goes through one `Transport`, so crossings can be counted (and forbidden elsewhere).
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.state import AttentionPool, ContextView, MambaPool, TowerState


class Transport:
    """Moves tensors between the towers' devices."""

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        # Towards a CPU it has to wait: the host would read the copy before it is there.
        return tensor.to(device, non_blocking=device.type != "cpu")


class LocalReader:
    """Both towers on one device: the denoiser reads the context's state where it lies."""

    def __init__(self, state: TowerState) -> None:
        self.state = state

    def view(self, rows: Tensor | None = None) -> ContextView:
        return self.state.view(rows)

    def select(self, state: TowerState, rows: Tensor) -> LocalReader:
        return LocalReader(state)


class Mirror:
    """A copy of `state` on `device`, brought up to date by `view`."""

    def __init__(self, state: TowerState, device: torch.device, transport: Transport) -> None:
        self.state = state
        self.device = device
        self.transport = transport
        shared = state.segments.columns if state.segments.shared else None
        self.copy = TowerState(state.config, state.rows, state.capacity, device, state.dtype, shared)
        self.lengths = torch.zeros_like(state.lengths)  # on the context's device: how far the copy has come
        self.texts = state.texts  # and of which text

    def view(self, rows: Tensor | None = None) -> ContextView:
        state, copy = self.state, self.copy
        state.settle()
        width = state.appended - copy.appended
        if width or self.texts is not state.texts:
            self._bring(width)
        copy.bound, copy.appended = state.bound, state.appended
        self.lengths, self.texts = state.lengths, state.texts
        return copy.view(None if rows is None else self._send(rows))

    def _bring(self, width: int) -> None:
        state, copy = self.state, self.copy
        copy.reserve(state.capacity)
        if copy.segments.version != state.segments.version:
            copy.segments = state.segments.map(self._send)
        old = torch.where(self.texts == state.texts, self.lengths, 0)
        lengths = self._send(state.lengths)
        here = _new(state, old, state.lengths, width)
        there = _new(copy, self._send(old), lengths, width)
        for source, target in zip(state.pools, copy.pools, strict=True):
            if isinstance(source, AttentionPool) and isinstance(target, AttentionPool):
                target.k[there] = self._send(source.k[here])
                target.v[there] = self._send(source.v[here])
            elif isinstance(source, MambaPool) and isinstance(target, MambaPool):
                target.conv_window = self._send(source.conv_window)
                target.ssm_state = self._send(source.ssm_state)
        copy.lengths = lengths

    def _send(self, tensor: Tensor) -> Tensor:
        return self.transport.send(tensor, self.device)

    def select(self, state: TowerState, rows: Tensor) -> Mirror:
        """The mirror of `state`, which holds the given rows of this one's."""
        out = object.__new__(Mirror)
        out.state, out.device, out.transport = state, self.device, self.transport
        out.copy = self.copy.select(self._send(rows))
        out.lengths = self.lengths[rows]
        out.texts = state.texts if self.texts is self.state.texts else self.texts[rows]
        return out


Reader = LocalReader | Mirror


def _new(state: TowerState, old: Tensor, lengths: Tensor, width: int) -> Tensor:
    """The vectors of each row's columns from old (R,) to lengths (R,), at most `width`; the spare one beyond."""
    columns = old[:, None] + torch.arange(width, device=old.device)
    return state.segments.at(None, columns, columns < lengths[:, None]).flatten()
