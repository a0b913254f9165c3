"""Bytes that a training step keeps for its backward pass: 4,096 tokens, compared with next-token prediction."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from conftest import build_random_model
from packed import objective, packed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twotower import TwoTowerForCausalLM
from twotower.training.data import Batch
from twotower.training.noise import Corruption
from twotower.training.objective import AutoregressiveObjective

TOKENS, WIDTH, BLOCK, VOCABULARY = 4096, 128, 16, 512
PATTERN = "M-M*MEM*-"
STREAM = TOKENS * WIDTH * 4  # bytes of one residual stream, in fp32
# Proportions of the released backbone: inner width 1.5, one group for eight heads, state 128 for 64 heads of 64, …
PROPORTIONS = {
    "hidden_size": WIDTH,
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "mamba_num_heads": 8,
    "mamba_head_dim": 24,
    "ssm_state_size": 16,
    "n_groups": 1,
    "chunk_size": 128,
    "intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 192,
    "n_group": 1,
}


class Live(TorchDispatchMode):
    """Bytes of all live tensors that are made in the `with` block, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[weakref.ref] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in given:
                size = storage.nbytes()
                self.now += size
                self._known.add(weakref.ref(storage, lambda ref, size=size: self._gone(ref, size)))
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, ref: weakref.ref, size: int) -> None:
        self._known.discard(ref)
        self.now -= size


class Memory(NamedTuple):
    """Bytes saved by autograd, live before the backward pass, and at the peak; without weights and gradients."""

    saved: int
    kept: int
    peak: int


def measure(module: nn.Module, forward: Callable[[], Tensor]) -> Memory:
    """Measures one step. Tensors that share a storage count once; parameters and gradients do not count."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Live() as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        kept = live.now
        loss.backward()
    return Memory(sum(saved.values()), kept, live.peak)


@dataclass(frozen=True)
class Step:
    """A long document, half of it masked."""

    model: TwoTowerForCausalLM
    batch: Batch
    noise: Corruption

    def autoregressive(self, **options: Any) -> Memory:
        module = AutoregressiveObjective(self.model.context.requires_grad_(True), **options)
        return measure(module, lambda: module(self.batch, None, BLOCK))

    def denoising(self, **options: Any) -> Memory:
        module = objective(self.model, **options)
        return measure(module, lambda: module(self.batch, self.noise, BLOCK))


def long_step(pattern: str = PATTERN) -> Step:
    model = build_random_model(pattern, **PROPORTIONS)
    batch = packed([[(TOKENS, "plain")]], BLOCK, offset="fixed")
    masked = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return Step(model, batch, Corruption(torch.full((1, TOKENS // BLOCK), 0.5), masked))


def streams(memory: Memory) -> dict[str, float]:
    return {name: value / STREAM for name, value in memory._asdict().items()}


def show(pattern: str, table: dict[str, Memory]) -> None:
    print(f"\n{pattern}, {TOKENS} tokens, width {WIDTH}, in residual streams of {STREAM / 2**20:.0f} MiB:")
    for name, memory in table.items():
        print(f"{name:<24}" + "".join(f"  {part} {count:6.1f}" for part, count in streams(memory).items()))


def check(step: Step, pattern: str, memory: Memory) -> None:
    """With checkpointing: two streams a unit, the last stream, its norm, masked logits, time conditioning."""
    layers, coupled = len(pattern), max(map(pattern.rindex, "M*")) + 1
    kept = layers + min(coupled + 1, layers) + 2
    masked = int(step.noise.masked.sum())
    head = masked * (WIDTH + VOCABULARY) * 4
    conditioning = TOKENS // BLOCK * 3 * WIDTH * 4
    assert memory.saved < kept * STREAM + head + 5 * conditioning
    assert memory.kept < memory.saved + layers * conditioning + 0.1 * STREAM


def test_units_keep_two_residual_streams() -> None:
    pattern = "M*E-"
    step = long_step(pattern)
    table = {
        "AR, checkpointing": step.autoregressive(activation_checkpointing=True),
        "denoiser": step.denoising(),
        "denoiser, checkpointing": step.denoising(activation_checkpointing=True),
    }
    show(pattern, table)
    check(step, pattern, table["denoiser, checkpointing"])
    assert table["denoiser"].saved > 5 * table["denoiser, checkpointing"].saved


@pytest.mark.slow
def test_memory_of_a_step_against_next_token_prediction() -> None:
    step = long_step()
    table = {}
    for activation_checkpointing in (False, True):
        name = ", checkpointing" * activation_checkpointing
        table |= {
            "AR" + name: step.autoregressive(activation_checkpointing=activation_checkpointing),
            "denoiser" + name: step.denoising(activation_checkpointing=activation_checkpointing),
            "both towers" + name: step.denoising(train_context=True, activation_checkpointing=activation_checkpointing),
        }
    show(PATTERN, table)
    for name in ("denoiser, checkpointing", "both towers, checkpointing"):
        check(step, PATTERN, table[name])
    assert table["denoiser"].peak < 1.2 * table["AR"].peak
    assert table["denoiser, checkpointing"].peak < 1.45 * table["AR, checkpointing"].peak
