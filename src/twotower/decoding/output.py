"""Typed results: what flows from the loops to the CLI, the server and evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from twotower.decoding.modes import Mode
from twotower.deprecation import renamed_attribute

FinishReason = Literal["eos", "stop", "length", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """logprob: ln P(token | everything before it) by the AR model, at temperature 1 and unfiltered; top: its likeliest
    tokens there with theirs, best first, `token` among them where it is one of them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One row's result.

    tokens: new tokens up to and including EOS, or the one that completed a stop string. text: without special
    tokens and without the stop string ("" where the model has no tokenizer). committed_at: the denoising step, from
    0, that fixed each token within its block. Passes: forwards of each tower while this row was running, its
    prefill not counted. drafts, drafted, accepted (verified decoding): rounds with a draft, tokens in those drafts, and
    those that were kept; rejected: drafts that ended at a token AR did not agree with. mode_reason: why mode "auto"
    chose this mode. cached_tokens: prompt tokens from the prefix cache, not read again. decode_seconds: from the end of
    the prefill to this row's end. error: what went wrong, where an engine ended the request with finish_reason
    "error". logprobs, prompt_logprobs: of each new token and of each of the prompt (None for its first), where an
    engine was asked for them, else empty.
    """

    mode: Mode
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    committed_at: list[int]
    confidence: list[float]
    denoiser_passes: int
    context_passes: int
    prefill_seconds: float
    decode_seconds: float
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    cached_tokens: int = 0
    mode_reason: str = ""
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    why = renamed_attribute("why", "mode_reason")

    @property
    def passes(self) -> int:
        """Of the tower that proposes tokens; verified: of both."""
        denoiser = self.denoiser_passes if self.mode != "ar" else 0
        return denoiser + (self.context_passes if self.mode in ("ar", "verified") else 0)

    @property
    def passes_of_both(self) -> int:
        """Of either tower."""
        return self.denoiser_passes + self.context_passes

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per pass of the tower that proposes them; verified: per pass of either tower."""
        return len(self.tokens) / self.passes if self.passes else 0.0

    @property
    def mean_accepted(self) -> float:
        """Drafted tokens kept in a round with a draft."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second after the prefill."""
        return len(self.tokens) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, the derived figures included; log-probabilities where there are any."""
        derived = ("tokens_per_pass", "tokens_per_second", "mean_accepted")
        out = asdict(self) | {name: getattr(self, name) for name in derived}
        return {name: value for name, value in out.items() if value or name not in ("logprobs", "prompt_logprobs")}


@dataclass(frozen=True, kw_only=True)
class BlockEvent:
    """A block of one row, committed (in AR modes: one token).

    start: index of the first of `tokens` among the row's new tokens. committed_at, confidence: per token.
    text: what became final with this block; the events' texts join to the result's text. draft (verified decoding):
    what the denoiser proposed, of which `tokens` begin with the part that was kept. logprobs: per token, where an
    engine was asked for them; prompt_logprobs: the prompt's, in the row's first event. result: in its last.
    """

    row: int
    block: int
    start: int
    tokens: list[int]
    committed_at: list[int]
    confidence: list[float]
    text: str
    draft: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    result: Generation | None = None


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """A row's block after a pass of the denoiser, for whoever wants to see it come about.

    start: index of the block's first position among the row's new tokens; in verified decoding the block begins with
    the token before them, so −1 at first. step, from 0, of at most `steps`. tokens: what stands at each position, or,
    where it is still a mask (`masked`), what the denoiser would put there; confidence: in that token, 0 for one that
    was given.
    """

    row: int
    start: int
    step: int
    steps: int
    tokens: list[int]
    masked: list[bool]
    confidence: list[float]
    result: None = None


Event = BlockEvent | StepEvent
