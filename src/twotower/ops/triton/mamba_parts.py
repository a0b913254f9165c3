"""Parts of the Mamba-2 kernel: convolution, time step, the scan of one head, the gate.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(−|x|).

    The log is computed as 2·artanh(e / (2 + e)), which keeps the digits of a small e.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s  # at most 1/9, so the first omitted term is below 2⁻²⁹
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def conv_silu(
    xBC,
    token_mask,
    window,
    conv_weight,
    conv_bias,
    kept_xBC,
    token_stride,
    length,
    tokens,
    channels,
    live,
    stored,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_STEP_INPUTS: tl.constexpr,
    CONV_DIM: tl.constexpr,
    TAPS: tl.constexpr,
):
    """SiLU of the convolution, for some channels → (tokens, channels).

    Pointers are at the row's first token; live: which channels exist; stored: whether this program stores their inputs.
    Each tap reloads the tile shifted by one token, from the cache after the first tap.
    """
    total = tl.zeros([tokens.shape[0], channels.shape[0]], dtype=tl.float32)
    for k in tl.static_range(TAPS):
        source = tokens + (k - (TAPS - 1))
        inside = (source >= 0) & (source < length)
        if HAS_MASK:
            inside = inside & (tl.load(token_mask + source, mask=inside, other=0) != 0)
        at = xBC + source[:, None] * token_stride + channels[None, :]
        tile = tl.load(at, mask=inside[:, None] & live[None, :], other=0.0)
        if HAS_WINDOW and k < TAPS - 1:
            at = window + (source[:, None] + (TAPS - 1)) * CONV_DIM + channels[None, :]
            seen = tl.load(at, mask=(source < 0)[:, None] & live[None, :], other=0.0)
            tile = tl.where((source < 0)[:, None], seen.to(tile.dtype), tile)
        if KEEP_STEP_INPUTS and HAS_MASK and k == TAPS - 1:
            at = kept_xBC + tokens[:, None] * CONV_DIM + channels[None, :]
            tl.store(at, tile, mask=(tokens < length)[:, None] & live[None, :] & stored)
        tap = tl.load(conv_weight + channels * TAPS + k, mask=live, other=0.0).to(tl.float32)
        total += tile.to(tl.float32) * tap[None, :]
    if HAS_BIAS:
        total += tl.load(conv_bias + channels, mask=live, other=0.0).to(tl.float32)[None, :]
    return silu(total)


@triton.jit
def scan(
    x,
    dt,
    log_decay,
    C,
    scores,
    state,
    columns,
    live,
    HAS_STATE: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scan of one head: x (TOKENS, P), dt and log_decay (TOKENS,), C (TOKENS, N), scores C·Bᵀ → y (TOKENS, P).

    state: pointer to the row's states; columns (P,): where the head's columns are among all heads; live: which exist.
    """
    if TOKENS == 1:
        decay = log_decay
        y = scores * dt[:, None] * x
    else:
        decay = tl.cumsum(log_decay, axis=0)
        tokens = tl.arange(0, TOKENS)
        causal = tokens[:, None] >= tokens[None, :]
        # Mask before exp: the exponents of future tokens would overflow.
        left = tl.exp(tl.where(causal, decay[:, None] - decay[None, :], -float("inf")))
        y = tl.dot(scores * left * dt[None, :], x, input_precision=PRECISION)
    if HAS_STATE:
        n = tl.arange(0, SIZE_TILE)
        of_h = state + columns[:, None] * SIZE + n[None, :]
        h = tl.load(of_h, mask=live[:, None] & (n < SIZE)[None, :], other=0.0).to(tl.float32)
        if TOKENS == 1:  # noqa: SIM108  constexpr: only one branch is compiled
            seen = tl.sum(h * C, axis=1)[None, :]
        else:
            seen = tl.dot(C, tl.trans(h), input_precision=PRECISION)
        y += seen * tl.exp(decay)[:, None]
    return y


@triton.jit
def gate(projected, token_stride, tokens, columns, exists):
    """SiLU of z, for some columns → (tokens, columns)."""
    z = tl.load(projected + tokens[:, None] * token_stride + columns[None, :], mask=exists, other=0.0)
    return silu(z.to(tl.float32))
