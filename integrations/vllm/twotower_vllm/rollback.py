"""Mamba-2 steps that begin after the accepted tokens of the step before, for vLLM on a CPU.

vLLM 0.32's own CPU code ignores how many drafted tokens were accepted. Speculative decoding of a model with Mamba-2
layers then continues from the state after rejected tokens, and writes other texts without an error. The layouts are
those of vLLM's Triton kernels:

- Convolution. Slot s of a row keeps the last inputs, those of rejected tokens included. After a accepted tokens the
  window of the next step begins at input a − 1.
- State space. Column j of a row's slots keeps the state after token j of the step. The next step reads column a − 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NULL_BLOCK = 0  # the slot of padding rows


def convolve(
    x: Tensor,
    windows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    slots: Tensor,
    accepted: Tensor,
    starts: Tensor,
) -> Tensor:
    """One step of the causal convolution → (T, C); it updates the windows.

    x: (T, C), the tokens of all rows. windows: (S, C, W) of all slots. weight: (C, K). bias: (C,) or None. activate:
    whether SiLU follows. slots: (B,) or (B, J); the first column counts. accepted: (B,), tokens of the step before that
    count, at least 1. starts: (B + 1,), where the tokens of each row begin.
    """
    history, out = weight.shape[1] - 1, torch.empty_like(x)
    first_column = slots if slots.dim() == 1 else slots[:, 0]
    begins, counts = starts.tolist(), accepted.tolist()
    for row, slot in enumerate(first_column.tolist()):
        first, last = begins[row], begins[row + 1]
        if first == last or slot == NULL_BLOCK:
            continue
        window, begin = windows[slot], counts[row] - 1
        inputs = torch.cat([window[:, begin : begin + history], x[first:last].t().to(window.dtype)], dim=1)
        window[:, : inputs.shape[1] - 1] = inputs[:, 1:]
        summed = (inputs.unfold(1, history + 1, 1) * weight[:, None].to(inputs.dtype)).sum(-1)
        summed = summed if bias is None else summed + bias[:, None]
        out[first:last] = (F.silu(summed) if activate else summed).t().to(x.dtype)
    return out


def scan(
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    read: Tensor,
    written: Tensor,
    accepted: Tensor,
    starts: Tensor,
    out: Tensor,
) -> None:
    """One step of the state space; it updates the states and writes out (T, H, P).

    states: (S, H, P, N) of all slots. x: (T, H, P). dt: (T, H, P), dt_bias and d: (H, P), a: (H, P, N), each constant
    over P and N. b, c: (T, G, N). read, written: (B, J), the slots of each row. accepted, starts: as in `convolve`.
    """
    step = F.softplus(dt[..., 0].float() + dt_bias[:, 0].float())
    decay = torch.exp(step * a[:, 0, 0].float())
    keys, queries = (part.float().repeat_interleave(x.shape[1] // part.shape[1], 1) for part in (b, c))
    values, begins, counts, targets = x.float(), starts.tolist(), accepted.tolist(), written.tolist()
    for row, slots in enumerate(read.tolist()):
        first, last = begins[row], begins[row + 1]
        if first == last or slots[0] == NULL_BLOCK:
            continue
        state = states[slots[counts[row] - 1]].float()
        for offset, token in enumerate(range(first, last)):
            added = (step[token][:, None] * values[token])[:, :, None] * keys[token][:, None]
            state = state * decay[token][:, None, None] + added
            out[token] = ((state * queries[token][:, None]).sum(-1) + d[:, :1].float() * values[token]).to(out.dtype)
            states[targets[row][offset]] = state.to(states.dtype)
