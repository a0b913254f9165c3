"""What a line of a run's log holds."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Timing(TypedDict):
    """seconds: since the run began or was continued."""

    seconds: float
    tokens_per_second: float


class Trace(TypedDict):
    """How a text was denoised: new token i stood at position i mod block_size of block i div block_size.

    tokens: each as text. step: the pass within its block, from 0, that committed it. passes: of each block; a block's
    last ones may have committed only what EOS cut off.
    """

    block_size: int
    passes: list[int]
    tokens: list[str]
    step: list[int]


class Sample(TypedDict, total=False):
    """A continuation of a held-out text. Empty on processes other than the first. passes, trace: diffusion only."""

    prompt: str
    text: str
    finish_reason: str | None
    tokens: int
    passes: int
    trace: Trace


class Validation(TypedDict, total=False):
    """Of a denoiser: masked_nll to agreement, tokens_per_pass. Of an autoregressive model: nll to bits_per_byte."""

    masked_nll: float
    masked_nll_by_t: dict[str, float]
    ar_nll: float
    agreement: float
    tokens_per_pass: float
    nll: float
    nll_by_source: dict[str, float]
    bits_per_byte: float
    bits_per_byte_by_source: dict[str, float]
    sample: Sample


class StepRecord(TypedDict):
    """One step. loss: nats per target. lr: the learning rate. grad_norm: before clipping."""

    step: int
    loss: float
    targets: int
    tokens: int
    lr: float
    grad_norm: float
    block_size: int
    validation: NotRequired[Validation]
    timing: NotRequired[Timing]
