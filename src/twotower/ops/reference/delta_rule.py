"""The gated delta rule in matrix form (Yang et al. 2024, Gated Delta Networks), on the Mamba-2 recurrence.

    S_i = exp(g_i)·S_{i−1} + w_i ⊗ k_i          S (heads, P, N)
    w_i = β_i·(v_i − exp(g_i)·S_{i−1}·k_i)       what is written: the part of the value that the state lacks
    y_i = S_i·q_i

With the written values w in place of x, k of B, q of C, g of the log decay, and 1 of dt, this is the recurrence of
`ssd`, so its block, its states after any prefix and its step inputs serve here too. The written values of a block solve
a triangular system, and are affine in the state S before the block: w = values − S·keys.

Shapes: v (B, L, H, P); q, k (B, L, G, N), head h reads group h // (H/G); β and g ≤ 0 (B, L, H), both 0 at padding;
dt (B, L, H): 1, and 0 at padding; states (B, H, P, N). Everything is computed in v's dtype, which is at least fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference.running_sum import running_sum
from twotower.ops.reference.ssd import final_state, ssd_block


class DeltaInputs(NamedTuple):
    """The inputs of the recurrence; see the module."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor
    dt: Tensor

    def blocks(self, size: int) -> DeltaInputs:
        """Sequences as blocks of `size` tokens (B·n, size, …), padded at the end."""
        pad = -self.dt.shape[1] % size
        padded = (F.pad(part, (0, 0) * (part.dim() - 2) + (0, pad)) if pad else part for part in self)
        return DeltaInputs(*(part.unflatten(1, (-1, size)).flatten(0, 1) for part in padded))


class WrittenTerms(NamedTuple):
    """The written values of a block are values − S·keys. values (B, L, H, P), keys (B, L, H, N)."""

    values: Tensor
    keys: Tensor

    def after(self, state: Tensor | None) -> Tensor:
        """The written values (B, L, H, P) after a state (B, H, P, N); None: zeros."""
        return self.values if state is None else self.values - torch.einsum("blhn,bhpn->blhp", self.keys, state)


def written_terms(inputs: DeltaInputs, restarts: Tensor | None = None) -> WrittenTerms:
    """The written values of a block, before its state is known.

    restarts (B, L): the number of times that the state has been set to zeros up to each token; None: never.
    """
    k, v = inputs.k, inputs.v
    length, each = k.shape[1], v.shape[2] // k.shape[2]
    decay = running_sum(inputs.log_decay, 1).transpose(1, 2)  # (B, H, L), from the start of the block
    weight = inputs.beta.transpose(1, 2)[..., None]  # (B, H, L, 1)
    seen = decay.exp() if restarts is None else decay.exp() * (restarts == 0)[:, None]
    keys = k.repeat_interleave(each, 2).transpose(1, 2) * (weight * seen[..., None])
    right = torch.cat([v.transpose(1, 2) * weight, keys], dim=-1)
    if length > 1:
        overlaps = torch.einsum("blgn,bmgn->bglm", k, k).repeat_interleave(each, 1)  # (B, H, L, L)
        unseen = torch.ones(length, length, dtype=torch.bool, device=k.device).triu()
        if restarts is not None:
            unseen = unseen | (restarts[:, None, :, None] != restarts[:, None, None, :])
        between = (decay[..., :, None] - decay[..., None, :]).masked_fill(unseen, -torch.inf).exp()
        right = torch.linalg.solve_triangular(weight * overlaps * between, right, upper=False, unitriangular=True)
    values, keys = right.transpose(1, 2).split([v.shape[3], k.shape[3]], dim=-1)
    return WrittenTerms(values, keys)


def delta_rule(inputs: DeltaInputs, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """A sequence in chunks, from `state` (None: zeros) → y and the written values, (B, L, H, P) each."""
    rows, length = inputs.dt.shape[:2]
    if length <= chunk:
        written = written_terms(inputs).after(state)
        return ssd_block(written, inputs.dt, inputs.log_decay, inputs.k, inputs.q, state), written
    chunks = inputs.blocks(chunk)
    before, written = pass_states(chunks, written_terms(chunks), rows, state)
    y = ssd_block(written, chunks.dt, chunks.log_decay, chunks.k, chunks.q, before)
    y, written = (part.unflatten(0, (rows, -1)).flatten(1, 2)[:, :length] for part in (y, written))
    return y, written


def pass_states(
    inputs: DeltaInputs, terms: WrittenTerms, rows: int, state: Tensor | None = None, restarts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B·n, H, P, N), and the written values (B·n, L, H, P).

    inputs and terms have n chunks of each of B = `rows` rows. state (B, H, P, N): before the first chunk (None: zeros).
    restarts (B·n, L): as in `written_terms`; a state is that before the restarts at its chunk's first token. A state
    depends on the state before through a matrix, so there is a loop over the chunks, of two products each.
    """
    heads, width, size = *terms.values.shape[2:], terms.keys.shape[3]
    chunks = len(terms.values) // rows
    decay = running_sum(inputs.log_decay, 1)
    total = decay[:, -1:]
    fed, remains = ((total - decay).exp() * inputs.dt)[..., None], total.exp()[..., None]  # at the end of the chunk
    if restarts is not None:
        last = restarts[:, -1:]
        fed, remains = fed * (restarts == last)[..., None, None], remains * (last == 0)[..., None, None]

    def by_chunk(part: Tensor) -> tuple[Tensor, ...]:
        """(B·n, L, H, …) → n tensors (B·H, L, …)."""
        found: tuple[Tensor, ...] = part.unflatten(0, (rows, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2).unbind()
        return found

    k = inputs.k.repeat_interleave(heads // inputs.k.shape[2], 2)
    steps = zip(*map(by_chunk, (terms.values, terms.keys, k * fed, remains)), strict=True)
    states = [terms.values.new_zeros(rows * heads, width, size) if state is None else state.flatten(0, 1)]
    written = []
    for values, keys, fed_keys, remain in steps:
        now = states[-1]
        written.append(torch.baddbmm(values, keys, now.transpose(1, 2), alpha=-1))
        if len(written) < chunks:
            states.append(torch.baddbmm(now * remain, written[-1].transpose(1, 2), fed_keys))
    before = torch.stack(states).unflatten(1, (rows, heads)).transpose(0, 1).flatten(0, 1)
    return before, torch.stack(written).unflatten(1, (rows, heads)).permute(1, 0, 3, 2, 4).flatten(0, 1)


def packed_states(inputs: DeltaInputs, fresh: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The state before each block of packed rows (B·n, H, P, N), and the written values (B·n, L, H, P).

    inputs: n blocks of each of B rows. fresh (B, n): True where a block starts from a zero state. The loop of
    `pass_states` is over chunks of several blocks, of up to `chunk` tokens, and the states within all chunks follow
    together.
    """
    (rows, blocks), size = fresh.shape, inputs.dt.shape[1]
    each = max(chunk // size, 1)
    rows_of = DeltaInputs(*(part.unflatten(0, (rows, blocks)).flatten(1, 2) for part in inputs))
    starts = F.pad(fresh, (0, -blocks % each)).unflatten(1, (-1, each)).flatten(0, 1)  # (B·chunks, each)
    chunks, restarts = rows_of.blocks(each * size), starts.cumsum(1).repeat_interleave(size, 1)
    now, written = pass_states(chunks, written_terms(chunks, restarts), rows, restarts=restarts)
    states = []
    for i in range(each):
        now = now.masked_fill(starts[:, i, None, None, None], 0.0)
        states.append(now)
        if i + 1 < each:
            at = slice(i * size, (i + 1) * size)
            dt, log_decay, k = (part[:, at] for part in (chunks.dt, chunks.log_decay, chunks.k))
            now = final_state(written[:, at], dt, log_decay, k, now)
    before = torch.stack(states, 1).unflatten(0, (rows, -1)).flatten(1, 2)[:, :blocks]
    written = written.unflatten(1, (each, size)).unflatten(0, (rows, -1)).flatten(1, 2)[:, :blocks]
    return before.flatten(0, 1), written.flatten(0, 1)


def delta_rule_sequential(inputs: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sequential reference: the recurrence as written above, token by token → y and the final state."""
    q, k, v, beta, log_decay, _ = inputs
    each = v.shape[2] // k.shape[2]
    q, k = (part.repeat_interleave(each, 2) for part in (q, k))
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    outputs = []
    for i in range(v.shape[1]):
        state = state * log_decay[:, i, :, None, None].exp()
        written = beta[:, i, :, None] * (v[:, i] - (state * k[:, i, :, None]).sum(-1))
        state = state + written[..., None] * k[:, i, :, None]
        outputs.append((state * q[:, i, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), state
