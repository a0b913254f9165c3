"""The context's state as the denoiser sees it when the towers sit on different devices.

Once per block only what is new crosses: the K/V columns appended since the last time and the current Mamba
states. Everything that crosses goes through one `Transport`, so crossings can be counted (and forbidden elsewhere).

The copy is written in place by `view` and read by the denoiser's passes, all in the order of one stream, so no pass
sees a later text. What crosses is gathered in the order of the context's stream, before a later `extend` writes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import AttentionPool, ContextView, MambaPool
from twotower.ops.host_transfer import to_device_async


class Fresh(NamedTuple):
    """A row whose text has changed: the copy holds its tokens up to `start`, the state up to `end`."""

    slot: int
    start: int
    end: int


class Transport:
    """Moves tensors between the towers' devices."""

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        # Between GPUs torch runs the copy in the source's stream, after all that the target's has queued, and lets the
        # target's wait for it: safe without a word from us, but to be launched before passes that are to overlap.
        # Towards a CPU it has to wait: the host would read the copy before it is there.
        return tensor.to(device, non_blocking=device.type != "cpu")


class LocalReader:
    """Both towers on one device: the denoiser reads the context's state where it lies."""

    def __init__(self, state: TowerState) -> None:
        self.state = state

    def view(self, rows: Tensor | None = None, fresh: Sequence[Fresh] | None = None) -> ContextView:
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

    def view(self, rows: Tensor | None = None, fresh: Sequence[Fresh] | None = None) -> ContextView:
        """What a pass reads, for all rows or the given slots (B,), which lie on the denoiser's device.

        fresh: where the host knows which of those rows changed since they were last looked at; only that crosses. None:
        all rows are brought up to date, each by as many columns as were appended.
        """
        self.state.settle()
        if fresh is None:
            self._catch_up()
        elif fresh:
            self._bring(fresh)
        self.copy.bound = self.state.bound
        return self.copy.view(rows)

    def _catch_up(self) -> None:
        state, copy = self.state, self.copy
        width = state.appended - copy.appended
        if width or self.texts is not state.texts:
            copy.reserve(state.capacity)
            self._follow_segments()
            old = torch.where(self.texts == state.texts, self.lengths, 0)
            lengths = self._send(state.lengths)
            self._move(_new(state, old, state.lengths, width), _new(copy, self._send(old), lengths, width))
            copy.lengths = lengths
        copy.appended = state.appended
        self.lengths, self.texts = state.lengths, state.texts

    def _bring(self, fresh: Sequence[Fresh]) -> None:
        self._follow_segments()
        tokens = [(row.slot, column) for row in fresh for column in range(row.start, row.end)]
        slots, ends = [row.slot for row in fresh], [row.end for row in fresh]
        here, there = (_vectors(state, tokens) for state in (self.state, self.copy))
        rows = to_device_async(slots, self.device)
        self._move(here, there, to_device_async(slots, self.state.lengths.device), rows)
        self.copy.lengths[rows] = to_device_async(ends, self.device)

    def _follow_segments(self) -> None:
        if self.copy.segments.version != self.state.segments.version:
            self.copy.segments = self.state.segments.map(self._send)

    def _move(self, here: Tensor, there: Tensor, slots: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Keys and values from vectors `here` of the state to `there` of the copy, and the Mamba states of slots (C,),
        which are `rows` on the copy's device (None: of all)."""
        for source, target in zip(self.state.pools, self.copy.pools, strict=True):
            if isinstance(source, AttentionPool) and isinstance(target, AttentionPool):
                target.k[there] = self._send(source.k[here])
                target.v[there] = self._send(source.v[here])
            elif isinstance(source, MambaPool) and isinstance(target, MambaPool):
                if slots is None or rows is None:
                    target.conv_window = self._send(source.conv_window)
                    target.ssm_state = self._send(source.ssm_state)
                else:
                    target.conv_window[rows] = self._send(source.conv_window[slots])
                    target.ssm_state[rows] = self._send(source.ssm_state[slots])

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


def _vectors(state: TowerState, tokens: Sequence[tuple[int, int]]) -> Tensor:
    """The vectors of tokens, each a row and its column there."""
    slots, columns = to_device_async(tokens, state.lengths.device, torch.long).view(-1, 2).unbind(1)
    return state.segments.at(slots, columns[:, None], torch.ones_like(columns, dtype=torch.bool)[:, None]).flatten()
