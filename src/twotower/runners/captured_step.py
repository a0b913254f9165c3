"""An AR step as one CUDA graph: the pass, the new keys, values and Mamba states, the head and the choice of tokens.

A graph of the pass alone leaves about 60 launches a step outside it. This graph has four inputs: tokens, slots, lengths
and a switch. All else is read and written in the pools of the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.layer_cache import step_inputs_of
from twotower.cache.state_caches import caches_at
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import Tower
from twotower.ops.registry import select
from twotower.ops.self_check import differing_bits
from twotower.runners.graph_capture import Capturer, MemoryPool

Choice = tuple[Tensor, Tensor]  # tokens and confidences (B, 1)


class CapturedStep:
    """A captured greedy step of `slots` (B,) of a state. The state may have other texts, of other lengths, in a replay.

    wrong: how the replay differs from the same computation without a graph; None: not at all. During capture and
    comparison `accepted` is 0, so no Mamba state advances, and the keys and values of the step are written again.
    """

    def __init__(
        self, tower: Tower, state: TowerState, tokens: Tensor, slots: Tensor, width: int, pool: MemoryPool
    ) -> None:
        self.tokens, self.slots, self.lengths = tokens.clone(), slots.clone(), state.lengths.clone()
        self.accepted = torch.zeros_like(slots)

        def compute() -> Choice:
            return _step(tower, state, self, width)

        self.replay, self.result = Capturer(tower.device, pool)(compute)
        self.replay()
        self.wrong = differing_bits(self.result, compute())
        self.accepted.fill_(1)
        self.nbytes = sum(part.nbytes for part in (self.tokens, self.slots, self.lengths, *self.result))

    def run(self, tokens: Tensor, slots: Tensor, lengths: Tensor) -> Choice:
        """Replays the step of these tokens (B, 1), slots (B,) and lengths (R,). Valid until the next replay."""
        torch._foreach_copy_([self.tokens, self.slots, self.lengths], [tokens, slots, lengths])
        self.replay()
        return self.result


def _step(tower: Tower, state: TowerState, inputs: CapturedStep, width: int) -> Choice:
    lengths = inputs.lengths[inputs.slots]
    past = caches_at(state, inputs.slots, lengths, width)
    hidden, updates = tower.layer_by_layer(inputs.tokens, AttentionMetadata(start=lengths), past)
    for group in state.kv_groups:
        group.append(updates, lengths, torch.ones_like(lengths), inputs.slots)
    pools = [(pool.conv_window, pool.ssm_state) for _, pool in state.mamba_pools]
    if pools:
        steps = [step_inputs_of(updates[layer]) for layer, _ in state.mamba_pools]
        update = select("state_update", tower.device, state.dtype).function
        update(pools, steps, inputs.accepted, inputs.slots)
    logits = tower.logits(hidden, upcast_logits=False)
    tokens, sure = select("argmax", logits.device, logits.dtype).function(logits)
    return tokens, sure


def step_unsupported_reason(tower: Tower, state: TowerState, rows: Sequence[int]) -> str | None:
    """Why a step of these rows of a state is not captured as a whole; None if it can be."""
    if state.texts is not None or state.longest_pass is not None:
        return "windows and long rotary embeddings need work before a pass"
    if state.lengths.device != tower.device or len(set(rows)) != len(rows):
        return "the state is elsewhere"
    return None
