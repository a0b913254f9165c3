"""Log-likelihood of given text: exact under the context tower, or a lower bound under the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.decoding.output import Generation
from twotower.errors import ArgumentError
from twotower.model.packed_forward import context_pass
from twotower.model.packed_layout import Layout
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training.data import Piece, collate
from twotower.training.data.batch import Batch
from twotower.training.data.packing import round_up
from twotower.training.logits import in_chunks
from twotower.training.noise import Corruption
from twotower.training.objective import (
    AutoregressiveObjective,
    DenoisingObjective,
    DenoisingOptions,
)

Item = TypeVar("Item")
Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a prefix and of its continuation, at least one each
MAX_BATCH_TOKENS = 8192  # padding included
PAD = 0
Progress = Callable[[int], object] | None


@dataclass(frozen=True)
class Likelihood:
    """log_prob: ln P(continuation | prefix) in nats; greedy: whether greedy AR writes this continuation."""

    log_prob: float
    greedy: bool


@torch.no_grad()
def continuation_likelihood(
    model: TwoTowerForCausalLM, pairs: Sequence[Pair], progress: Progress = None
) -> list[Likelihood]:
    """Log-likelihood of each continuation under the context tower, which is an ordinary AR model.

    Pairs that differ only in the last token (for example, answers A to D of one question) share one pass.
    progress: called with the number of pairs that are done.
    """
    _check(pairs)
    pairs_of_text: dict[tuple[int, ...], list[int]] = {}
    for number, (given, continuation) in enumerate(pairs):
        pairs_of_text.setdefault((*given, *continuation)[:-1], []).append(number)
    found: dict[int, Likelihood] = {}
    for texts in _batches(list(pairs_of_text), len):
        hidden = _read(model, texts)
        rows = [(row, number) for row, text in enumerate(texts) for number in pairs_of_text[text]]
        for row, number in rows:
            given, continuation = pairs[number]
            found[number] = _score(model, hidden[row, len(given) - 1 :][: len(continuation)], continuation)
        if progress is not None:
            progress(len(found))
    return [found[number] for number in range(len(pairs))]


def _read(model: TwoTowerForCausalLM, texts: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states of the context tower: (rows, longest text rounded up to a chunk, H)."""
    chunk = model.spec.chunk_size
    pieces = [[Piece(np.array(text, dtype=np.int32), 0, 0, False)] for text in texts]
    batch = collate(pieces, range(len(texts)), round_up(max(map(len, texts)), chunk), chunk, eos=PAD, pad=PAD)
    batch = batch.to(model.device)
    return context_pass(model.context, batch.tokens, Layout(batch.document, chunk))


def _score(model: TwoTowerForCausalLM, hidden: Tensor, continuation: Sequence[int]) -> Likelihood:
    """Scores a continuation of N tokens; hidden: (N, H), at the position before each token."""
    tokens = torch.tensor(continuation, device=hidden.device)
    total, greedy = 0.0, True
    for h, y in in_chunks(model.context, hidden, tokens):
        chances = model.context.logits(h).log_softmax(-1)
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
    """A lower bound of ln P(continuation | prefix) under the denoiser in nats, estimated from `samples` draws.

    The first block begins at the continuation. If the n tokens of a block are decided in a random order, each given
    the earlier ones, then E[ln P] = −E_m[n/m · Σ −ln p(masked)]; m is uniform on 1…n, and m random positions are masked
    (Hoogeboom et al. 2021, arXiv:2110.02037, eq. 3). By Jensen's inequality this is a lower bound. Positions after the
    continuation stay masked, as in generation; t is the masked fraction of the block.

    Raises:
        ArgumentError: no denoiser, towers on two devices, or an empty prefix or continuation.
    """
    _check(pairs)
    if model.has_adapters:
        raise ArgumentError('likelihood "bound" needs a denoiser tower, and this model has adapters; use "ar"')
    choices = model.config.denoiser
    if choices.prediction_shift or choices.first_from_ar:
        raise ArgumentError(
            'likelihood "bound" needs a denoiser that predicts every token of a block, and here the context tower '
            'chooses one of them; use "ar"'
        )
    if choices.draft_head is not None:
        raise ArgumentError(
            'likelihood "bound" needs a denoiser without a draft head, which reads tokens under masks; use "ar"'
        )
    if model.denoiser is None or model.time is None:
        raise ArgumentError('likelihood "bound" needs the denoiser; load the model with towers="both"')
    if model.denoiser.device != model.device:
        raise ArgumentError('likelihood "bound" needs both towers on one device; load the model on one device')
    options = DenoisingOptions(
        mask_token_id=model.config.mask_token,
        train_context=model.context is model.denoiser,
        prefix_causal=choices.block_attention == "prefix_causal",
    )
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    objective = DenoisingObjective(model.context, model.denoiser, model.time, options)
    try:
        return _bounds(objective, model.device, pairs, block_size, samples, seed, progress)
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


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
    """One pair per row; the blocks begin at the continuation, and the last block is filled up."""
    pieces = [
        [Piece(np.array([*given, *text], dtype=np.int32), len(given), -len(given) % block_size, True, True)]
        for given, text in pairs
    ]
    longest = max(piece.columns(block_size) for (piece,) in pieces)
    return collate(pieces, range(len(pieces)), longest, block_size, eos=PAD, pad=PAD)


def _any_order(
    batch: Batch, block_size: int, samples: int, places: Sequence[int], seed: int
) -> tuple[Corruption, Tensor]:
    """Masks of one draw per row, and the weight (B, S) of −ln p at each position: n/m where masked, else 0.

    places: the number of the draw of each row; the m of `samples` successive draws are spread evenly over 1…n.
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
    """−ln P of the context tower, summed over all tokens of the documents but the first of each (EOS included)."""
    chunk = model.spec.chunk_size
    objective = AutoregressiveObjective(model.context)
    with torch.no_grad():
        return sum(float(objective(batch, None, chunk)) for batch in _documents(documents, 16, chunk))


def continuation_nats(
    model: TwoTowerForCausalLM, prompts: Sequence[list[int]], results: Sequence[Generation]
) -> tuple[float, int]:
    """−ln P of the context tower, summed over the new tokens only, and the number of new tokens."""
    whole = ar_nats(model, [[*prompt, *result.tokens] for prompt, result in zip(prompts, results, strict=True)])
    return whole - ar_nats(model, prompts), sum(len(result.tokens) for result in results)


def _documents(documents: Sequence[Sequence[int]], rows: int, chunk: int) -> Iterator[Batch]:
    """Batches of documents of similar length, one document per row."""
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), rows):
        pieces = [[Piece(np.array(d, dtype=np.int32), 0, 0, False)] for d in ordered[start : start + rows]]
        length = round_up(len(ordered[min(start + rows, len(ordered)) - 1]), chunk)
        yield collate(pieces, range(len(pieces)), length, chunk, eos=PAD, pad=PAD)


def _check(pairs: Sequence[Pair]) -> None:
    for number, (given, continuation) in enumerate(pairs):
        if not given or not continuation:
            raise ArgumentError(
                f"pair {number} has an empty {'continuation' if given else 'prefix'}; it needs at least 1 token"
            )


def _batches(items: list[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Batches of items of similar length, at most `MAX_BATCH_TOKENS` padded tokens each."""
    ordered = sorted(items, key=length)
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end + 1 - start) * length(ordered[end]) <= MAX_BATCH_TOKENS:
            end += 1
        yield ordered[start:end]
        start = end
