"""Log-probabilities of tokens by the AR model, for the rows that ask for them: read off a pass that is made anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower.decoding.output import TokenLogprob
from twotower.decoding.sampling import by_tiles
from twotower.ops.host_transfer import AsyncHostCopy, to_device_async
from twotower.ops.precision import upcast

if TYPE_CHECKING:
    from twotower.engine.scheduled import ScheduledTokens


class LogprobRequest:
    """What the AR model believes after each token of the works that ask, the choosing ones first: logits (n, L, V).

    Made before anything is left out of the logits and asked once the tokens are chosen.
    """

    def __init__(self, works: Sequence[ScheduledTokens], logits: Tensor) -> None:
        self.works = works
        self.read = LogitStats(logits, _alternatives(works))
        self.opening = [work for work in works if work.sequence.held and work.sequence.after is not None]
        afters = [work.sequence.after for work in self.opening if work.sequence.after is not None]
        self.before = LogitStats(torch.stack(afters)[:, None], _alternatives(self.opening)) if afters else None

    def gather(self, chosen: Tensor | None) -> PendingLogprobs:
        """Of the tokens chosen (k, L) by the first k works (None: by none) and of those that stand there anyway."""
        known = [work.following or [] for work in self.works[0 if chosen is None else len(chosen) :]]
        ids = self.read.padded(known)
        read = self.read.of(ids if chosen is None else torch.cat([chosen, ids]))
        before = None
        if self.before is not None:  # a block's first token follows what was read before it
            before = self.before.of(self.before.padded([work.sequence.held[:1] for work in self.opening]))
        return PendingLogprobs(self.works, known, read, self.opening, before, self._afters())

    def _afters(self) -> dict[int, Tensor]:
        wanted = [
            (place, work)
            for place, work in enumerate(self.works)
            if work.sequence.mode == "diffusion" and work.sequence.request.logprobs is not None
        ]
        return {
            work.sequence.output.row: self.read.logits[place, len(work.tokens) - 1].clone() for place, work in wanted
        }


@dataclass(frozen=True)
class PendingLogprobs:
    """Log-probabilities on their way: after what the works read, and of the first tokens of blocks, which follow what
    was read before. known: what follows the tokens of the works that chose nothing. afters: by request number, the
    logits (V,) after the last token, of rows whose next block begins there."""

    works: Sequence[ScheduledTokens]
    known: Sequence[list[int]]
    read: AsyncHostCopy
    opening: Sequence[ScheduledTokens]
    before: AsyncHostCopy | None
    afters: dict[int, Tensor]

    def by_number(self, chosen: Sequence[list[int]]) -> dict[int, list[TokenLogprob]]:
        """By request number. chosen: the tokens of the works that chose, as far as they count."""
        told = dict(zip(_numbers(self.works), _listed(self.read, [*chosen, *self.known], self.works), strict=True))
        if self.before is not None:
            firsts = _listed(self.before, [work.sequence.held[:1] for work in self.opening], self.opening)
            for number, first in zip(_numbers(self.opening), firsts, strict=True):
                told[number] = first + told[number]
        return told


class LogitStats:
    """logits (n, L, V); total (n, L): ln Σ exp of them; best (n, L, top) and their log-probabilities."""

    def __init__(self, logits: Tensor, top: int) -> None:
        self.logits = logits
        self.total = by_tiles(lambda part: upcast(part).logsumexp(-1), logits)
        self.best = by_tiles(lambda part: part.topk(min(top, part.shape[-1])).indices, logits)
        self.best_logprobs = self._logprobs(self.best)

    def padded(self, rows: Sequence[list[int]]) -> Tensor:
        """(len(rows), L): tokens of each row, up to L of them."""
        width = self.logits.shape[1]
        filled = [tokens + [0] * (width - len(tokens)) for tokens in rows]
        return to_device_async(filled, self.logits.device, torch.long).view(len(rows), width)

    def of(self, ids: Tensor) -> AsyncHostCopy:
        """Of tokens (n, L), one at each position: their log-probabilities, and the best tokens with theirs."""
        return AsyncHostCopy(self._logprobs(ids[..., None])[..., 0], self.best, self.best_logprobs)

    def _logprobs(self, ids: Tensor) -> Tensor:
        """Of tokens (n, L, k) at each position."""
        total = self.total[..., None]
        return self.logits.gather(-1, ids).to(total.dtype) - total


def _listed(
    found: AsyncHostCopy, following: Sequence[list[int]], works: Sequence[ScheduledTokens]
) -> list[list[TokenLogprob]]:
    """Of each row its tokens (up to L), in order, with as many alternatives as its request wants."""
    own, best, values = found.tolist()
    out = []
    for place, (tokens, work) in enumerate(zip(following, works, strict=True)):
        top = work.sequence.request.logprobs or 0
        columns = zip(tokens, own[place], best[place], values[place], strict=False)
        out.append([TokenLogprob(t, p, tuple(zip(b, v, strict=True))[:top]) for t, p, b, v in columns])
    return out


def _alternatives(works: Sequence[ScheduledTokens]) -> int:
    return max((work.sequence.request.logprobs or 0 for work in works), default=0)


def _numbers(works: Sequence[ScheduledTokens]) -> list[int]:
    return [work.sequence.output.row for work in works]
