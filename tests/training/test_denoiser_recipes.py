"""Recipes: patterns, targets, weights and alignment, compared with one block at a time in generation's functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import EVERY_KIND, build_random_model, random_two_tower
from packed import MASK, blocks_of, objective, packed
from shaped_models import SHAPES, config_of
from tiny_backbones import two_tower
from torch import Tensor, nn

from twotower import TwoTowerForCausalLM
from twotower.errors import ArgumentError
from twotower.training import logits as logits_module
from twotower.training.adapter_objective import AdapterObjective, AdapterOptions
from twotower.training.columns import wanted_columns
from twotower.training.data import Batch
from twotower.training.noise import Corruption, corrupt
from twotower.training.patterns import PATTERNS, Patterns, draw_masks
from twotower.training.recipe import AS_RELEASED, RECIPES, Recipe, RecipeChoices
from twotower.training.targets import Targets

SIZE = 4
EVERYTHING = Recipe(
    patterns=Patterns.parse("levels:2+clipped+draft+prefix+complementary:3"),
    targets=Targets.parse("tokens:0.2+kl:0.4+tv:0.3+acceptance:0.1"),
    position_decay=3.0,
    alignment=0.7,
)


# --- reference -----------------------------------------------------------------------------------------------------


@contextmanager
def streams_of(tower: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the residual stream after each layer, (L, H) each, of the passes in the block."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: found.append(out[0][0])) for layer in tower.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def one_loss(recipe: Recipe, q: Tensor, p: Tensor | None, token: int) -> Tensor:
    """ln q and ln p (V,), p None: unknown → the loss of one prediction, with plain loops over the vocabulary."""
    if p is None:
        return -q[token]
    both = [(float(a), b) for a, b in zip(p.exp(), q.exp(), strict=True)]
    loss = -recipe.targets.tokens * q[token]
    loss = loss + recipe.targets.kl * sum((a * (math.log(a) - b.log()) for a, b in both if a > 0), torch.zeros(()))
    loss = loss + recipe.targets.tv * sum((abs(a - b) / 2 for a, b in both), torch.zeros(()))
    return loss - recipe.targets.acceptance * sum((b.clamp(max=a) for a, b in both), torch.zeros(())).log()


def without_mask(logits: Tensor) -> Tensor:
    keep = torch.arange(logits.shape[-1]) != MASK
    return logits.where(keep, -1e4).log_softmax(-1)


def naive(
    model: TwoTowerForCausalLM, batch: Batch, noise: Corruption, size: int, recipe: Recipe, shift: int
) -> tuple[Tensor, float]:
    """The summed loss and the summed weights, one block after the other."""
    adapters = model.has_adapters
    tower = model.context if adapters else model.denoiser
    assert tower is not None
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for block in blocks_of(batch, size):
        for own in (noise, noise.pair):
            if own is None:
                continue
            masked = own.masked[block.row, block.lo : block.hi]
            if not masked.any():
                continue
            end = int((batch.document[block.row] == block.number).nonzero()[-1]) + 1
            row = batch.tokens[block.row]
            with torch.no_grad(), streams_of(model.context) as clean:
                ar = model.extend(row[None, block.first : end], model.new_state(1, end))
            assert ar is not None
            state = model.new_state(1, row.numel())
            if block.lo > block.first:
                model.extend(row[None, block.first : block.lo], state, logits=False)
            t = None if adapters else own.t[block.row, block.lo // size][None]
            with streams_of(tower) as noisy:
                given = row[block.lo : block.hi].masked_fill(masked, MASK)
                view = state.view() if adapters else model.reader(state).view()
                found = without_mask(model.denoise(given[None], t, view)[0])
            number = 0
            for place in range(size):
                shown = adapters and not masked[: place + 1].any()
                opened = masked[place] if not shift else place + 1 == size or masked[place + 1]
                at = block.lo + place + shift
                past = at >= end  # a document that ends with repeated EOS has one more
                if shown or not opened or (past and (adapters or batch.text[block.row, end - 1])):
                    continue
                at -= past
                number += 1
                known = at > block.first and bool(batch.text[block.row, at])
                p = without_mask(ar[0, at - 1 - block.first]) if known else None
                loss = one_loss(recipe, found[place], p, int(row[at]))
                if known and recipe.alignment:
                    pairs = zip(noisy, [clean[i] for i in tower.spec.context_layers], strict=True)
                    apart = [1 - torch.cosine_similarity(a[place], b[at - 1 - block.first], dim=0) for a, b in pairs]
                    loss = loss + recipe.alignment * torch.stack(apart).mean()
                weight = math.exp((1 - number) / recipe.position_decay) if recipe.position_decay else 1.0
                total, weights = total + weight * loss, weights + weight
    return total, weights


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: grad for name, grad in zip(named, found, strict=True) if grad is not None and grad.abs().max() > 1e-12
    }


def same_loss_and_gradients(loss: Tensor, expected: Tensor, model: nn.Module) -> None:
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    fast, slow = gradients(loss, model), gradients(expected, model)
    assert fast.keys() == slow.keys()
    for name, grad in fast.items():
        torch.testing.assert_close(grad, slow[name], rtol=1e-7, atol=1e-9, msg=name)


# --- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shift"), [(EVERY_KIND, 0), ("qwen3_next", 0), (EVERY_KIND, 1), ("hybrid, fewer experts", 1)]
)
def test_a_full_denoiser_equals_block_by_block(name: str, shift: int) -> None:
    """And one that lacks layers, which are aligned with those that they read."""
    if name in SHAPES:
        model = random_two_tower(config_of(name), 8, torch.float64)
    elif name == EVERY_KIND:
        model = build_random_model(name, seed=8, dtype=torch.float64)
    else:
        model = two_tower(name, torch.float64, seed=8)
    training, batch = objective(model, recipe=EVERYTHING, seed=5, shift=shift), packed(block_size=SIZE, seed=1)
    noise = training.draw_noise(batch, SIZE)
    assert noise.pair is not None
    assert noise.pair.masked.any()
    expected, weights = naive(model, batch, noise, SIZE, EVERYTHING, shift)
    assert training.targets(batch, noise) == pytest.approx(weights)
    same_loss_and_gradients(training(batch, noise, SIZE), expected, model)


@pytest.mark.parametrize("name", ["nemotron_h", "gemma2"])
def test_adapters_equal_block_by_block(name: str) -> None:
    model, batch = two_tower(name, torch.float64, seed=8, rank=3), packed(block_size=SIZE, seed=1)
    training = AdapterObjective(model.context, AdapterOptions(mask_token_id=MASK, seed=5, recipe=EVERYTHING))
    noise = training.draw_noise(batch, SIZE)
    assert noise.pair is not None
    expected, weights = naive(model, batch, noise, SIZE, EVERYTHING, 1)
    assert training.targets(batch, noise) == pytest.approx(weights)
    same_loss_and_gradients(training(batch, noise, SIZE), expected, model)


def test_checkpointing_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = two_tower("nemotron_h", torch.float64, seed=8, rank=3), packed(block_size=SIZE, seed=1)
    options = AdapterOptions(mask_token_id=MASK, recipe=EVERYTHING)
    training = AdapterObjective(model.context, options)
    noise = training.draw_noise(batch, SIZE)
    plain = training(batch, noise, SIZE)
    before = gradients(plain, model)
    monkeypatch.setattr(logits_module, "MAX_LOGITS", 5 * model.config.vocab_size)
    training = AdapterObjective(model.context, replace(options, activation_checkpointing=True))
    again = training(batch, noise, SIZE)
    torch.testing.assert_close(again.detach(), plain.detach(), rtol=1e-12, atol=0)
    for name, grad in gradients(again, model).items():
        torch.testing.assert_close(grad, before[name], rtol=1e-9, atol=1e-12)


def test_the_teacher_has_no_gradient_and_runs_every_layer() -> None:
    model, batch = build_random_model("M*E-", seed=8, dtype=torch.float64), packed(block_size=SIZE)
    recipe = Recipe(targets=Targets.parse("kl"))
    training = objective(model, recipe=recipe)
    assert [unit.runs_context for unit in training.units] == [True] * 4
    assert [unit.runs_context for unit in objective(model).units] == [True, True, False, False]
    training(batch, training.draw_noise(batch, SIZE), SIZE).backward()
    assert all(parameter.grad is None for parameter in model.context.parameters())


# --- masks ---------------------------------------------------------------------------------------------------------


def blocks_drawn(name: str, shift: int, size: int = 8, seed: int = 3) -> tuple[Tensor, Tensor, Corruption]:
    """Masks (n, L) and levels (n,) of the trained blocks of 40 rows with this pattern alone, and all masks."""
    batch = packed([((40, "plain"),)] * 40, size, offset="fixed")
    noise = draw_masks(batch, size, Patterns.parse(name), seed=seed, shift=shift)
    trained = batch.denoised.unflatten(1, (-1, size)).all(-1)
    return noise.masked.unflatten(1, (-1, size))[trained], noise.t[trained], noise


@pytest.mark.parametrize("shift", [0, 1])
def test_what_each_pattern_masks(shift: int) -> None:
    size = 8
    for name in PATTERNS:
        masks, t, noise = blocks_drawn(name, shift)
        assert not masks[:, :shift].any()
        share = masks.sum(1) / (size - shift)
        if name in ("draft", "prefix"):
            torch.testing.assert_close(t, share)
            assert torch.equal(masks, masks.cummax(1).values)  # masks to the end of the block
        if name == "draft":
            assert masks[:, shift:].all()
        if name == "prefix":
            assert (~masks).sum(1).unique().tolist() == list(range(1, size))
        if name == "clipped":
            assert 0.3 <= t.min() < 0.33 < 0.77 < t.max() <= 0.8
        if name in ("levels", "clipped", "complementary"):
            assert abs(float((share - t).mean())) < 0.03
        assert (noise.pair is not None) == (name == "complementary")
        if noise.pair is not None:
            both = noise.masked ^ noise.pair.masked
            assert torch.equal(both.unflatten(1, (-1, size))[..., shift:].all(-1), noise.t > 0)
            torch.testing.assert_close(noise.pair.t, 1 - noise.t, atol=2e-3, rtol=0)


def test_shares_are_those_of_the_mixture() -> None:
    masks, _, _ = blocks_drawn("draft:3+prefix:1", 0)
    assert 0.68 < float(masks.all(1).float().mean()) < 0.82


def test_levels_alone_are_the_noise_of_released_training() -> None:
    batch = packed(seed=2)
    drawn = draw_masks(batch, SIZE, AS_RELEASED.patterns, seed=7, scope="block")
    expected = corrupt(batch, SIZE, 7, "block")
    assert torch.equal(drawn.t, expected.t)
    assert torch.equal(drawn.masked, expected.masked)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_row_alone_has_the_masks_that_it_has_in_a_batch(shift: int) -> None:
    batch = packed(seed=2)
    whole = draw_masks(batch, SIZE, EVERYTHING.patterns, seed=7, shift=shift)
    for i in range(len(batch)):
        part = slice(i, i + 1)
        alone = draw_masks(batch.rows(part), SIZE, EVERYTHING.patterns, seed=7, shift=shift)
        for one, other in ((alone, whole.rows(part)), (alone.pair, whole.rows(part).pair)):
            assert one is not None
            assert other is not None
            assert torch.equal(one.masked, other.masked)
            assert torch.equal(one.t, other.t)


def test_a_pair_is_blind_to_the_masks_of_the_other() -> None:
    """The second reading of a block depends neither on tokens that it masks nor on the first reading."""
    model, batch = build_random_model("M*-M", seed=8, dtype=torch.float64), packed(block_size=SIZE, seed=1)
    training = objective(model, recipe=replace(AS_RELEASED, patterns=Patterns.parse("complementary")))
    noise = training.draw_noise(batch, SIZE)
    assert noise.pair is not None
    with torch.no_grad():
        before = training.hidden(batch, noise, SIZE)[0][len(batch) :]
        other = Corruption(noise.t * 0.5, torch.zeros_like(noise.masked), noise.pair)
        after = training.hidden(batch, other, SIZE)[0][len(batch) :]
        assert torch.equal(before, after)
        last = blocks = noise.pair.masked.unflatten(1, (-1, SIZE)).any(-1)
        row, block = (int(i) for i in last.nonzero()[-1])
        columns = slice(block * SIZE, (block + 1) * SIZE)
        tokens = batch.tokens.clone()
        tokens[row, columns] = torch.where(noise.pair.masked[row, columns], 5, tokens[row, columns])
        changed = training.hidden(replace(batch, tokens=tokens), noise, SIZE)[0][len(batch) :]
        assert torch.equal(before[row, columns], changed[row, columns])
        assert blocks.any()


# --- choices -------------------------------------------------------------------------------------------------------


def test_a_recipe_sets_what_is_not_chosen() -> None:
    assert RecipeChoices().resolve(gated=False) == AS_RELEASED
    for name in RECIPES:
        for gated in (False, True):
            recipe = RecipeChoices(recipe=name).resolve(gated=gated)
            assert recipe.targets.teacher
            assert recipe.block_starts == "anywhere"
            chosen = RecipeChoices(recipe=name, patterns="levels", position_decay=0.0, block_starts="prompt")
            assert chosen.resolve(gated=gated) == Recipe(targets=recipe.targets)


BAD = {
    "patterns": ("drafts", "the mixture of patterns is 'drafts', with the part 'drafts'"),
    "targets": ("kl:0.7+kl:0.2", "with the part 'kl:0.2'"),
    "clip_levels": ((0.5, 0.2), "the limits of clipped levels are 0.5,0.2; give 0 < LOW <= HIGH <= 1"),
    "position_decay": (-1.0, "position_decay is -1.0; give 0 or more"),
    "recipe": ("fast", "recipe is 'fast'; choose one of draft, diffusion, both"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_choice_without_meaning_is_refused(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(ArgumentError) as caught:
        RecipeChoices(**{name: value}).resolve(gated=False)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("weight", ["kl:-1", "kl:x", "kl:inf", "kl:", "kl:0"])
def test_weights_are_positive_numbers(weight: str) -> None:
    with pytest.raises(ArgumentError, match=f"with the part '{weight}'"):
        Targets.parse(weight)


@pytest.mark.parametrize(
    "choice", [{"patterns": "draft"}, {"targets": "kl"}, {"position_decay": 4.0}, {"recipe": "both"}]
)
def test_the_likelihood_bound_takes_random_levels_and_tokens_only(choice: dict[str, object]) -> None:
    recipe = RecipeChoices(**choice).resolve(gated=False)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="the likelihood bound"):
        recipe.check_likelihood_bound()


def test_adapters_train_the_columns_from_the_first_mask_on() -> None:
    batch = packed([((16, "plain"),)], 8, offset="fixed")
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, [3, 5, 6]] = True  # of the first block; the second has no mask
    wanted = wanted_columns(batch, Corruption(torch.ones(1, 2), masked), 8, 1, gated=True)
    assert wanted[0].nonzero()[:, 0].tolist() == [4, 5, 7]  # they predict 5, 6 and the token after the block
    everywhere = wanted_columns(batch, Corruption(torch.ones(1, 2), masked), 8, 1)
    assert everywhere[0].nonzero()[:, 0].tolist() == [2, 4, 5, 7]
