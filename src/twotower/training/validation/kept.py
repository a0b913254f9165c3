"""What free diffusion keeps of the AR model on held-out prompts: whole texts, and right answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from twotower.decoding.params import GenerationParams
from twotower.engine.generation import generate
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training.data.batch import Batch
from twotower.training.fsdp import World
from twotower.training.log_schema import Validation
from twotower.training.validation.samples import documents

PROMPTS = 32
THRESHOLD = 0.95


class TextsKept:
    """Compares free diffusion with greedy AR on the first held-out records that have a prompt.

    texts_kept: share of prompts whose whole text is AR's. ar_accuracy: share of prompts whose AR text is the record's,
    token for token. accuracy_kept: the share of diffusion divided by it; only if AR has a right answer. free_tokens:
    tokens per pass of both towers.

    shift: of the predictions. max_new_tokens: longer answers are left out, so that every answer can be right.
    """

    def __init__(
        self,
        model: TwoTowerForCausalLM,
        sources: Iterable[Sequence[Batch]],
        params: GenerationParams,
        world: World,
        shift: int,
    ) -> None:
        self.model, self.world = model, world
        ends, longest = params.eos_token_id, params.max_new_tokens
        room = model.spec.max_position_embeddings - longest
        own = (
            (number, *found)
            for number, batches in enumerate(sources)
            for batch in batches
            for found in answers(batch, shift, ends)
        )
        fitting = [one for one in own if len(one[2]) <= room and len(one[3]) <= longest]
        # In the order of the held-out rows, so that every number of processes has the same prompts.
        every = sorted((one for part in world.gather(fitting) for one in part), key=lambda one: one[:2])
        shared = [(prompt, answer) for _, _, prompt, answer in every[:PROMPTS]]
        self.count = len(shared)
        self.own = shared[world.rank :: world.size]
        self.ar = replace(params, mode="ar")
        self.diffusion = replace(params, mode="diffusion", confidence_threshold=THRESHOLD)
        self._written: list[tuple[int, ...]] = []  # AR's texts, which a frozen context tower writes once

    def measure(self) -> Validation:
        """The figures; none without prompts. Every process calls this function and gets the same result."""
        if not self.count:
            return {}
        prompts = [prompt for prompt, _ in self.own]
        if prompts and not self._written:
            self._written = [tuple(result.tokens) for result in generate(self.model, prompts, self.ar)]
        results = generate(self.model, prompts, self.diffusion) if prompts else []
        texts = [tuple(result.tokens) for result in results]
        wanted = [tuple(answer) for _, answer in self.own]
        sums = (
            sum(map(len, texts)),
            sum(result.passes for result in results),
            sum(map(tuple.__eq__, texts, self._written)),
            sum(map(tuple.__eq__, self._written, wanted)),
            sum(map(tuple.__eq__, texts, wanted)),
        )
        tokens, passes, same, ar_right, right = map(self.world.total, sums)
        record: Validation = {
            "free_tokens": tokens / max(passes, 1.0),
            "texts_kept": same / self.count,
            "ar_accuracy": ar_right / self.count,
        }
        if ar_right:
            record["accuracy_kept"] = right / ar_right
        return record


def answers(batch: Batch, shift: int, ends: Sequence[int]) -> Iterable[tuple[int, list[int], list[int]]]:
    """Yields (number of the row, prompt, rest of the record) for each document with a prompt and one of these ends."""
    for row, columns in documents(batch):
        tokens: Tensor = batch.tokens[row][columns]
        given = int(batch.prompt[row][columns].sum())
        if given and given + shift < len(tokens) and int(tokens[-1]) in ends:
            yield int(batch.index[row]), tokens[: given + shift].tolist(), tokens[given + shift :].tolist()
