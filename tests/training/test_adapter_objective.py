"""The objective of adapters: all blocks at once equal generation block by block; only adapters are trained."""

from __future__ import annotations

import pytest
import torch
from packed import MASK, blocks_of, packed
from tiny_backbones import slow_but, two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.data import Batch
from twotower.training.noise import Corruption

NAMES = slow_but(("nemotron_h", "llama", "gemma2", "qwen2_moe", "qwen3_next"))


def model_of(name: str = "nemotron_h", draft_rank: int | None = None) -> TwoTowerForCausalLM:
    return two_tower(name, torch.float64, seed=8, rank=3, draft_rank=draft_rank)


@torch.no_grad()
def naive_loss(model: TwoTowerForCausalLM, batch: Batch, noise: Corruption, size: int, weight: float) -> Tensor:
    """The loss of one block after the other, from the verbs of generation."""
    total = torch.zeros((), dtype=torch.float64)
    for block in blocks_of(batch, size):
        row = batch.tokens[block.row]
        masked = noise.masked[block.row, block.lo : block.hi]
        if not masked.any():
            continue
        state = model.new_state(1, row.numel())
        if block.lo > block.first:
            model.extend(row[None, block.first : block.lo], state)
        before = state.lengths.clone()
        own = row[block.lo : block.hi].masked_fill(masked, MASK)
        found = model.denoise(own[None], None, state.view())[0]
        clean = model.extend(row[None, block.lo : block.hi], state)
        assert clean is not None
        assert torch.equal(state.lengths, before + len(own))
        head = model.context.draft_head
        if head is not None:  # the column's own token is the one before its target
            found = found + head.previous[row[block.lo : block.hi]] @ head.following.T
        for logits in (found, clean[0]):
            logits[:, MASK] = -1e4
        found, clean = found.log_softmax(-1), clean[0].log_softmax(-1)
        for place in masked.nonzero()[:, 0].tolist():
            column = block.lo + place
            if column + 1 >= row.numel() or batch.document[block.row, column + 1] != batch.document[block.row, column]:
                continue
            share = weight if batch.text[block.row, column + 1] else 0.0
            distance = (clean[place].exp() * (clean[place] - found[place])).sum()
            total += share * distance - (1 - share) * found[place, row[column + 1]]
    return total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "draft_rank"), [(2, None), (4, None), (4, 5)])
def test_all_blocks_at_once_equal_generation_block_by_block(name: str, size: int, draft_rank: int | None) -> None:
    model, batch = model_of(name, draft_rank), packed(block_size=size, seed=1)
    objective = AdapterObjective(model.context, AdapterOptions(mask_token_id=MASK, seed=3))
    noise = objective.draw_noise(batch, size)
    loss = objective(batch, noise, size)
    expected = naive_loss(model, batch, noise, size, 0.7)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-9)
    assert objective.targets(batch, noise) > 10


def test_only_adapters_the_mask_embedding_and_the_draft_head_are_trained() -> None:
    model, batch = model_of(draft_rank=5), packed(seed=1)
    objective = AdapterObjective(model.context, AdapterOptions(mask_token_id=MASK))
    objective(batch, objective.draw_noise(batch, 4), 4).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    parts = ".adapter.", "mask_embedding", "draft_head"
    assert trained == {n for n, _ in model.named_parameters() if any(part in n for part in parts)}
    assert all(parameter.grad is None or parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_gradient_is_that_of_finite_differences(activation_checkpointing: bool) -> None:
    model, batch = model_of(draft_rank=5), packed(seed=1)
    options = AdapterOptions(mask_token_id=MASK, activation_checkpointing=activation_checkpointing)
    objective = AdapterObjective(model.context, options)
    noise = objective.draw_noise(batch, 4)
    objective(batch, noise, 4).backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not name.endswith(
            ("o_proj.adapter.a", "in_proj.adapter.b", "mask_embedding.weight", "draft_head.previous")
        ):
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                values.append(objective(batch, noise, 4))
                parameter -= step * direction
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)


def test_a_row_alone_has_the_noise_and_loss_of_the_batch() -> None:
    model, batch = model_of("llama"), packed(seed=1)
    objective = AdapterObjective(model.context, AdapterOptions(mask_token_id=MASK, seed=5))
    noise = objective.draw_noise(batch, 4)
    rows = [batch.rows(slice(i, i + 1)) for i in range(len(batch))]
    alone = [objective.draw_noise(row, 4) for row in rows]
    assert torch.equal(torch.cat([part.masked for part in alone]), noise.masked)
    parts = [objective(row, part, 4).detach() for row, part in zip(rows, alone, strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(), objective(batch, noise, 4).detach(), rtol=1e-12, atol=0)
