"""The output of one sequence so far: tokens, text, counts and times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from twotower.decoding.modes import Mode
from twotower.decoding.output import BlockEvent, Event, Generation, StepEvent, TokenLogprob
from twotower.decoding.params import GenerationParams
from twotower.decoding.stopping import RowProgress
from twotower.errors import ArgumentError
from twotower.tokenizer import Tokenizer


@dataclass
class SequenceOutput:
    """Tokens and text of one sequence (`progress`), counts as in `Generation`, and times of `time.perf_counter`.

    delivered: new tokens, and events with tokens, that the engine's caller has. last_tokens: of the last of these
    events. shown: start and step of the last `StepEvent`.
    """

    row: int
    mode: str
    prompt_tokens: int
    progress: RowProgress
    mode_reason: str = ""
    error: str = ""
    error_param: str = ""
    denoiser_passes: int = 0
    context_passes: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    cached_tokens: int = 0
    blocks: int = 0
    committed_at: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    prefilled: float = 0.0
    ended: float = 0.0
    delivered: tuple[int, int] = (0, 0)
    last_tokens: int = 0
    shown: tuple[int, int] = (-2, 0)

    @classmethod
    def of(
        cls, row: int, params: GenerationParams, prompt_tokens: int, tokenizer: Tokenizer | None, mode_reason: str = ""
    ) -> SequenceOutput:
        """The output of a new sequence."""
        eos = () if params.ignore_eos else params.eos_token_id
        progress = RowProgress(
            params.max_new_tokens,
            params.end_tokens,
            params.stop,
            tokenizer,
            stop_tokens=tuple(set(params.stop_token_ids) - set(eos)),
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )
        return cls(row, params.mode, prompt_tokens, progress, mode_reason)

    @property
    def running(self) -> bool:
        return self.progress.finish_reason is None

    @property
    def length(self) -> int:
        """Tokens of the text so far, the prompt included."""
        return self.prompt_tokens + len(self.progress.tokens)

    @property
    def room(self) -> int:
        """New tokens that may still follow."""
        return self.progress.limit - len(self.progress.tokens)

    def count_verified(self, drafted: int, kept: int) -> None:
        """Counts a round of verified decoding with `drafted` tokens, of which `kept` were accepted."""
        self.drafted += drafted
        self.accepted += kept
        self.drafts += drafted > 0
        self.rejected += kept < drafted

    def take(
        self,
        tokens: list[int],
        committed_at: list[int],
        confidence: list[float],
        draft: Sequence[int] = (),
        logprobs: Sequence[TokenLogprob] = (),
        complete: bool = False,
    ) -> BlockEvent:
        """Adds a block, up to the end of the row. complete: the text ends with this block."""
        start = len(self.progress.tokens)
        count, text = self.progress.take(tokens, complete)
        self.committed_at += committed_at[:count]
        self.confidence += confidence[:count]
        self.logprobs += logprobs[:count]
        if not self.running:
            self.ended = time.perf_counter()
        self.blocks += 1
        return BlockEvent(
            row=self.row,
            block=self.blocks - 1,
            start=start,
            tokens=tokens[:count],
            committed_at=committed_at[:count],
            confidence=confidence[:count],
            text=text,
            draft=tuple(draft),
            logprobs=tuple(logprobs[:count]),
            prompt_logprobs=tuple(self.prompt_logprobs) if self.blocks == 1 else (),
            result=None if self.running else self.result(),
        )

    def note_delivery(self, event: Event) -> None:
        """Records that the engine's caller gets this event."""
        if isinstance(event, StepEvent):
            self.shown = event.start, event.step
        else:
            self.delivered, self.last_tokens = (event.start + len(event.tokens), event.block + 1), len(event.tokens)

    def rewind(self) -> list[int]:
        """Drops what no event has delivered → the new tokens that remain."""
        count, self.blocks = self.delivered
        for values in (self.progress.tokens, self.committed_at, self.confidence, self.logprobs):
            del values[count:]
        self.progress = self.progress.taken_again()
        if not self.blocks:
            self.prompt_logprobs.clear()
        return self.progress.tokens

    def final_event(self) -> BlockEvent:
        """The last event of a row that ends without another token."""
        return BlockEvent(
            row=self.row,
            block=self.blocks,
            start=len(self.progress.tokens),
            tokens=[],
            committed_at=[],
            confidence=[],
            text="",
            prompt_logprobs=() if self.blocks else tuple(self.prompt_logprobs),
            result=self.result(),
        )

    def fail(self, error: Exception) -> BlockEvent:
        """Ends the row with an error."""
        self.progress.finish_reason = "error"
        if isinstance(error, ArgumentError):
            self.error, self.error_param = str(error), error.param or ""
        else:
            self.error = f"{type(error).__name__}: {error}"
        self.ended = time.perf_counter()
        return self.final_event()

    def result(self) -> Generation:
        """The result of a finished row."""
        assert self.progress.finish_reason is not None
        return Generation(
            mode=cast(Mode, self.mode),
            tokens=self.progress.tokens,
            text=self.progress.text,
            finish_reason=self.progress.finish_reason,
            prompt_tokens=self.prompt_tokens,
            committed_at=self.committed_at,
            confidence=self.confidence,
            denoiser_passes=self.denoiser_passes,
            context_passes=self.context_passes,
            drafts=self.drafts,
            drafted=self.drafted,
            accepted=self.accepted,
            rejected=self.rejected,
            cached_tokens=self.cached_tokens,
            mode_reason=self.mode_reason,
            error=self.error,
            error_param=self.error_param,
            stop_string=self.progress.stop_string,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            prefill_seconds=max(self.prefilled - self.started, 0.0),
            decode_seconds=max(self.ended - self.prefilled, 0.0) if self.prefilled else 0.0,
        )
