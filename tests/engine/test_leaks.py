"""What a block's prediction depends on, tested by changing everything else and by gradients; trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_KIND
from packed import Block, Case, blocks_of, case, objective
from torch import Tensor, nn

from twotower import TwoTowerForCausalLM
from twotower.model.packed_layout import Layout
from twotower.training.columns import blocks_with_masks
from twotower.training.data import Batch
from twotower.training.noise import Corruption
from twotower.training.objective import AutoregressiveObjective, DenoisingObjective

PATTERNS = ["M", "*", "M*-M"]  # layers whose rounding does not depend on other tokens; experts are tested below


def trained_blocks(step: Case) -> list[Block]:
    """The blocks with masked positions."""
    return [b for b in blocks_of(step.batch, step.block_size) if step.noise.masked[b.row, b.lo : b.hi].any()]


def logits_of(training: DenoisingObjective, batch: Batch, noise: Corruption, block_size: int) -> Tensor:
    """Logits (B, S, V); blocks without a mask are not denoised."""
    hidden, _ = training.hidden(batch, noise, block_size)
    return training.denoiser.logits(hidden)


# --- by perturbation ----------------------------------------------------------------------------------------------


def disturbed(step: Case, block: Block, *, but: Tensor, noise_elsewhere: bool = True) -> tuple[Batch, Corruption]:
    """Changes the tokens in all positions except `but` (B, S), and the noise in all blocks except `block`."""
    generator = torch.Generator().manual_seed(0)
    other = torch.randint(4, 63, step.batch.tokens.shape, generator=generator)
    other += other >= step.batch.tokens  # always a different token
    masked, t = step.noise.masked, step.noise.t
    if noise_elsewhere:
        masked = torch.rand(masked.shape, generator=generator) < 0.5
        t = torch.rand(t.shape, generator=generator)
        masked[block.row, block.lo : block.hi] = step.noise.masked[block.row, block.lo : block.hi]
        t[block.row, block.lo // step.block_size] = step.noise.t[block.row, block.lo // step.block_size]
    return replace(step.batch, tokens=torch.where(but, step.batch.tokens, other)), Corruption(t, masked)


def may_see(step: Case, block: Block) -> tuple[Tensor, Tensor]:
    """Positions (B, S) that the block may see: clean earlier ones of its document, and its own unmasked ones."""
    column = torch.arange(step.batch.tokens.shape[1])
    clean, noisy = (torch.zeros_like(step.noise.masked) for _ in range(2))
    clean[block.row] = (column >= block.first) & (column < block.lo)
    noisy[block.row] = (column >= block.lo) & (column < block.hi) & ~step.noise.masked[block.row]
    return clean, noisy


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["two towers", "one tied tower"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_block_depends_on_nothing_else(pattern: str, tied: bool) -> None:
    """Changes masked tokens, later blocks, other documents and rows, and the noise of all other blocks, together.

    No bit of the block's logits changes.
    """
    step = case(pattern)
    training = objective(step.model, tied=tied, train_context=tied)
    before = logits_of(training, *step[1:])
    for block in trained_blocks(step):
        clean, noisy = may_see(step, block)
        after = logits_of(training, *disturbed(step, block, but=clean | noisy), step.block_size)
        mine = slice(block.lo, block.hi)
        assert torch.equal(after[block.row, mine], before[block.row, mine])
        assert not torch.isclose(after, before).all(-1)[step.noise.masked].all()  # the change has an effect elsewhere


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["ME*", EVERY_KIND])
def test_a_block_depends_on_nothing_else_with_experts(pattern: str) -> None:
    """Equal up to rounding: the shape of an expert's product depends on all tokens."""
    step = case(pattern)
    training = objective(step.model)
    before = logits_of(training, *step[1:])
    for block in trained_blocks(step):
        clean, noisy = may_see(step, block)
        after = logits_of(training, *disturbed(step, block, but=clean | noisy), step.block_size)
        mine = slice(block.lo, block.hi)
        torch.testing.assert_close(after[block.row, mine], before[block.row, mine], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_block_depends_on_all_it_may_see(pattern: str) -> None:
    """The negative control: each clean position before the block, each unmasked one in the block, and its t."""
    step = case(pattern)
    training = objective(step.model)
    before = logits_of(training, *step[1:])
    everything = torch.ones_like(step.noise.masked)
    block = max((b for b in trained_blocks(step) if may_see(step, b)[1].any()), key=lambda b: b.lo - b.first)
    clean, noisy = may_see(step, block)
    assert clean.sum() > 8

    def felt(batch: Batch, noise: Corruption) -> bool:
        after = logits_of(training, batch, noise, step.block_size)
        mine = slice(block.lo, block.hi)
        return not torch.equal(after[block.row, mine], before[block.row, mine])

    for row, column in (clean | noisy).nonzero().tolist():
        but = everything.clone()
        but[row, column] = False
        assert felt(*disturbed(step, block, but=but, noise_elsewhere=False)), column
    t = step.noise.t.clone()
    t[block.row, block.lo // step.block_size] *= 0.5
    assert felt(step.batch, replace(step.noise, t=t))
    masked = step.noise.masked.clone()
    masked[block.row, block.lo : block.hi] ^= True
    assert felt(step.batch, replace(step.noise, masked=masked))


@torch.no_grad()
@pytest.mark.parametrize("scope", ["row", "document", "block"])
def test_a_document_is_what_it_is_alone(scope: Any) -> None:
    """Alone in a row, at the same offset in a block and with the same noise, its logits at masks are equal."""
    step = case(EVERY_KIND, scope=scope)
    training = objective(step.model)
    together = logits_of(training, *step[1:])
    for row, number in {(b.row, b.number) for b in blocks_of(step.batch, step.block_size)}:
        own = (step.batch.document[row] == number).nonzero()[:, 0]
        size = step.block_size
        columns = slice(int(own[0]) // size * size, -(-(int(own[-1]) + 1) // size) * size)
        parts = {
            name: value[row, columns][None]
            for name, value in vars(step.batch).items()
            if name != "index" and value is not None
        }
        alone = Batch(**parts, index=step.batch.index[row, None])
        t = step.noise.t[row, columns.start // size : columns.stop // size][None]
        noise = Corruption(t, step.noise.masked[row, columns][None])
        own = own[step.noise.masked[row, own]]
        torch.testing.assert_close(
            logits_of(training, alone, noise, size)[0, own - columns.start], together[row, own], rtol=1e-12, atol=1e-11
        )


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_next_token_prediction_sees_neither_later_tokens_nor_other_documents(pattern: str) -> None:
    step = case(pattern)
    training = AutoregressiveObjective(step.model.context)
    batch, column = step.batch, torch.arange(step.batch.tokens.shape[1])

    def hidden(tokens: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = training.units[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        training(replace(batch, tokens=tokens), None, step.block_size)
        hook.remove()
        return seen[0]

    before = hidden(batch.tokens)
    for row, number in {(b.row, b.number) for b in blocks_of(batch, step.block_size)}:
        own = batch.document[row] == number
        middle = int(own.nonzero().double().mean())
        seen = torch.zeros_like(batch.text)
        seen[row] = own & (column <= middle)
        after = hidden(torch.where(seen, batch.tokens, (batch.tokens + 7) % 64))
        assert torch.equal(after[seen], before[seen])
        assert not torch.isclose(after, before)[~seen & (batch.document >= 0)].all()


# --- by gradients -------------------------------------------------------------------------------------------------


def input_gradients(training: DenoisingObjective, step: Case, block: Block) -> tuple[Tensor, Tensor]:
    """Whether any logit of the block depends on the clean, and on the noisy, embedding of each position (B, S)."""
    inputs: list[Tensor] = []

    def make_leaf(module: nn.Module, args: object, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    hooks = [e.register_forward_hook(make_leaf) for e in {training.context_embeddings, training.embeddings}]
    logits = logits_of(training, *step[1:])[block.row, block.lo : block.hi]
    for hook in hooks:
        hook.remove()
    torch.manual_seed(0)
    found = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), inputs, materialize_grads=True)
    assert len(found) == 2
    layout = Layout(step.batch.document, step.block_size, chosen=blocks_with_masks(step.noise, step.block_size))
    return found[0].any(-1), layout.to_rows(found[1].any(-1))


@pytest.mark.parametrize("tied", [False, True], ids=["two towers", "one tied tower"])
@pytest.mark.parametrize("pattern", ["M", "*", EVERY_KIND])
def test_gradients_reach_exactly_what_a_block_may_see(pattern: str, tied: bool) -> None:
    """Nonzero for every earlier clean position of its document and for its own noisy block; else zero."""
    step = case(pattern)
    training = objective(step.model, tied=tied, train_context=True, activation_checkpointing=tied)
    for block in trained_blocks(step):
        clean, _ = may_see(step, block)
        noisy = torch.zeros_like(clean)
        noisy[block.row, block.lo : block.hi] = True
        reached = input_gradients(training, step, block)
        assert torch.equal(reached[0], clean)
        assert torch.equal(reached[1], noisy)


def test_layers_that_mix_nothing_see_their_own_column() -> None:
    step = case("E-")
    training = objective(step.model, train_context=True)
    block = trained_blocks(step)[0]
    clean, noisy = input_gradients(training, step, block)
    assert not clean.any()
    assert noisy.nonzero().tolist() == [[block.row, column] for column in range(block.lo, block.hi)]


# --- what trains --------------------------------------------------------------------------------------------------


def trained(model: TwoTowerForCausalLM, loss: Tensor) -> set[str]:
    """The parameters with a gradient after a backward pass, including zero gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name in found:
        assert model.get_parameter(name).grad.isfinite().all(), name  # type: ignore[union-attr]
    return found


def names_in(model: nn.Module, prefix: str, *but: str) -> set[str]:
    """Parameters whose names begin with `prefix` and with none of `but`."""
    return {n for n, _ in model.named_parameters() if n.startswith(prefix) and not n.startswith(but or ("?",))}


# Parameters of the last context layer that affect only its own output.
UNREAD = {
    "M": ("mixer.D", "mixer.norm", "mixer.out_proj"),
    "*": ("mixer.q_proj", "mixer.o_proj"),
}


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("pattern", [EVERY_KIND, "M*E-"])
def test_nothing_trains_but_what_should(pattern: str, activation_checkpointing: bool) -> None:
    step = case(pattern)
    model = step.model

    def trains(**options: Any) -> set[str]:
        training = objective(model, activation_checkpointing=activation_checkpointing, **options)
        return trained(model, training(*step[1:]))

    denoiser, time = names_in(model, "denoiser."), names_in(model, "time.")
    assert trains() == denoiser | time
    assert trains(elbo=True, scope="row") == denoiser | time
    assert trains(time=False) == denoiser
    last = max(pattern.rindex(kind) for kind in "M*")
    beyond = [f"context.layers.{i}." for i in range(last + 1, len(pattern))]
    unread = [f"context.layers.{last}.{part}" for part in UNREAD[pattern[last]]]
    read = names_in(model, "context.", "context.norm_f", "context.head", *beyond, *unread)
    assert trains(train_context=True) == denoiser | time | read
    assert trains(train_context=True, ar_weight=0.5) == denoiser | time | names_in(model, "context.")
    assert trains() == denoiser | time  # freeze the context again
    if pattern == EVERY_KIND:
        model.denoiser = model.context
        assert trains(tied=True, train_context=True) == names_in(model, "context.") | time


def test_every_trained_parameter_feels_the_loss() -> None:
    """No gradient of a trained parameter is zero."""
    step = case(EVERY_KIND)
    for options in ({}, {"train_context": True, "ar_weight": 0.5}):
        for name in trained(step.model, objective(step.model, **options)(*step[1:])):
            assert step.model.get_parameter(name).grad.any(), name  # type: ignore[union-attr]


def test_next_token_prediction_trains_its_tower_alone() -> None:
    step = case(EVERY_KIND)
    loss = AutoregressiveObjective(step.model.context)(step.batch, None, step.block_size)
    assert trained(step.model, loss) == names_in(step.model, "context.")


def saved_by(run: Callable[[], Tensor]) -> list[Tensor]:
    """Every tensor that autograd saves while `run` computes a loss."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return kept


@pytest.mark.parametrize("pattern", [EVERY_KIND, "**MM"])
def test_a_frozen_context_leaves_nothing_for_a_backward_pass(pattern: str) -> None:
    """Even if its parameters require gradients, none is saved and its layers' outputs require none."""
    step = case(pattern)
    training = objective(step.model)
    step.model.requires_grad_(True)
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for module in step.model.context.modules()
        if not list(module.children())
    ]
    kept = {t.untyped_storage().data_ptr() for t in saved_by(lambda: training(*step[1:]))}
    assert outputs
    assert not any(o.requires_grad for out in outputs for o in (out if isinstance(out, tuple) else (out,)))
    ours, theirs = (
        {p.untyped_storage().data_ptr() for p in tower.parameters()}
        for tower in (step.model.denoiser, step.model.context)
    )
    assert kept & ours
    assert not kept & theirs
    for hook in hooks:
        hook.remove()
    assert not any(name.startswith("context.") for name in trained(step.model, training(*step[1:])))


def test_a_loss_is_of_masked_positions_alone() -> None:
    """Its targets are the true tokens at these positions, independent of all other positions."""
    step = case("-")
    training = objective(step.model)
    logits = logits_of(training, *step[1:])
    masked = step.noise.masked
    expected = F.cross_entropy(logits[masked], step.batch.tokens[masked], reduction="sum")
    torch.testing.assert_close(training(*step[1:]), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):
        objective(step.model, tied=True)  # a tied tower cannot be frozen
