"""The figures of free diffusion in validation, compared with one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packed import EOS, MASK, packed
from tiny_backbones import two_tower

from twotower.decoding.params import GenerationParams
from twotower.engine.generation import generate
from twotower.training import fsdp
from twotower.training.data.batch import Batch
from twotower.training.validation.kept import TextsKept, answers

RECORDS = [((14, "prompted"), (9, "prompted"), (11, "bos")), ((12, "prompted"), (6, "prompted"))]
PARAMS = GenerationParams.of(
    mode="verified", draft_steps=1, block_size=4, mask_token_id=MASK, max_new_tokens=8, eos_token_id=2, seed=0
)


@pytest.fixture
def world() -> Iterator[fsdp.World]:
    yield fsdp.start("cpu")
    fsdp.stop()


def test_figures_are_those_of_one_prompt_at_a_time(world: fsdp.World) -> None:
    model = two_tower("llama", torch.float64, seed=8, rank=3)
    batch = packed(RECORDS, offset="fixed")
    found = [pair for _, *pair in answers(batch, 0, (EOS,))]
    assert len(found) == 4  # each record that has a prompt
    assert [len(prompt) + len(answer) for prompt, answer in found] == [14, 9, 12, 6]
    kept = TextsKept(model, [[batch]], PARAMS, world, shift=0)
    fitting = [(prompt, answer) for prompt, answer in found if len(answer) <= 8]
    assert kept.own == fitting
    texts = [[generate(model, [prompt], params)[0] for prompt, _ in fitting] for params in (kept.ar, kept.diffusion)]
    ar, free = ([one.tokens for one in side] for side in texts)
    record = kept.measure()
    assert record["texts_kept"] == sum(a == b for a, b in zip(ar, free, strict=True)) / len(fitting)
    assert record["free_tokens"] == sum(map(len, free)) / sum(one.passes for one in texts[1])
    assert record["ar_accuracy"] == 0
    assert "accuracy_kept" not in record


def test_right_answers_are_counted(world: fsdp.World) -> None:
    model = two_tower("llama", torch.float64, seed=8, rank=3)
    kept = TextsKept(model, [[packed(RECORDS, offset="fixed")]], PARAMS, world, shift=0)
    written = [one.tokens for one in generate(model, [prompt for prompt, _ in kept.own], kept.ar)]
    free = [one.tokens for one in generate(model, [prompt for prompt, _ in kept.own], kept.diffusion)]
    kept.own = [(prompt, text) for (prompt, _), text in zip(kept.own, written, strict=True)]
    record = kept.measure()
    assert record["ar_accuracy"] == 1
    assert record["accuracy_kept"] == record["texts_kept"]
    kept.own = [(prompt, text) for (prompt, _), text in zip(kept.own, free, strict=True)]
    same = sum(a == b for a, b in zip(written, free, strict=True))
    assert kept.measure().get("accuracy_kept") == (len(free) / same if same else None)


def test_a_record_cut_at_the_end_of_a_row_has_no_answer() -> None:
    batch = packed(RECORDS, offset="fixed")
    cut = Batch(*(value[:, :8] if value is not None and value.dim() > 1 else value for value in vars(batch).values()))
    assert list(answers(batch, 0, (EOS,)))
    assert not list(answers(cut, 0, (EOS,)))
