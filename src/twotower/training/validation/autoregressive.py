"""Validation of an autoregressive model: likelihood and bits per byte by source, and a greedy continuation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F

from twotower.decoding.params import GenerationParams
from twotower.errors import ArgumentError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.tokenizer import require_tokenizer
from twotower.training.columns import next_tokens
from twotower.training.data.batch import Batch
from twotower.training.fsdp import World, sharded
from twotower.training.log_schema import Validation
from twotower.training.objective import AutoregressiveObjective
from twotower.training.validation.samples import documents, shared_prompts, unsharded, write_samples


class AutoregressiveValidation:
    """Validation of an autoregressive model in training.

    nll, nll_by_source: −ln p in nats per token, over the scored tokens of the held-out documents.
    bits_per_byte, bits_per_byte_by_source: −log2 p per byte of UTF-8 text of the scored tokens, without special
        tokens; only with a tokenizer.
    sample: one greedy continuation.

    Args:
        model: its context tower is the tower that the objective trains.
        held_out: for each source, this process's batches, equally many on each process, in blocks of block_size.
        prompts: 0: no sample; then parameters are never unsharded on one process.
    """

    def __init__(
        self,
        model: TwoTowerForCausalLM,
        objective: AutoregressiveObjective,
        held_out: Mapping[str, Iterable[Batch]],
        world: World,
        *,
        block_size: int,
        eos_token_id: int | Sequence[int] | None,
        prompts: int = 1,
        max_new_tokens: int = 64,
    ) -> None:
        self.model, self.objective, self.world = model, objective, world
        self.held_out = {name: list(batches) for name, batches in held_out.items()}
        self.block_size = block_size
        self.params = GenerationParams.of(mode="ar", max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, seed=0)
        self.prompts = shared_prompts(model, list(self.held_out.values()), min(prompts, 1), self.params, world)
        self.tokens = {name: world.total(sum(map(objective.targets, part))) for name, part in self.held_out.items()}
        for name, tokens in self.tokens.items():
            if not tokens:
                raise ArgumentError(f"{name}: the held-out documents have no token to predict; give longer documents")
        self.bytes: dict[str, float] = {}
        if model.tokenizer is not None:
            self.bytes = {name: world.total(self._bytes(part)) for name, part in self.held_out.items()}

    @torch.no_grad()
    def __call__(self, step: int) -> Validation:
        """Computes all figures, for a log record."""
        nats = {}
        try:
            for name, batches in self.held_out.items():
                parts = [self.objective(b.to(self.world.device), None, self.block_size) for b in batches]
                nats[name] = self.world.total(sum(float(part) for part in parts))
        finally:
            for module in sharded(self.objective):
                module.reshard()
        record: Validation = {
            "nll": sum(nats.values()) / sum(self.tokens.values()),
            "nll_by_source": {name: nats[name] / self.tokens[name] for name in nats},
        }
        if all(self.bytes.get(name) for name in nats):
            bits = {name: value / math.log(2) for name, value in nats.items()}
            record["bits_per_byte"] = sum(bits.values()) / sum(self.bytes.values())
            record["bits_per_byte_by_source"] = {name: bits[name] / self.bytes[name] for name in bits}
        if self.prompts:
            with unsharded(self.objective.modules()):
                record |= write_samples(self.model, self.prompts, self.params, self.world)
        return record

    def _bytes(self, batches: Sequence[Batch]) -> int:
        total = 0
        for batch in batches:
            scored = F.pad(next_tokens(batch, self.objective.prompt_loss), (1, 0))
            for row, columns in documents(batch):
                tokens = batch.tokens[row][columns & scored[row]].tolist()
                total += len(require_tokenizer(self.model.tokenizer).decode(tokens, skip_special_tokens=True).encode())
        return total
