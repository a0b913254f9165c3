"""Adapters on the context tower: the prefix of a pass is AR's, the state gets it alone, and masks read it."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import slow_but, two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.cache.hybrid_cache import TowerState
from twotower.model.linear import Linear

MASK = 3
NAMES = slow_but(("nemotron_h", "llama", "gemma2", "qwen2_moe", "qwen3_next"))
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])
LENGTHS = torch.tensor([7, 4])
BLOCK = torch.tensor([[20, 21, 22, MASK, MASK, MASK], [23, MASK, MASK, MASK, 0, 0]])
PREFIX, WIDTHS = torch.tensor([3, 1]), torch.tensor([6, 4])


def prefilled(model: TwoTowerForCausalLM) -> TowerState:
    state = model.new_state(2, 40)
    model.prefill(PROMPT, LENGTHS, state)
    return state


def read(model: TwoTowerForCausalLM, block: Tensor, state: TowerState) -> Tensor:
    logits = model.extend(block, state, WIDTHS, prefix=PREFIX)
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_prefix_is_computed_as_by_ar_and_masks_do_not_change_it(name: str) -> None:
    model = two_tower(name, torch.float64, rank=3)
    state = prefilled(model)
    logits = read(model, BLOCK, state)
    plain = prefilled(model)
    expected = model.extend(BLOCK[:, :3], plain, PREFIX)
    assert expected is not None
    for row, count in enumerate(PREFIX.tolist()):
        torch.testing.assert_close(logits[row, :count], expected[row, :count], rtol=0, atol=1e-11)
    other = read(model, torch.where(BLOCK == MASK, 30, BLOCK), prefilled(model))  # the positions count, not the tokens
    for row, count in enumerate(PREFIX.tolist()):
        torch.testing.assert_close(other[row, :count], expected[row, :count], rtol=0, atol=1e-11)
        assert not torch.allclose(other[row, count], logits[row, count])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_state_gets_the_prefix_alone(name: str) -> None:
    model = two_tower(name, torch.float64, rank=3)
    state, plain = prefilled(model), prefilled(model)
    read(model, BLOCK, state)
    model.extend(BLOCK[:, :3], plain, PREFIX)
    assert state.lengths.tolist() == plain.lengths.tolist() == [10, 5]
    following = torch.tensor([[30, 31], [32, 33]])
    torch.testing.assert_close(model.extend(following, state), model.extend(following, plain), rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_pass_rolls_back_to_any_part_of_its_prefix() -> None:
    model = two_tower("nemotron_h", torch.float64, rank=3)
    for kept in range(4):
        state, plain = prefilled(model), prefilled(model)
        read(model, BLOCK, state)
        state.rollback(LENGTHS + torch.tensor([kept, 1]).minimum(PREFIX))
        model.extend(BLOCK[:, :3], plain, torch.tensor([kept, 1]))
        following = torch.tensor([[30], [32]])
        torch.testing.assert_close(model.extend(following, state), model.extend(following, plain), rtol=0, atol=1e-11)


@torch.no_grad()
def test_masks_see_the_prefix_and_each_other() -> None:
    model = two_tower("llama", torch.float64, rank=3)
    logits = read(model, BLOCK, prefilled(model))
    changed = BLOCK.clone()
    changed[0, 1], changed[0, 5] = 40, 41
    other = read(model, changed, prefilled(model))
    assert not torch.allclose(other[0, 3], logits[0, 3])  # through a token of the prefix
    changed[0, 1] = BLOCK[0, 1]
    assert not torch.allclose(read(model, changed, prefilled(model))[0, 3], logits[0, 3])  # through a later mask
    torch.testing.assert_close(other[1], logits[1], rtol=0, atol=1e-11)  # not through another row


@torch.no_grad()
def test_denoise_is_the_same_pass_and_writes_nothing() -> None:
    model = two_tower("nemotron_h", torch.float64, rank=3)
    state = prefilled(model)
    before = state.lengths.tolist()
    blocks = model.denoise(BLOCK, None, state.view(), lengths=WIDTHS)
    assert state.lengths.tolist() == before
    expected = read(model, BLOCK, prefilled(model))
    for row, width in enumerate(WIDTHS.tolist()):
        torch.testing.assert_close(blocks[row, :width], expected[row, :width], rtol=0, atol=1e-11)


@torch.no_grad()
def test_adapters_that_add_nothing_leave_a_causal_prefix() -> None:
    """With b = 0 and the mask token's own embedding, a mask is a token of AR that sees later masks too."""
    model = two_tower("llama", torch.float64, rank=3)
    for module in model.context.modules():
        if isinstance(module, Linear) and module.adapter is not None:
            module.adapter.b.zero_()
    assert model.context.mask_embedding is not None
    model.context.mask_embedding.weight.copy_(model.context.embeddings.weight[MASK])
    block, lengths = BLOCK[:, :4].clone(), torch.tensor([4, 2])
    logits = model.extend(block, prefilled(model), lengths, prefix=PREFIX)
    expected = model.extend(block, prefilled(model), lengths)  # one mask at the end of each row: causal is the same
    assert logits is not None
    assert expected is not None
    for row, width in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row, :width], expected[row, :width], rtol=0, atol=1e-11)
