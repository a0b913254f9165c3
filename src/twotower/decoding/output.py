"""Typed results of the engine, for the command line, the server and evaluation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from twotower.decoding.modes import Mode
from twotower.deprecation import renamed_attribute

FinishReason = Literal["eos", "stop", "length", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """logprob: ln P(token | all tokens before it) of the AR model, at temperature 1 and unfiltered. top: the AR model's
    most probable tokens at this position with their log-probabilities, best first; `token` may be one of them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of one row.

    tokens: new tokens, up to and including EOS or the token that completed a stop string. text: without special
    tokens and without the stop string or stop token ("" if the model has no tokenizer). stop_string: the one that
    ended the row, or "". committed_at: the denoising pass, from 0, that committed each token in its block.
    denoiser_passes, context_passes: passes of each tower for this row, without the prefill. In verified decoding:
    drafts is the number of rounds with a draft, drafted the tokens in them, accepted the accepted ones, rejected
    the number of drafts with a token that AR did not accept. mode_reason: why mode "auto" chose this mode.
    cached_tokens: prompt tokens from the prefix cache. decode_seconds: from the end of the prefill to the end of
    the row. error: the error of a request with finish_reason "error"; error_param: the parameter of the request
    that caused the error, if one did. logprobs, prompt_logprobs: of each new token and of each prompt token (None
    for the first), if the request asked for them; else empty.
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
    error_param: str = ""
    stop_string: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    why = renamed_attribute("why", "mode_reason")

    @property
    def passes(self) -> int:
        """Passes of the tower that proposes tokens; in verified decoding, of both towers. With adapters: all passes."""
        if self.mode == "ar" or not self.denoiser_passes:
            return self.context_passes
        return self.denoiser_passes + (self.context_passes if self.mode == "verified" else 0)

    @property
    def passes_of_both(self) -> int:
        """Passes of both towers."""
        return self.denoiser_passes + self.context_passes

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per pass of the tower that proposes them; in verified decoding, of both towers."""
        return len(self.tokens) / self.passes if self.passes else 0.0

    @property
    def mean_accepted(self) -> float:
        """Accepted drafted tokens per round with a draft."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def mean_logprob(self) -> float:
        """The mean AR log-probability of the new tokens, if the request asked for log-probabilities; else NaN.

        Without new tokens it is 0.
        """
        if len(self.logprobs) != len(self.tokens):
            return math.nan
        return sum(one.logprob for one in self.logprobs) / max(len(self.tokens), 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second after the prefill."""
        return len(self.tokens) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, with derived figures; log-probabilities only if there are any."""
        derived = ("tokens_per_pass", "tokens_per_second", "mean_accepted")
        out = asdict(self) | {name: getattr(self, name) for name in derived}
        return {
            name: value
            for name, value in out.items()
            if value or name not in ("logprobs", "prompt_logprobs", "error_param", "stop_string")
        }


@dataclass(frozen=True, kw_only=True)
class BlockEvent:
    """A committed block of one row; in AR modes, one token.

    start: index of the first of `tokens` among the row's new tokens. committed_at, confidence: per token.
    text: the text that became final with this block; the texts of all events join to the result's text. draft: in
    verified decoding, the drafted tokens; `tokens` begin with the accepted part. logprobs: per token, if the request
    asked for them. prompt_logprobs: in the row's first event. result: in the row's last event.
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
    """The block of a row after a denoising pass, for displays.

    start: index of the block's first position among the row's new tokens. In verified decoding the block begins with
    the token before them, so start is −1 for the first block. step: the pass, from 0, of at most `steps`. steps is 0
    for a draft that the pass which checked the tokens before has made (adapters, verified decoding). tokens: the token
    at each position; at masked positions (`masked`), the denoiser's candidate. confidence: in that token; 0 for a given
    token.
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
