"""`Replica`: a copy of the context state on the denoiser's device, for towers on two devices.

Once per block, only new data is transferred: keys and values of tokens appended since the last transfer, and the
current Mamba states. One `DeviceTransfer` makes all copies, so that tests can count them.

`view` writes the copy in place, and the denoiser's passes read it in the same stream. A pass therefore never reads a
later text. The data to transfer is gathered in the context tower's stream, before a later `extend` writes to the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import ContextView
from twotower.ops.host_transfer import to_device_async


class PendingTransfer(NamedTuple):
    """Tokens start…end of a row that the state has and the replica lacks."""

    slot: int
    start: int
    end: int


class DeviceTransfer:
    """Copies tensors between the devices of the towers."""

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        # Between GPUs, torch runs the copy after the queued work of both streams. Launch it before overlapping passes.
        # A copy to the CPU must block: the host would read the tensor before it arrives.
        return tensor.to(device, non_blocking=device.type != "cpu")


class LocalReader:
    """Access to the state for a denoiser on the same device, in place."""

    def __init__(self, state: TowerState) -> None:
        self.state = state

    def view(self, rows: Tensor | None = None, pending: Sequence[PendingTransfer] | None = None) -> ContextView:
        return self.state.view(rows)

    def select(self, state: TowerState, rows: Tensor) -> LocalReader:
        return LocalReader(state)


class Replica:
    """A copy of `state` on `device`. `view` brings it up to date."""

    def __init__(self, state: TowerState, device: torch.device, transfer: DeviceTransfer) -> None:
        self.state = state
        self.device = device
        self.transfer = transfer
        shared = state.kv_slots.total if state.kv_slots.shared else None
        self.copy = TowerState(state.spec, state.rows, state.capacity, device, state.dtype, shared)
        self.lengths = torch.zeros_like(state.lengths)  # of the copy, on the context tower's device
        self.reset_count = state.reset_count  # of the texts in the copy

    def view(self, rows: Tensor | None = None, pending: Sequence[PendingTransfer] | None = None) -> ContextView:
        """The input of a denoiser pass, for all rows or the given slots (B,), a tensor on the denoiser's device.

        pending: the tokens of these rows that the copy lacks, if the host knows them. None: transfers, for all rows, as
        many tokens as were appended since the last call.
        """
        self.state.commit_state()
        if pending is None:
            self._transfer_appended()
        elif pending:
            self._transfer_pending(pending)
        if self.copy.texts is not None and self.state.texts is not None:
            self.copy.texts.long = self._send(self.state.texts.long)
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
        tokens = [(row.slot, token) for row in pending for token in range(row.start, row.end)]
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
        """Copies keys and values from indices `here` of the state to indices `there` of the copy, and Mamba states.

        slots: (C,), the rows whose Mamba states are copied; `rows` is the same tensor on the copy's device. None: all.
        """
        for (_, keys), (_, into) in zip(self.state.attention_pools, self.copy.attention_pools, strict=True):
            into.k[there] = self._send(keys.k[here])
            into.v[there] = self._send(keys.v[here])
        for (_, source), (_, target) in zip(self.state.mamba_pools, self.copy.mamba_pools, strict=True):
            if slots is None or rows is None:
                target.conv_window = self._send(source.conv_window)
                target.ssm_state = self._send(source.ssm_state)
            else:
                target.conv_window[rows] = self._send(source.conv_window[slots])
                target.ssm_state[rows] = self._send(source.ssm_state[slots])

    def _send(self, tensor: Tensor) -> Tensor:
        return self.transfer.send(tensor, self.device)

    def select(self, state: TowerState, rows: Tensor) -> Replica:
        """A replica of `state`, where `state` has the given rows of this replica's state."""
        out = object.__new__(Replica)
        out.state, out.device, out.transfer = state, self.device, self.transfer
        out.copy = self.copy.select(self._send(rows))
        out.lengths = self.lengths[rows]
        out.reset_count = state.reset_count if self.reset_count is self.state.reset_count else self.reset_count[rows]
        return out


ContextReader = LocalReader | Replica


def _appended_vectors(state: TowerState, old: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Vector indices of each row's tokens old…lengths, (R,) each, at most `width`; the spare vector beyond."""
    tokens = old[:, None] + torch.arange(width, device=old.device)
    return state.kv_slots.vectors_of(None, tokens, tokens < lengths[:, None]).flatten()


def _vectors(state: TowerState, tokens: Sequence[tuple[int, int]]) -> Tensor:
    """Vector indices of tokens, each a slot and a position."""
    slots, positions = to_device_async(tokens, state.lengths.device, torch.long).view(-1, 2, 1).unbind(1)
    return state.kv_slots.vectors_of(slots[:, 0], positions, torch.ones_like(positions, dtype=torch.bool)).flatten()
