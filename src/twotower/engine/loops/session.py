"""One batch being generated: the model, the context state, and the rows still running."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twotower.decoding.output import BlockEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.sampling import Sampling
from twotower.decoding.sequence_output import RowRecord
from twotower.decoding.unmasking import Unmasking

if TYPE_CHECKING:
    from twotower.model.towers import TwoTowerModel


class Session:
    """Holds what the loops share. `rows` are the indices of the running rows, in the order of the state's slots.

    Rows that end leave the state; the others never wait for them and never see them.
    """

    def __init__(
        self,
        model: TwoTowerModel,
        prompts: Sequence[Sequence[int]],
        params: GenerationParams,
        tokenizer: Any,
        why: str = "",
    ) -> None:
        self.model = model
        self.params = params
        self.prompts = prompts
        self.rows = list(range(len(prompts))) if params.max_new_tokens else []
        self.records = [RowRecord.of(row, params, len(ids), tokenizer, why) for row, ids in enumerate(prompts)]
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

    @property
    def running(self) -> list[RowRecord]:
        """The records of the running rows."""
        return [self.records[row] for row in self.rows]

    def prefill(self, upto: int | None = None) -> None:
        """Reads every prompt (or prompt[:upto]) into the state."""
        parts = [list(prompt[:upto]) for prompt in self.prompts]
        width = max(map(len, parts))
        if width:
            tokens = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=self.model.device)
            lengths = torch.tensor([len(part) for part in parts], device=self.model.device)
            self.model.prefill(tokens, lengths, self.state)
        self.state.tighten(width)
        now = time.perf_counter()
        for record in self.records:
            record.prefilled = now

    def extend(self, tokens: Tensor, logits: bool) -> Tensor | None:
        """One context pass over tokens (B, L) of the running rows; logits in the model's own dtype."""
        for record in self.running:
            record.context_passes += 1
        return self.model.extend(tokens, self.state, logits=logits, wide=False)

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
        for slot, (record, block, steps, sure) in enumerate(zip(self.running, *columns, strict=True)):
            record.denoiser_passes += passes[slot] if passes is not None else 0
            block = block if counts is None else block[: counts[slot]]
            events.append(record.take(block, steps, sure, () if drafts is None else drafts[slot]))
        self.blocks += 1
        return events

    def drop_ended(self) -> Tensor | None:
        """Removes ended rows from the state → the slots kept, or None where nothing changed."""
        kept = [slot for slot, record in enumerate(self.running) if record.running]
        if len(kept) == len(self.rows):
            return None
        self.rows = [self.rows[slot] for slot in kept]
        slots = torch.tensor(kept, dtype=torch.long, device=self.model.device)
        if self.rows:
            self.state = self.state.select(slots)
            self.state.tighten(max(record.length for record in self.running))
            self.sampling = self.sampling.select(torch.tensor(kept, dtype=torch.long))
            self.unmasking = self.unmasking.select(kept)
            if self.reader is not None:
                self.reader = self.reader.select(self.state, slots)
        return slots
