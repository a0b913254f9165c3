"""Training: what is masked, that one pass over all blocks is what generation does block by block, and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_KIND, build_random_model
from torch import Tensor, nn

from twotower import TwoTowerError, TwoTowerForCausalLM
from twotower.config import BackboneConfig
from twotower.model.blockwise import context_pass, denoise_all_blocks
from twotower.model.moe import Router
from twotower.training.data import BOS, EOS, MASK, PAD, Batch, Batches, encode, held_out, pad_rows, train_tokenizer
from twotower.training.objective import LOWEST_NOISE, Corruption, ar_loss, corrupt, denoising_loss
from twotower.training.optimizer import MasterWeights, Schedule
from twotower.training.trainer import LoadBalance, Run, train

BLOCK = 4


def documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    """<bos> words <eos>, of the given lengths."""
    rng = torch.Generator().manual_seed(seed)
    return [[BOS, *torch.randint(4, 64, (length - 2,), generator=rng).tolist(), EOS] for length in lengths]


# --- batches ------------------------------------------------------------------------------------------------------


def test_rows_are_padded_to_whole_blocks() -> None:
    batch = pad_rows([[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 9, 9, 2]], lead=[0, 3, 1], block_size=4)
    assert batch.tokens.tolist() == [
        [1, 5, 6, 2, PAD, PAD, PAD, PAD],
        [PAD, PAD, PAD, 1, 7, 2, EOS, EOS],
        [PAD, 1, 8, 9, 9, 9, 2, EOS],
    ]
    assert [row.nonzero()[:, 0].tolist() for row in batch.text] == [[0, 1, 2, 3], [3, 4, 5], [1, 2, 3, 4, 5, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in batch.valid] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6, 7],
        [1, 2, 3, 4, 5, 6, 7],
    ]


def test_an_epoch_visits_every_document_once() -> None:
    docs = documents(*[2 + i % 57 for i in range(600)])
    batches = Batches(docs, tokens_per_batch=100, seed=3)
    visited = [id(row) for step in range(batches.per_epoch) for row in batches.rows(step)]
    assert sorted(visited) == sorted(map(id, docs))


def test_batches_keep_to_their_size_unless_one_document_is_larger() -> None:
    docs = documents(*[2 + 7 * i % 150 for i in range(300)])
    batches = Batches(docs, tokens_per_batch=100, seed=3)
    for step in range(batches.per_epoch):
        rows = batches.rows(step)
        assert len(rows) == 1 or len(rows) * max(map(len, rows)) <= 100


def test_a_batch_depends_on_documents_seed_and_step_alone() -> None:
    docs = documents(*[2 + i % 31 for i in range(400)])
    steps = list(range(0, 200, 7))
    forward, backward = Batches(docs, 80, seed=1), Batches(docs, 80, seed=1)
    expected = [forward.rows(step) for step in steps]
    assert [backward.rows(step) for step in reversed(steps)] == expected[::-1]  # across epochs, in any order
    assert [Batches(docs, 80, seed=2).rows(step) for step in steps] != expected
    assert forward.rows(0) != forward.rows(forward.per_epoch)  # each epoch has its own order


def test_held_out_documents_come_once_each() -> None:
    docs = documents(9, 3, 4, 30, 12)
    seen = [
        row[text].tolist()
        for batch in held_out(docs, 2, BLOCK)
        for row, text in zip(batch.tokens, batch.text, strict=True)
    ]
    assert sorted(seen) == sorted(docs)


def test_a_tokenizer_loses_nothing_and_marks_both_ends() -> None:
    texts = ["Six black cats.", "naïve 🐈 café\n\n\tdone", ""]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert tokenizer.decode(ids) == text
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "<bos>", "<eos>", "<mask>")] == [PAD, BOS, EOS, MASK]


# --- corruption ---------------------------------------------------------------------------------------------------


def test_only_tokens_of_whole_blocks_are_masked() -> None:
    """Never <bos>, never padding, never a first block that the text to be masked does not begin."""
    lead, starts = [0, 1, 3, 0, 1], [0, 1, 3, 0, 6]  # in the last row a prompt comes first
    batch = pad_rows(documents(6, 7, 9, 4, 12), lead, BLOCK)
    may_be = batch.valid & (batch.tokens != BOS)
    for row, first in enumerate([0, BLOCK, BLOCK, 0, 2 * BLOCK]):
        may_be[row, :first] = False
    ever = torch.zeros_like(may_be)
    for seed in range(200):
        ever |= corrupt(batch, torch.tensor(starts), BLOCK, torch.Generator().manual_seed(seed)).masked
    assert torch.equal(ever, may_be)


def test_each_token_is_masked_with_probability_t() -> None:
    batch = pad_rows(documents(*[402] * 64), [0] * 64, BLOCK)
    noise = corrupt(batch, torch.zeros(64, dtype=torch.long), BLOCK, torch.Generator().manual_seed(0))
    assert noise.t.min() > LOWEST_NOISE
    assert noise.t.max() <= 1
    assert noise.t.sort().values.diff().max() < 1.1 / 64  # spread evenly over the batch
    share = noise.masked[:, 1:].float().mean(1)
    assert (share - noise.t).abs().max() < 0.1  # four standard deviations of 400 tokens


def test_corruption_repeats_with_its_generator() -> None:
    batch = pad_rows(documents(30, 40), [0, 2], BLOCK)
    first, again, other = (
        corrupt(batch, torch.tensor([0, 2]), BLOCK, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.masked, again.masked)
    assert torch.equal(first.t, again.t)
    assert not torch.equal(first.masked, other.masked)


# --- the objective ------------------------------------------------------------------------------------------------


def noisy_batch(block_size: int, dtype: torch.dtype = torch.float64) -> tuple[Batch, Corruption]:
    """Ragged documents at several offsets, masks in each."""
    starts = [0, 1, block_size - 1, 2]
    batch = pad_rows(documents(9, 22, 14, 11), starts, block_size)
    noise = corrupt(batch, torch.tensor(starts), block_size, torch.Generator().manual_seed(5))
    assert noise.masked.any(1).all()
    return batch, Corruption(noise.t.to(dtype), noise.masked)


def blocks_of(batch: Batch, block_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, first column of its text, first and last column of a block's own tokens), block by block."""
    for row, valid in enumerate(batch.valid):
        first, end = int(valid.nonzero()[0]), int(valid.nonzero()[-1]) + 1
        for at in range(0, end, block_size):
            if at + block_size > first:
                yield row, first, max(at, first), at + block_size


def logits_block_by_block(model: TwoTowerForCausalLM, batch: Batch, noise: Corruption, block_size: int) -> Tensor:
    """What generation would compute: for each block, prefill all before it, then denoise it. Zeros at padding."""
    noisy = batch.tokens.masked_fill(noise.masked, MASK)
    logits = torch.zeros(*noisy.shape, model.config.vocab_size, dtype=torch.float64)
    for row, first, at, end in blocks_of(batch, block_size):
        state = model.new_state(1, end)
        before = batch.tokens[row, first:at][None]
        model.prefill(before, torch.tensor([at - first]), state)
        logits[row, at:end] = model.denoise(noisy[row, at:end][None], noise.t[row : row + 1], state.view())[0]
    return logits


@pytest.mark.parametrize("block_size", [BLOCK, 7])
@pytest.mark.parametrize("pattern", ["M", "*", "E-", EVERY_KIND])
def test_one_pass_over_all_blocks_equals_generation_block_by_block(pattern: str, block_size: int) -> None:
    """Logits at every position that counts, the loss, and the gradient of every parameter it trains."""
    model = build_random_model(pattern, seed=8, dtype=torch.float64)
    model.context.requires_grad_(False)
    batch, noise = noisy_batch(block_size)
    expected = logits_block_by_block(model, batch, noise, block_size)

    _, coupling = context_pass(model.context, batch.tokens, batch.valid, block_size)
    noisy = batch.tokens.masked_fill(noise.masked, MASK)
    hidden = denoise_all_blocks(model.denoiser, noisy, batch.valid, model.time(noise.t), coupling, block_size)
    torch.testing.assert_close(model.denoiser.head(hidden)[batch.valid], expected[batch.valid], rtol=1e-9, atol=1e-9)

    loss, count = denoising_loss(model.context, model.denoiser, model.time, batch, noise, block_size)
    slow = F.cross_entropy(expected[noise.masked], batch.tokens[noise.masked], reduction="sum")
    assert count == noise.masked.sum()
    torch.testing.assert_close(loss, slow, rtol=1e-10, atol=1e-9)

    trained = [*model.denoiser.parameters(), *model.time.parameters()]
    for fast, exact in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(slow, trained), strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_one_pass_without_padding_and_without_time() -> None:
    model = build_random_model(EVERY_KIND, seed=8, dtype=torch.float64)
    tokens, noisy = (torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    _, coupling = context_pass(model.context, tokens, None, BLOCK)
    logits = model.denoiser.head(denoise_all_blocks(model.denoiser, noisy, None, None, coupling, BLOCK))
    for at in range(0, 12, BLOCK):
        state = model.new_state(2, 12)
        model.prefill(tokens[:, :at], torch.tensor([at, at]), state)
        expected = model.denoise(noisy[:, at : at + BLOCK], None, state.view())
        torch.testing.assert_close(logits[:, at : at + BLOCK], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_block_sees_neither_what_its_masks_hide_nor_what_comes_later() -> None:
    """Both are replaced, block by block: predictions up to and including that block stay what they were."""
    model = build_random_model(EVERY_KIND, seed=8, dtype=torch.float64)
    batch, noise = noisy_batch(BLOCK)
    column = torch.arange(batch.tokens.shape[1])
    other = batch.tokens % 60 + 4  # another word everywhere

    def logits(tokens: Tensor) -> Tensor:
        _, coupling = context_pass(model.context, tokens, batch.valid, BLOCK)
        noisy = tokens.masked_fill(noise.masked, MASK)
        hidden = denoise_all_blocks(model.denoiser, noisy, batch.valid, model.time(noise.t), coupling, BLOCK)
        return model.denoiser.head(hidden)

    before = logits(batch.tokens)
    reached = False
    for start in range(0, len(column), BLOCK):
        end = start + BLOCK
        behind_masks = noise.masked & (column >= start) & (column < end)
        after = logits(torch.where(behind_masks | (column >= end), other, batch.tokens))
        seen = batch.valid & (column < end)
        torch.testing.assert_close(after[seen], before[seen], rtol=1e-9, atol=1e-9)
        reached |= not torch.allclose(after[batch.valid], before[batch.valid])
    assert reached  # later blocks do read the clean tokens


def test_gradients_reach_the_denoiser_and_the_time_conditioning_only() -> None:
    model = build_random_model(EVERY_KIND, seed=8)
    batch, noise = noisy_batch(BLOCK, torch.float32)
    loss, _ = denoising_loss(model.context, model.denoiser, model.time, batch, noise, BLOCK)
    loss.backward()
    assert all(p.grad is None for p in model.context.parameters())
    for part in (model.denoiser, model.time):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_loss_reads_its_targets_at_the_same_position() -> None:
    """Only a masked position's own token is its target: changing any other leaves that block's loss alone."""
    model = build_random_model(EVERY_KIND, seed=8, dtype=torch.float64)
    batch = pad_rows(documents(BLOCK), [0], BLOCK)
    masked = torch.tensor([[False, False, True, False]])
    noise = Corruption(torch.tensor([0.5], dtype=torch.float64), masked)
    loss, count = denoising_loss(model.context, model.denoiser, model.time, batch, noise, BLOCK)
    view = model.new_state(1, BLOCK).view()
    logits = model.denoise(batch.tokens.masked_fill(masked, MASK), noise.t, view)[0, 2]
    assert count == 1
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[batch.tokens[0, 2]])


@torch.no_grad()
def test_the_next_token_loss_of_a_batch_is_that_of_its_rows() -> None:
    """Over each document's own tokens after the first; neither padding nor a neighbour counts."""
    model = build_random_model(EVERY_KIND, seed=8, dtype=torch.float64)
    docs = documents(9, 22, 5)
    loss, count = ar_loss(model.context, pad_rows(docs, [0, 1, 3], BLOCK), BLOCK)
    alone = 0.0
    for doc in docs:
        logits = model(torch.tensor([doc])).logits[0, :-1]
        alone += F.cross_entropy(logits, torch.tensor(doc[1:]), reduction="sum")
    assert count == sum(len(doc) - 1 for doc in docs)
    torch.testing.assert_close(loss, alone, rtol=1e-10, atol=1e-9)


# --- the optimizer ------------------------------------------------------------------------------------------------


def test_schedule_warms_up_stays_and_decays() -> None:
    schedule = Schedule(steps=1000, peak=1e-3, warmup=100, decay=0.3, final=0.01)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:701] == pytest.approx([1e-3] * 602)
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert rates[850] == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
    assert rates[-1] == pytest.approx(1e-5, rel=0.35)  # one step before `final` is reached
    assert min(rates) >= 1e-5


def test_updates_too_small_for_bf16_are_not_lost() -> None:
    """A weight of 1 in bf16 cannot move by 1e-4; the fp32 master can, and after enough of them the weight does."""
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    optimizer = MasterWeights([layer], weight_decay=0.0)
    for step in range(60):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step(rate=1e-4, scale=1.0)
        if step == 0:
            assert (layer.weight == 1).all()
    torch.testing.assert_close(layer.weight.float(), torch.full((4, 4), 1 - 60e-4), rtol=0, atol=4e-3)
    assert (layer.weight < 1).all()


def test_the_reported_norm_is_that_of_the_mean_gradient_and_large_ones_are_clipped() -> None:
    layer = nn.Linear(2, 1, bias=False)
    optimizer = MasterWeights([layer], clip=1.0)
    layer.weight.grad = torch.tensor([[30.0, 40.0]])
    assert optimizer.step(rate=0.0, scale=0.1).item() == pytest.approx(5.0)
    assert optimizer.masters[0].grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert layer.weight.grad is None  # ready for the next step


def test_only_matrices_decay() -> None:
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    MasterWeights([layer], weight_decay=0.1).step(rate=0.5, scale=1.0)  # no gradients: decay alone
    torch.testing.assert_close(layer.weight, torch.full((3, 3), 0.95))
    torch.testing.assert_close(layer.bias, torch.ones(3))


def skewed_router() -> Router:
    """Prefers the first of eight experts, whatever it reads."""
    config = BackboneConfig(hybrid_override_pattern="E", hidden_size=8, vocab_size=4, num_experts_per_tok=2)
    router = Router(config)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.3)
        router.weight[0] += 1.0
    return router


def test_load_balance_moves_each_bias_towards_an_even_load() -> None:
    torch.manual_seed(0)
    router = skewed_router()
    balance = LoadBalance([router], rate=0.01)
    hidden = torch.rand(500, 8)
    choice, _ = router(hidden)
    load = torch.bincount(choice.flatten(), minlength=8)
    balance.step()
    torch.testing.assert_close(router.e_score_correction_bias, 0.01 * torch.sign(load.float().mean() - load))
    for _ in range(300):
        choice, _ = router(torch.rand(500, 8))
        balance.step()
    loads = torch.bincount(choice.flatten(), minlength=8)
    assert load.max() > 3 * load.float().mean()
    assert loads.max() < 1.5 * loads.float().mean()


# --- the loop -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a machine that went away."""


def run_training(directory: Path, steps: int, kill_at: int | None = None, every: tuple[int, int] = (4, 2)) -> nn.Module:
    """Some steps on a tiny tower with experts; continues what is in `directory`."""
    tower = build_random_model("M*E", seed=9).context
    docs = documents(*range(4, 24))
    batches = Batches(docs, 60, seed=0)

    def loss_at(step: int) -> tuple[Tensor, int]:
        if step == kill_at:
            raise Killed
        rows = batches.rows(step)
        return ar_loss(tower, pad_rows(rows, [0] * len(rows), BLOCK), BLOCK)

    schedule = Schedule(steps=steps, peak=1e-2, warmup=3)
    checkpoint_every, log_every = every
    run = Run(directory=directory, schedule=schedule, checkpoint_every=checkpoint_every, log_every=log_every)
    train(run, [tower], loss_at)
    return tower


def log_of(directory: Path) -> list[dict[str, float]]:
    """Without the fields that measure time."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    timed = {"targets_per_second", "seconds"}
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


@pytest.mark.parametrize("every", [(4, 2), (3, 4)], ids=["aligned", "log windows across checkpoints"])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, every: tuple[int, int]) -> None:
    """Killed twice, once with log lines beyond the last checkpoint: same log, same weights, same selection biases."""
    whole = run_training(tmp_path / "whole", 14, every=every)
    for kill_at in (2, 7, 11):
        with pytest.raises(Killed):
            run_training(tmp_path / "killed", 14, kill_at, every)
    resumed = run_training(tmp_path / "killed", 14, every=every)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    untrained = build_random_model("M*E", seed=9).context.state_dict()
    biases = [name for name in untrained if name.endswith("e_score_correction_bias")]
    assert not torch.equal(untrained[biases[0]], whole.state_dict()[biases[0]])


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    done = run_training(tmp_path, 6).state_dict()
    again = run_training(tmp_path, 6, kill_at=0).state_dict()
    assert all(torch.equal(again[name], value) for name, value in done.items())


def test_training_learns(tmp_path: Path) -> None:
    """Random words have entropy ln(60); a few passes over twenty documents must already learn them by heart."""
    run_training(tmp_path, 60, every=(60, 10))
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert losses[-1] < losses[0] - 1
    assert losses[0] > math.log(60) - 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    layer = nn.Linear(1, 1)
    run = Run(directory=tmp_path, schedule=Schedule(steps=3, peak=1.0))
    with pytest.raises(TwoTowerError, match=r"loss is nan at step 0.*checkpoint\.pt"):
        train(run, [layer], lambda step: (layer.weight.sum() * math.nan, 1))
