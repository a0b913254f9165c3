"""How likely a model finds given text: exactly, by the context tower, or as the denoiser's bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.decoding.output import Generation
from twotower.errors import ArgumentError
from twotower.model.packed_forward import Layout, context_pass
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.ops.precision import upcast
from twotower.training.data import Piece, lay_out
from twotower.training.data.batch import Batch
from twotower.training.data.packing import whole
from twotower.training.noise import Corruption
from twotower.training.objective import (
    AutoregressiveObjective,
    DenoisingObjective,
    DenoisingOptions,
    in_pieces,
)

Item = TypeVar("Item")
Pair = tuple[Sequence[int], Sequence[int]]  # token ids: what is given (at least one), and its continuation
MAX_BATCH_TOKENS = 8192  # of a batch, padding included
PAD = 0
Progress = Callable[[int], object] | None


@dataclass(frozen=True)
class Likelihood:
    """log_prob: ln P(continuation | what is given), nats; greedy: whether AR would have written just that."""

    log_prob: float
    greedy: bool


@torch.no_grad()
def continuation_likelihood(
    model: TwoTowerForCausalLM, pairs: Sequence[Pair], progress: Progress = None
) -> list[Likelihood]:
    """By the context tower, as an ordinary AR model. Pairs that differ in their last token only (the answers A to D of
    one question) are read once. progress: told how many pairs are done."""
    _check(pairs)
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (given, continuation) in enumerate(pairs):
        asked.setdefault((*given, *continuation)[:-1], []).append(number)
    found: dict[int, Likelihood] = {}
    for texts in _batches(list(asked), len):
        hidden = _read(model, texts)
        rows = [(row, number) for row, text in enumerate(texts) for number in asked[text]]
        for row, number in rows:
            given, continuation = pairs[number]
            found[number] = _score(model, hidden[row, len(given) - 1 :][: len(continuation)], continuation)
        if progress is not None:
            progress(len(found))
    return [found[number] for number in range(len(pairs))]


def _read(model: TwoTowerForCausalLM, texts: Sequence[Sequence[int]]) -> Tensor:
    """→ the context tower's final hidden states (rows, longest rounded up, H)."""
    chunk = model.context.config.chunk_size
    pieces = [[Piece(np.array(text, dtype=np.int32), 0, 0, False)] for text in texts]
    batch = lay_out(pieces, range(len(texts)), whole(max(map(len, texts)), chunk), chunk, eos=PAD, pad=PAD)
    batch = batch.to(model.device)
    return context_pass(model.context, batch.tokens, Layout(batch.document, chunk))


def _score(model: TwoTowerForCausalLM, hidden: Tensor, continuation: Sequence[int]) -> Likelihood:
    """hidden (N, H) at the positions before each token of the continuation (N,)."""
    tokens = torch.tensor(continuation, device=hidden.device)
    total, greedy = 0.0, True
    for h, y in in_pieces(model.context.head, hidden, tokens):
        chances = upcast(model.context.head(h)).log_softmax(-1)
        total += float(chances.gather(-1, y[:, None]).sum())
        greedy = greedy and bool((chances.argmax(-1) == y).all())
    return Likelihood(total, greedy)


@torch.no_grad()
def continuation_bound(
    model: TwoTowerForCausalLM,
    pairs: Sequence[Pair],
    *,
    block_size: int = 16,
    samples: int = 8,
    seed: int = 0,
    progress: Progress = None,
) -> list[float]:
    """A lower bound of ln P(continuation | what is given) under the denoiser, nats, estimated from `samples` draws.

    Blocks begin where the continuation does. A block whose n tokens are decided in a random order, each given those
    before it, has E[ln P] = −E_m[n/m · Σ −ln p(masked)], m uniform on 1…n and the m masked ones drawn at random
    (Hoogeboom et al. 2021, arXiv:2110.02037, eq. 3), which is a lower bound by Jensen's inequality. Positions after the
    continuation stay masked, as in generation, and t is the masked share of the block.

    Raises:
        ArgumentError: no denoiser, towers on two devices, or an empty side of a pair.
    """
    _check(pairs)
    if model.denoiser is None or model.time is None:
        raise ArgumentError('the bound is the denoiser\'s; load the model with towers="both"')
    if model.denoiser.device != model.device:
        raise ArgumentError("the bound needs both towers on one device; load the model with one")
    options = DenoisingOptions(mask_token_id=model.config.mask_token, train_context=model.context is model.denoiser)
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    objective = DenoisingObjective(model.context, model.denoiser, model.time, options)
    try:
        return _bounds(objective, model.device, pairs, block_size, samples, seed, progress)
    finally:
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)


def _bounds(
    objective: DenoisingObjective,
    device: torch.device,
    pairs: Sequence[Pair],
    block_size: int,
    samples: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    sums = [0.0] * len(pairs)
    draws = list(enumerate(number for number in range(len(pairs)) for _ in range(samples)))
    done = 0
    for part in _batches(draws, lambda draw: sum(map(len, pairs[draw[1]])) + 2 * block_size):
        batch = _prompted([pairs[number] for _, number in part], block_size)
        noise, weight = _any_order(batch, block_size, samples, [place for place, _ in part], seed)
        nll, _ = objective.denoise(batch.to(device), noise.to(device), block_size)
        weighted = torch.zeros(noise.masked.shape, dtype=torch.float64)
        weighted[noise.masked] = nll.double().cpu()
        for (_, number), value in zip(part, (weighted * weight).sum(1).tolist(), strict=True):
            sums[number] -= value / samples
        done += len(part)
        if progress is not None:
            progress(done // samples)
    return sums


def _prompted(pairs: Sequence[Pair], block_size: int) -> Batch:
    """A pair a row; its blocks begin where the continuation does, the last one's tail is filled."""
    pieces = [
        [Piece(np.array([*given, *text], dtype=np.int32), len(given), -len(given) % block_size, True, True)]
        for given, text in pairs
    ]
    longest = max(piece.columns(block_size) for (piece,) in pieces)
    return lay_out(pieces, range(len(pieces)), longest, block_size, eos=PAD, pad=PAD)


def _any_order(
    batch: Batch, block_size: int, samples: int, places: Sequence[int], seed: int
) -> tuple[Corruption, Tensor]:
    """Masks of one draw a row, and the weight (B, S) of each column's −ln p: n/m where it counts.

    places: the number of each row's draw; the m of `samples` successive ones are spread evenly over 1…n.
    """
    scored = (batch.denoised & batch.text).unflatten(1, (-1, block_size))
    tail = (batch.denoised & ~batch.text).unflatten(1, (-1, block_size))
    count = scored.sum(-1)
    offset, order = torch.empty(count.shape), torch.empty(scored.shape)
    for row, place in enumerate(places):
        shared = torch.Generator().manual_seed(seed + place // samples)
        offset[row] = (torch.rand(count.shape[1], generator=shared) + (place % samples) / samples) % 1.0
        order[row] = torch.rand(scored.shape[1:], generator=torch.Generator().manual_seed(seed + 7_919 * (place + 1)))
    size = 1 + (offset * count).long().clamp(max=(count - 1).clamp(min=0))
    size = torch.where(count > 0, size, 0)
    rank = order.masked_fill(~scored, 2.0).argsort(-1).argsort(-1)
    masked = scored & (rank < size[..., None])
    weight = torch.where(masked, (count / size.clamp(min=1))[..., None].double(), 0.0)
    hidden = masked | tail
    return Corruption(hidden.float().mean(-1), hidden.flatten(1)), weight.flatten(1)


def ar_nats(model: TwoTowerForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Summed −ln P of the context tower over every token after each document's first (its EOS included)."""
    chunk = model.config.backbone.chunk_size
    objective = AutoregressiveObjective(model.context)
    with torch.no_grad():
        return sum(float(objective(batch, None, chunk)) for batch in _documents(documents, 16, chunk))


def continuation_nats(
    model: TwoTowerForCausalLM, prompts: Sequence[list[int]], results: Sequence[Generation]
) -> tuple[float, int]:
    """−ln P of the context tower, summed over the new tokens only, and their number."""
    whole = ar_nats(model, [[*prompt, *result.tokens] for prompt, result in zip(prompts, results, strict=True)])
    return whole - ar_nats(model, prompts), sum(len(result.tokens) for result in results)


def _documents(documents: Sequence[Sequence[int]], rows: int, chunk: int) -> Iterator[Batch]:
    """Like lengths together, a document a row."""
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), rows):
        pieces = [[Piece(np.array(d, dtype=np.int32), 0, 0, False)] for d in ordered[start : start + rows]]
        length = whole(len(ordered[min(start + rows, len(ordered)) - 1]), chunk)
        yield lay_out(pieces, range(len(pieces)), length, chunk, eos=PAD, pad=PAD)


def _check(pairs: Sequence[Pair]) -> None:
    for number, (given, continuation) in enumerate(pairs):
        if not given or not continuation:
            raise ArgumentError(f"pair {number} has an empty {'continuation' if given else 'beginning'}; give a token")


def _batches(items: list[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Like lengths together, at most `MAX_BATCH_TOKENS` padded columns each."""
    ordered = sorted(items, key=length)
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end + 1 - start) * length(ordered[end]) <= MAX_BATCH_TOKENS:
            end += 1
        yield ordered[start:end]
        start = end
