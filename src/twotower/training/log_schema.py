"""The types of the records in a run's log."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Timing(TypedDict):
    """seconds: since the run was started or resumed."""

    seconds: float
    tokens_per_second: float


class Trace(TypedDict):
    """How a text was denoised. New token i is at position i mod block_size of block i div block_size.

    tokens: each token as text. step: the denoising pass within the block, from 0, that committed the token. passes:
    denoising passes of each block; the last ones may have committed only tokens after EOS, which are cut off.
    """

    block_size: int
    passes: list[int]
    tokens: list[str]
    step: list[int]


class Sample(TypedDict, total=False):
    """A continuation of a held-out text. passes, trace: mode diffusion only. Empty on processes other than rank 0."""

    prompt: str
    text: str
    finish_reason: str | None
    tokens: int
    passes: int
    trace: Trace


class Validation(TypedDict, total=False):
    """Denoiser: masked_nll to tokens_per_pass; adapters: also draft_tokens to accuracy_kept. Autoregressive model: nll
    to bits_per_byte_by_source. Both: sample."""

    masked_nll: float
    masked_nll_by_t: dict[str, float]
    ar_nll: float
    agreement: float
    tokens_per_pass: float
    draft_tokens: float
    free_tokens: float
    texts_kept: float
    ar_accuracy: float
    accuracy_kept: float
    nll: float
    nll_by_source: dict[str, float]
    bits_per_byte: float
    bits_per_byte_by_source: dict[str, float]
    sample: Sample


class StepRecord(TypedDict):
    """One step. loss: nats per target. lr: learning rate. grad_norm: of the gradient before clipping.

    on_policy_loss: KL(AR ‖ denoiser) in nats per prediction of stored states, if the step has any.
    """

    step: int
    loss: float
    targets: int
    tokens: int
    lr: float
    grad_norm: float
    block_size: int
    on_policy_loss: NotRequired[float]
    validation: NotRequired[Validation]
    timing: NotRequired[Timing]
