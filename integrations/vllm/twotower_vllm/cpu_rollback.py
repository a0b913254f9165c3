"""Replaces vLLM's Mamba-2 steps on a CPU, if a self-test finds that they ignore rejected drafts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba import mamba_mixer2

from twotower_vllm import rollback

_LOG = init_logger(__name__)
_OWN_CONVOLUTION: Callable[..., Tensor] = mamba_mixer2.causal_conv1d_update
_OWN_SCAN: Callable[..., None] = mamba_mixer2.selective_state_update


def install() -> None:
    """Replaces the steps in this process. It does nothing if vLLM's own are right, or are replaced already."""
    if mamba_mixer2.causal_conv1d_update is not _OWN_CONVOLUTION or rolls_back(_OWN_CONVOLUTION):
        return
    mamba_mixer2.causal_conv1d_update = causal_conv1d_update
    mamba_mixer2.selective_state_update = selective_state_update
    _LOG.info("vLLM's Mamba-2 layers on a CPU ignore rejected drafts; twotower-vllm replaces their steps.")


def rolls_back(convolution: Callable[..., Tensor]) -> bool:
    """Whether a convolution begins after the accepted tokens: two rows, of which one has rejected a token."""
    generator = torch.Generator().manual_seed(0)
    x, windows, weight = (torch.randn(size, generator=generator) for size in ((4, 32), (3, 32, 4), (32, 4)))
    slots, accepted = torch.tensor([[1, 0], [2, 0]], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    starts = torch.tensor([0, 2, 4], dtype=torch.int32)
    expected, after = x.clone(), windows.clone()
    expected = rollback.convolve(expected, after, weight, None, True, slots, accepted, starts)
    try:
        found = convolution(
            x.clone(),
            windows,
            weight,
            None,
            "silu",
            conv_state_indices=slots,
            num_accepted_tokens=accepted,
            query_start_loc=starts,
            max_query_len=2,
        )
    except (RuntimeError, TypeError):
        return False
    return torch.allclose(found, expected, atol=1e-4) and torch.allclose(windows, after, atol=1e-4)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    **others: object,
) -> Tensor:
    """As vLLM's function of this name: its own without speculative decoding, `rollback.convolve` with it."""
    if num_accepted_tokens is None:
        slots = first_columns(conv_state_indices)
        return _OWN_CONVOLUTION(
            x,
            conv_state,
            weight,
            bias,
            activation,
            conv_state_indices=slots,
            query_start_loc=query_start_loc,
            **others,
        )
    assert conv_state_indices is not None
    assert query_start_loc is not None
    activate = activation in ("silu", "swish", True)
    return rollback.convolve(
        x, conv_state, weight, bias, activate, conv_state_indices, num_accepted_tokens, query_start_loc
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    state_batch_indices: Tensor,
    dst_state_batch_indices: Tensor,
    out: Tensor,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **others: object,
) -> None:
    """As vLLM's function of this name: its own without speculative decoding, `rollback.scan` with it."""
    if num_accepted_tokens is None:
        read, written = first_columns(state_batch_indices), first_columns(dst_state_batch_indices)
        _OWN_SCAN(
            state,
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            state_batch_indices=read,
            dst_state_batch_indices=written,
            out=out,
            cu_seqlens=cu_seqlens,
            **others,
        )
        return
    assert cu_seqlens is not None
    places = state_batch_indices, dst_state_batch_indices
    rollback.scan(state, x, dt, A, B, C, D, dt_bias, *places, num_accepted_tokens, cu_seqlens, out)


def first_columns(slots: Tensor | None) -> Tensor | None:
    """The first slot of each row (B,): vLLM's own steps read one slot a row."""
    return slots[:, 0].contiguous() if slots is not None and slots.dim() == 2 else slots
