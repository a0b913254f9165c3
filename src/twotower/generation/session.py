"""One batch being generated: the model, the context state, and the rows still running."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from twotower.generation.output import BlockEvent, Generation
from twotower.generation.params import GenerationParams
from twotower.generation.sampling import Sampling
from twotower.generation.stopping import RowProgress
from twotower.generation.unmasking import Unmasking
from twotower.modes import Mode

if TYPE_CHECKING:
    from twotower.model.two_tower import TwoTowerForCausalLM


class Session:
    """Holds what the loops share. `rows` are the indices of the running rows, in the order of the state's slots.

    Rows that end leave the state; the others never wait for them and never see them.
    """

    def __init__(
        self,
        model: TwoTowerForCausalLM,
        prompts: Sequence[Sequence[int]],
        params: GenerationParams,
        tokenizer: Any,
        why: str = "",
    ) -> None:
        self.model = model
        self.params = params
        self.prompts = prompts
        self.rows = list(range(len(prompts))) if params.max_new_tokens else []
        self.progress = [
            RowProgress(params.max_new_tokens, params.eos_token_id, params.stop, tokenizer) for _ in prompts
        ]
        self.denoiser_passes = [0] * len(prompts)
        self.context_passes = [0] * len(prompts)
        self.drafts, self.drafted, self.accepted, self.rejected = ([0] * len(prompts) for _ in range(4))
        self.why = why
        self.committed_at: list[list[int]] = [[] for _ in prompts]
        self.confidence: list[list[float]] = [[] for _ in prompts]
        self.blocks = 0
        self.passes = 0  # denoiser passes of the batch (NFE)
        self.sampling = Sampling(
            seeds=torch.tensor(params.row_seeds(len(prompts)), dtype=torch.long),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        self.unmasking = Unmasking(*params.row_policies(len(prompts)))
        capacity = max(map(len, prompts)) + params.max_new_tokens + params.block_size
        self.state = model.new_state(len(prompts), capacity)
        self.reader = None if params.mode == "ar" else model.reader(self.state)
        self.started = self.prefilled = time.perf_counter()
        self.ended: dict[int, float] = {}

    def prefill(self, upto: int | None = None) -> None:
        """Reads every prompt (or prompt[:upto]) into the state."""
        parts = [list(prompt[:upto]) for prompt in self.prompts]
        width = max(map(len, parts))
        if width:
            tokens = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=self.model.device)
            lengths = torch.tensor([len(part) for part in parts], device=self.model.device)
            self.model.prefill(tokens, lengths, self.state)
        self.state.tighten(width)
        self.prefilled = time.perf_counter()

    def extend(self, tokens: Tensor, logits: bool) -> Tensor | None:
        """One context pass over tokens (B, L) of the running rows."""
        for row in self.rows:
            self.context_passes[row] += 1
        return self.model.extend(tokens, self.state, logits=logits)

    def length(self, row: int) -> int:
        """Tokens of a row's text so far."""
        return len(self.prompts[row]) + len(self.progress[row].tokens)

    def room(self, row: int) -> int:
        """New tokens that a row may still get."""
        return self.params.max_new_tokens - len(self.progress[row].tokens)

    def take(
        self,
        tokens: Tensor,
        committed_at: Tensor,
        confidence: Tensor,
        passes: Sequence[int] | None,
        counts: Sequence[int] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[BlockEvent]:
        """Books a block (B, L) of the running rows, of each its first `counts` tokens (None: all); passes: denoiser
        passes each row took; drafts: what it proposed, where that is another thing."""
        events = []
        columns = (tokens.tolist(), committed_at.tolist(), confidence.tolist())
        for slot, (row, block, steps, sure) in enumerate(zip(self.rows, *columns, strict=True)):
            self.denoiser_passes[row] += passes[slot] if passes is not None else 0
            start = len(self.progress[row].tokens)
            count, text = self.progress[row].take(block if counts is None else block[: counts[slot]])
            self.committed_at[row] += steps[:count]
            self.confidence[row] += sure[:count]
            ended = self.progress[row].finish_reason is not None
            if ended:
                self.ended[row] = time.perf_counter()
            events.append(
                BlockEvent(
                    row=row,
                    block=self.blocks,
                    start=start,
                    tokens=block[:count],
                    committed_at=steps[:count],
                    confidence=sure[:count],
                    text=text,
                    draft=() if drafts is None else tuple(drafts[slot]),
                    result=self.result(row) if ended else None,
                )
            )
        self.blocks += 1
        return events

    def nothing(self, row: int) -> BlockEvent:
        """The only event of a row that was asked for no tokens."""
        return BlockEvent(
            row=row, block=0, start=0, tokens=[], committed_at=[], confidence=[], text="", result=self.result(row)
        )

    def drop_ended(self) -> Tensor | None:
        """Removes ended rows from the state → the slots kept, or None where nothing changed."""
        kept = [slot for slot, row in enumerate(self.rows) if self.progress[row].finish_reason is None]
        if len(kept) == len(self.rows):
            return None
        self.rows = [self.rows[slot] for slot in kept]
        slots = torch.tensor(kept, dtype=torch.long, device=self.model.device)
        if self.rows:
            self.state = self.state.select(slots)
            self.state.tighten(max(self.length(row) for row in self.rows))
            self.sampling = self.sampling.select(torch.tensor(kept, dtype=torch.long))
            self.unmasking = self.unmasking.select(kept)
            if self.reader is not None:
                self.reader = self.reader.select(self.state, slots)
        return slots

    def result(self, row: int) -> Generation:
        progress = self.progress[row]
        assert progress.finish_reason is not None
        return Generation(
            mode=cast(Mode, self.params.mode),
            tokens=progress.tokens,
            text=progress.text,
            finish_reason=progress.finish_reason,
            prompt_tokens=len(self.prompts[row]),
            committed_at=self.committed_at[row],
            confidence=self.confidence[row],
            denoiser_passes=self.denoiser_passes[row],
            context_passes=self.context_passes[row],
            drafts=self.drafts[row],
            drafted=self.drafted[row],
            accepted=self.accepted[row],
            rejected=self.rejected[row],
            why=self.why,
            prefill_seconds=self.prefilled - self.started,
            decode_seconds=self.ended.get(row, self.prefilled) - self.prefilled,
        )
