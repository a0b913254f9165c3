"""The Mamba-2 state-space recurrence in matrix form (SSD), Dao & Gu 2024.

    h_i = exp(dt_i·A)·h_{i−1} + dt_i·B_i ⊗ x_i          h (heads, P, N)
    y_i = C_i·h_i

A block of L tokens is one chunk: three matrix products, no loop over tokens. Longer sequences are cut into
chunks, and one more small product passes the states from chunk to chunk. `ssd_sequential` is the reference.

Shapes: x (B, L, H, P); dt (B, L, H) and log_decay = dt·A ≤ 0 (B, L, H), both 0 at padding (the state passes
through unchanged); B, C (B, L, G, N), head h reads group h // (H/G); states (B, H, P, N). Everything is computed
in dt's dtype (at least fp32: long contexts make the state O(1e3) and bf16 scans overflow).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference.running_sum import running_sum


def ssd_block(x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> Tensor:
    """One chunk, starting from `state` (None: zeros) → y (B, L, H, P). Does not compute the state after the chunk."""
    groups, heads_per_group = B.shape[2], x.shape[2] // B.shape[2]
    decay = running_sum(log_decay, 1).transpose(1, 2)  # (B, H, L), from the chunk's start
    scores = torch.einsum("blgn,bmgn->bglm", C, B).repeat_interleave(heads_per_group, 1)  # (B, H, L, L)
    weights = scores * _causal_decay(decay) * dt.transpose(1, 2)[:, :, None]
    y = (weights @ x.transpose(1, 2)).transpose(1, 2)  # (B, L, H, P)
    if state is not None:
        seen = torch.einsum("blgn,bgkpn->blgkp", C, state.unflatten(1, (groups, heads_per_group))).flatten(2, 3)
        y = y + seen * decay.transpose(1, 2).exp()[..., None]
    return y


def final_state(x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, state: Tensor | None) -> Tensor:
    """The SSM state after the L tokens → (B, H, P, N), in one matrix product over L."""
    groups, heads_per_group = B.shape[2], x.shape[2] // B.shape[2]
    decay = running_sum(log_decay, 1)  # (B, L, H)
    total = decay[:, -1:]
    fed = x * ((total - decay).exp() * dt)[..., None]  # (B, L, H, P), decayed to the end of the block
    new = torch.einsum("blgkp,blgn->bgkpn", fed.unflatten(2, (groups, heads_per_group)), B).flatten(1, 2)
    if state is None:
        return new
    return state * total[:, 0, :, None, None].exp() + new


def ssd_chunked(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """A long sequence in chunks → y (B, L, H, P) and the state before each chunk (B, ⌈L/chunk⌉, H, P, N)."""
    rows, length = x.shape[:2]
    pad = -length % chunk
    if pad:  # with dt = 0 padding does not change the state
        x, dt, log_decay, B, C = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad)) for v in (x, dt, log_decay, B, C))
    chunks = x.shape[1] // chunk  # moved into the batch dimension
    x, dt, log_decay, B, C = (v.unflatten(1, (chunks, chunk)).flatten(0, 1) for v in (x, dt, log_decay, B, C))
    added = final_state(x, dt, log_decay, B, None).unflatten(0, (rows, chunks))  # (rows, chunks, H, P, N)
    before = pass_states(added, log_decay.sum(1).unflatten(0, (rows, chunks)), state)
    y = ssd_block(x, dt, log_decay, B, C, before.flatten(0, 1)).unflatten(0, (rows, chunks)).flatten(1, 2)
    return y[:, :length], before


def pass_states(added: Tensor, totals: Tensor, state: Tensor | None, fresh: Tensor | None = None) -> Tensor:
    """The state before each of n chunks → (B, n, H, P, N).

    added (B, n, H, P, N): the state that each chunk adds, from zero. totals (B, n, H): each chunk's summed log decay.
    state (B, H, P, N): before the first chunk (None: zeros). fresh (B, n): True where a chunk starts from a zero state.
    Beyond 64 chunks, chunks are combined within groups first and then across groups: at most n·√n work, no loop.
    """
    rows, n = added.shape[:2]
    first = torch.zeros_like(added[:, :1]) if state is None else state[:, None]
    arriving = torch.cat([first, added[:, :-1]], dim=1)  # what each chunk gets from the chunk before
    passing = F.pad(totals[:, :-1], (0, 0, 1, 0))  # its log decay until then
    if fresh is not None:
        arriving = arriving * ~fresh[:, :, None, None, None]
        passing = passing.masked_fill(fresh[..., None], -torch.inf)
    group = n if n <= 64 else math.isqrt(n - 1) + 1
    pad = -n % group
    if pad:
        arriving, passing = F.pad(arriving, (0, 0) * 3 + (0, pad)), F.pad(passing, (0, 0, 0, pad))
    groups = (n + pad) // group
    grouped = arriving.unflatten(1, (groups, group)).flatten(0, 1)
    decay = passing.unflatten(1, (groups, group)).flatten(0, 1)  # (B·groups, group, H)
    within = torch.einsum("bhij,bjhpn->bihpn", _segment_decay(decay.transpose(1, 2)), grouped)
    if group == n:
        return within
    # `within` has only contributions of the chunk's own group: add those of earlier groups.
    ends, whole = within[:, -1].unflatten(0, (rows, groups)), decay.sum(1).unflatten(0, (rows, groups))
    carried = pass_states(ends, whole, None).flatten(0, 1)
    spread = running_sum(decay, 1).exp()[..., None, None] * carried[:, None]
    states: Tensor = (within + spread).unflatten(0, (rows, groups)).flatten(1, 2)[:, :n]
    return states


def ssd_sequential(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sequential reference: the recurrence as written above, token by token → y and the final state."""
    rows, length, heads, width = x.shape
    B, C = (v.repeat_interleave(heads // v.shape[2], 2) for v in (B, C))
    h = x.new_zeros(rows, heads, width, B.shape[-1]) if state is None else state
    ys = []
    for i in range(length):
        fed = dt[:, i, :, None, None] * x[:, i, ..., None] * B[:, i, :, None]
        h = h * log_decay[:, i, :, None, None].exp() + fed
        ys.append((h * C[:, i, :, None]).sum(-1))
    return torch.stack(ys, dim=1), h


def _causal_decay(decay: Tensor) -> Tensor:
    """Cumulative log decay (..., L) → exp(decay_l − decay_m) for m ≤ l, else 0. (..., L, L)."""
    length = decay.shape[-1]
    difference = decay[..., :, None] - decay[..., None, :]
    future = torch.ones(length, length, dtype=torch.bool, device=decay.device).triu(1)
    return difference.masked_fill(future, -torch.inf).exp()  # mask before exp: future exponents would overflow


def _segment_decay(passing: Tensor) -> Tensor:
    """passing (..., n): the log decay from chunk i − 1 to chunk i → (..., n, n).

    Entry (i, j), j ≤ i, is the fraction of what arrived in chunk j that remains in chunk i. Decays are summed segment
    by segment: a difference of long cumulative sums would lose all digits over many chunks, and −∞ cannot be
    subtracted.
    """
    n = passing.shape[-1]
    ones = torch.ones(n, n, dtype=torch.bool, device=passing.device)
    # (i, k): the step into chunk k counts for chunk i if k ≤ i; the sum over k in (j, i] is a reversed cumulative sum.
    spread = passing[..., None, :].expand(*passing.shape[:-1], n, n).masked_fill(ones.triu(1), 0.0)
    sums = F.pad(running_sum(spread.flip(-1), -1).flip(-1)[..., 1:], (0, 1))
    return sums.masked_fill(ones.triu(1), -torch.inf).exp()
