"""Packed batches for tests of the objective, and its reference: one block at a time, as in generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from conftest import EVERY_KIND, build_random_model
from tiny_backbones import two_tower
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.training.data import BOS, EOS, MASK, PAD, Batch, Document, collate, to_piece
from twotower.training.data.packing import Offset, round_up
from twotower.training.noise import Corruption, NoiseScope, corrupt
from twotower.training.objective import DenoisingObjective, DenoisingOptions

Verb = Literal["prefill", "extend"]
Kind = Literal["bos", "prompted", "plain", "fragment"]
ROWS: tuple[tuple[tuple[int, Kind], ...], ...] = (
    ((7, "prompted"), (14, "bos"), (3, "plain")),
    ((1, "plain"), (19, "bos")),
    ((10, "fragment"), (9, "prompted")),
)


def document(length: int, kind: Kind, seed: int = 0) -> Document:
    """Random words of a kind. bos: begins with BOS, ends with EOS. prompted: a third is the prompt, ends with EOS.

    plain: trained from the first token. fragment: has no end, so an incomplete last block is not trained.
    """
    tokens = np.random.default_rng([seed, length]).integers(4, 64, length).astype(np.int32)
    if kind in ("bos", "prompted") and length > 1:
        tokens[0], tokens[-1] = BOS, EOS
    context = {"bos": 1, "prompted": max(length // 3, 1), "plain": 0, "fragment": 0}[kind]
    return Document(tokens, context, kind == "prompted", kind != "fragment")


def packed(
    rows: Sequence[Sequence[tuple[int, Kind]]] = ROWS,
    block_size: int = 4,
    *,
    seed: int = 0,
    offset: Offset = "random",
    first_index: int = 0,
) -> Batch:
    """Rows of documents, one after another, with random block offsets, padded to the longest row."""
    pieces = [
        [to_piece(document(length, kind, seed), block_size, offset, seed, r, n) for n, (length, kind) in enumerate(row)]
        for r, row in enumerate(rows)
    ]
    length = max(sum(piece.columns(block_size) for piece in row) for row in pieces)
    index = range(first_index, first_index + len(rows))
    return collate(pieces, index, round_up(length, block_size), block_size, eos=EOS, pad=PAD)


def objective(model: TwoTowerForCausalLM, *, tied: bool = False, **options: object) -> DenoisingObjective:
    """The objective of a model's two towers, or of its context tower in both roles."""
    assert model.denoiser is not None
    assert model.time is not None
    settings = DenoisingOptions(mask_token_id=MASK, **options)  # type: ignore[arg-type]
    return DenoisingObjective(model.context, model.context if tied else model.denoiser, model.time, settings)


class Case(NamedTuple):
    """A random model, a packed batch and its noise."""

    model: TwoTowerForCausalLM
    batch: Batch
    noise: Corruption
    block_size: int


def case(
    pattern: str = EVERY_KIND,
    block_size: int = 4,
    scope: NoiseScope = "block",
    dtype: torch.dtype = torch.float64,
    rows: Sequence[Sequence[tuple[int, Kind]]] = ROWS,
    backbone: str | None = None,
    **overrides: object,
) -> Case:
    """A case in which all weights are random, those of time conditioning included: no modulation is the identity.

    backbone: a name of `tiny_backbones.SHAPES`, instead of the pattern.
    """
    if backbone is None:
        model = build_random_model(pattern, seed=8, dtype=dtype, **overrides)
    else:
        model = two_tower(backbone, dtype, seed=8, **overrides)
    batch = packed(rows, block_size, seed=1)
    noise = corrupt(batch, block_size, seed=4, scope=scope)
    assert noise.masked.any(1).all()
    return Case(model, batch, noise, block_size)


class Block(NamedTuple):
    """One block of one document: positions lo … hi of its row; `first` is the document's first position."""

    row: int
    number: int
    first: int
    lo: int
    hi: int


def blocks_of(batch: Batch, block_size: int) -> Iterator[Block]:
    """The blocks by row and position, without leading padding, and without blocks that end in padding."""
    for row, owner in enumerate(batch.document.tolist()):
        for number in sorted(set(owner) - {-1}):
            first, end = owner.index(number), len(owner) - owner[::-1].index(number)
            for lo in range(first // block_size * block_size, end - block_size + 1, block_size):
                yield Block(row, number, first, max(lo, first), lo + block_size)


def naive_nll(
    model: TwoTowerForCausalLM,
    batch: Batch,
    noise: Corruption,
    block_size: int,
    *,
    time: bool = True,
    by: Verb = "prefill",
) -> Tensor:
    """−ln p (N,) of the true token at each masked position, computed with generation's functions on a `TowerState`.

    by "prefill": each block after a prefill of its document up to the block. by "extend": block by block on one state.
    """
    found = []
    state = None
    for row, _, first, lo, hi in blocks_of(batch, block_size):
        tokens = batch.tokens[row, first:hi]
        before, block = tokens[: lo - first], tokens[lo - first :]
        if by == "prefill" or lo == first:
            state = model.new_state(1, len(tokens))
        assert state is not None
        masked = noise.masked[row, lo:hi]
        if by == "prefill" and lo > first:
            if not masked.any():
                continue
            model.prefill(before[None], torch.tensor([lo - first]), state)
        if masked.any():
            t = noise.t[row, lo // block_size][None] if time else None
            logits = model.denoise(block.masked_fill(masked, MASK)[None], t, model.reader(state).view())
            found.append(F.cross_entropy(logits[0, masked], block[masked], reduction="none"))
        if by == "extend":
            model.extend(block[None], state, logits=False)
    return torch.cat(found)


def naive_next_token_nll(model: TwoTowerForCausalLM, batch: Batch, prompts: bool = True) -> Tensor:
    """−ln p (N,) of the tokens after the first of each document, one document at a time."""
    found = []
    for row, owner in enumerate(batch.document):
        for number in range(int(owner.max()) + 1):
            own = (owner == number) & batch.text[row]
            tokens, given = batch.tokens[row, own], batch.prompt[row, own]
            logits = model.extend(tokens[None], model.new_state(1, len(tokens)))
            assert logits is not None
            nll = F.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
            found.append(nll if prompts else nll[~given[1:]])
    return torch.cat(found)


def deviation(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = float(expected.abs().max())
    return float((actual - expected).abs().max()) / (scale or 1.0)
