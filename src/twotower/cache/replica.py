"""The context's state as the denoiser sees it when the towers sit on different devices.

Once per block only what is new crosses: the K/V columns appended since the last time and the current Mamba
states. One `DeviceTransfer` makes all copies, so a test can count them.

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


class PendingTransfer(NamedTuple):
    """A row whose text has changed: the copy holds its tokens up to `start`, the state up to `end`."""

    slot: int
    start: int
    end: int


class DeviceTransfer:
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

    def view(self, rows: Tensor | None = None, pending: Sequence[PendingTransfer] | None = None) -> ContextView:
        return self.state.view(rows)

    def select(self, state: TowerState, rows: Tensor) -> LocalReader:
        return LocalReader(state)


class Replica:
    """A copy of `state` on `device`, brought up to date by `view`."""

    def __init__(self, state: TowerState, device: torch.device, transfer: DeviceTransfer) -> None:
        self.state = state
        self.device = device
        self.transfer = transfer
        shared = state.kv_slots.total if state.kv_slots.shared else None
        self.copy = TowerState(state.config, state.rows, state.capacity, device, state.dtype, shared)
        self.lengths = torch.zeros_like(state.lengths)  # on the context's device: how far the copy has come
        self.reset_count = state.reset_count  # and of which text

    def view(self, rows: Tensor | None = None, pending: Sequence[PendingTransfer] | None = None) -> ContextView:
        """What a pass reads, for all rows or the given slots (B,), which lie on the denoiser's device.

        pending: the tokens of those rows that the copy lacks, if the host knows them. None: all rows are brought up to
        date, each by as many tokens as were appended.
        """
        self.state.commit_state()
        if pending is None:
            self._transfer_appended()
        elif pending:
            self._transfer_pending(pending)
        self.copy.max_seq_len = self.state.max_seq_len
        return self.copy.view(rows)

    def _transfer_appended(self) -> None:
        state, copy = self.state, self.copy
        width = state.total_appended - copy.total_appended
        if width or self.reset_count is not state.reset_count:
            copy.reserve(state.capacity)
            self._sync_kv_slots()
            old = torch.where(self.reset_count == state.reset_count, self.lengths, 0)
            lengths = self._send(state.lengths)
            self._copy_vectors(
                _appended_vectors(state, old, state.lengths, width),
                _appended_vectors(copy, self._send(old), lengths, width),
            )
            copy.lengths = lengths
        copy.total_appended = state.total_appended
        self.lengths, self.reset_count = state.lengths, state.reset_count

    def _transfer_pending(self, pending: Sequence[PendingTransfer]) -> None:
        self._sync_kv_slots()
        tokens = [(row.slot, column) for row in pending for column in range(row.start, row.end)]
        slots, ends = [row.slot for row in pending], [row.end for row in pending]
        here, there = (_vectors(state, tokens) for state in (self.state, self.copy))
        rows = to_device_async(slots, self.device)
        self._copy_vectors(here, there, to_device_async(slots, self.state.lengths.device), rows)
        self.copy.lengths[rows] = to_device_async(ends, self.device)

    def _sync_kv_slots(self) -> None:
        if self.copy.kv_slots.version != self.state.kv_slots.version:
            self.copy.kv_slots = self.state.kv_slots.map(self._send)

    def _copy_vectors(
        self, here: Tensor, there: Tensor, slots: Tensor | None = None, rows: Tensor | None = None
    ) -> None:
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
        return self.transfer.send(tensor, self.device)

    def select(self, state: TowerState, rows: Tensor) -> Replica:
        """The replica of `state`, which holds the given rows of this one's."""
        out = object.__new__(Replica)
        out.state, out.device, out.transfer = state, self.device, self.transfer
        out.copy = self.copy.select(self._send(rows))
        out.lengths = self.lengths[rows]
        out.reset_count = state.reset_count if self.reset_count is self.state.reset_count else self.reset_count[rows]
        return out


ContextReader = LocalReader | Replica


def _appended_vectors(state: TowerState, old: Tensor, lengths: Tensor, width: int) -> Tensor:
    """The vectors of each row's columns from old (R,) to lengths (R,), at most `width`; the spare one beyond."""
    columns = old[:, None] + torch.arange(width, device=old.device)
    return state.kv_slots.vectors_of(None, columns, columns < lengths[:, None]).flatten()


def _vectors(state: TowerState, tokens: Sequence[tuple[int, int]]) -> Tensor:
    """The vectors of tokens, each a row and its column there."""
    slots, columns = to_device_async(tokens, state.lengths.device, torch.long).view(-1, 2).unbind(1)
    return state.kv_slots.vectors_of(
        slots, columns[:, None], torch.ones_like(columns, dtype=torch.bool)[:, None]
    ).flatten()
