"""`Replica`: a copy of the context state on the denoiser's device, for towers on two devices.

Once per block, only new data is transferred: keys and values of tokens appended since the last transfer, and the
current Mamba states. One `DeviceTransfer` makes all copies, so that tests can count them.

`view` writes the copy in place, and the denoiser's passes read it in the same stream. A pass therefore never reads a
later text. The data to transfer is gathered in the context tower's stream, before a later `extend` writes to the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.kv_group import KVGroup
from twotower.cache.kv_slots import KVSlots
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
    """A copy of `state` on `device`. `view` brings it up to date.

    layers: the numbers of the layers to copy, for a denoiser that lacks layers; None: all.
    """

    def __init__(
        self,
        state: TowerState,
        device: torch.device,
        transfer: DeviceTransfer,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.state = state
        self.device = device
        self.transfer = transfer
        shared = state.kv_slots.total if state.kv_slots.shared else None
        sizes = state.rows, state.capacity, device, state.dtype, shared, state.longest_pass
        self.copy = TowerState(state.spec, *sizes, layers)
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
            lengths, old_there = self._send(state.lengths), self._send(old)
            for source, target in self._copied_groups():
                _make_room(target, old_there, lengths, width)
                here, there = (
                    _appended_vectors(group.slots, *ends, width)
                    for group, ends in ((source, (old, state.lengths)), (target, (old_there, lengths)))
                )
                self._copy_vectors(source, target, here, there)
            self._copy_states()
            copy.lengths = lengths
        copy.total_appended = state.total_appended
        self.lengths, self.reset_count = state.lengths, state.reset_count

    def _transfer_pending(self, pending: Sequence[PendingTransfer]) -> None:
        self._sync_kv_slots()
        for source, target in self._copied_groups():
            parts = _within_window(target, pending, self.copy.lengths)
            tokens = [(row.slot, token) for row in parts for token in range(row.start, row.end)]
            self._copy_vectors(source, target, *(_vectors(group.slots, tokens) for group in (source, target)))
        slots, ends = [row.slot for row in pending], [row.end for row in pending]
        rows = to_device_async(slots, self.device)
        self._copy_states(to_device_async(slots, self.state.lengths.device), rows)
        self.copy.lengths[rows] = to_device_async(ends, self.device)

    def _sync_kv_slots(self) -> None:
        for source, target in zip(self.state.kv_groups, self.copy.kv_groups, strict=True):
            if target.slots.version != source.slots.version:
                window = target.slots.window  # the copy moves its tokens by itself
                target.slots = source.slots.map(self._send)
                target.slots.window = window

    def _copied_groups(self) -> Iterator[tuple[KVGroup, KVGroup]]:
        """The groups of attention layers of the state and of the copy, of which the copy has a layer."""
        pairs = zip(self.state.kv_groups, self.copy.kv_groups, strict=True)
        return ((source, target) for source, target in pairs if target.layers)

    def _copy_vectors(self, source: KVGroup, target: KVGroup, here: Tensor, there: Tensor) -> None:
        """Copies keys and values from indices `here` of the state to indices `there` of the copy."""
        keys = {layer: pool for layer, _, pool in source.layers}
        for layer, _, into in target.layers:
            into.k[there] = self._send(keys[layer].k[here])
            into.v[there] = self._send(keys[layer].v[here])

    def _copy_states(self, slots: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Copies Mamba states of slots (C,); `rows` is the same tensor on the copy's device. None: of all."""
        states = dict(self.state.mamba_pools)
        for layer, target in self.copy.mamba_pools:
            source = states[layer]
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


def _appended_vectors(slots: KVSlots, old: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Vector indices of each row's tokens old…lengths, (R,) each, at most `width`; the spare vector beyond.

    Slots with a window: of the last tokens only.
    """
    if slots.window is not None:
        old, width = torch.maximum(old, lengths - slots.window.keep), min(width, slots.window.keep)
    tokens = old[:, None] + torch.arange(width, device=old.device)
    return slots.vectors_of(None, tokens, tokens < lengths[:, None]).flatten()


def _make_room(target: KVGroup, old: Tensor, lengths: Tensor, width: int) -> None:
    """Prepares the windows of all rows of a copy for their tokens old…lengths, (R,) each, at most `width`."""
    window = target.slots.window
    if window is not None:
        target.make_room(range(target.slots.rows), old, min(width, window.keep))
        begin = torch.maximum(old, lengths - window.keep)
        window.first = torch.where((begin > old) | (old == 0), begin, window.first)  # nothing of the copy is left


def _within_window(target: KVGroup, pending: Sequence[PendingTransfer], lengths: Tensor) -> list[PendingTransfer]:
    """What the copy needs of these tokens; prepares its windows for them. lengths (R,): of the copy."""
    window = target.slots.window
    if window is None:
        return list(pending)
    parts, new = [], []
    for row in pending:
        begin = max(row.end - window.keep, 0)
        if row.start == 0 or begin > row.start or row.end - row.start > window.longest_pass:
            new.append((row.slot, begin))  # nothing of the copy is left
            window.held[row.slot] = row.end - begin
            parts.append(row._replace(start=begin))
        else:
            parts.append(row)
            target.make_room([row.slot], lengths, row.end - row.start)
    if new:
        slots, begins = zip(*new, strict=True)
        device = window.first.device
        window.first = window.first.index_copy(0, to_device_async(slots, device), to_device_async(begins, device))
    return parts


def _vectors(slots: KVSlots, tokens: Sequence[tuple[int, int]]) -> Tensor:
    """Vector indices of tokens, each a slot and a position."""
    rows, positions = to_device_async(tokens, slots.start.device, torch.long).view(-1, 2, 1).unbind(1)
    return slots.vectors_of(rows[:, 0], positions, torch.ones_like(positions, dtype=torch.bool)).flatten()
