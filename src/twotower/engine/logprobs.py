"""Log-probabilities of tokens under the AR model, for requests that want them, without extra passes."""

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
    """Statistics of the logits (n, L, V) after each token of the entries that want log-probabilities.

    Sampling entries come first. Made before the logits are filtered; `gather` is called when tokens are sampled.
    """

    def __init__(self, scheduled: Sequence[ScheduledTokens], logits: Tensor) -> None:
        self.scheduled = scheduled
        self.read = LogitStats(logits, _alternatives(scheduled))
        self.opening = [
            entry for entry in scheduled if entry.sequence.held_tokens and entry.sequence.last_logits is not None
        ]
        last_logits = [entry.sequence.last_logits for entry in self.opening if entry.sequence.last_logits is not None]
        self.before = (
            LogitStats(torch.stack(last_logits)[:, None], _alternatives(self.opening)) if last_logits else None
        )

    def gather(self, chosen: Tensor | None) -> PendingLogprobs:
        """Log-probabilities of sampled tokens (k, L) of the first k entries, and of known tokens of the others."""
        known = [entry.known_next or [] for entry in self.scheduled[0 if chosen is None else len(chosen) :]]
        ids = self.read.padded(known)
        read = self.read.of(ids if chosen is None else torch.cat([chosen, ids]))
        before = None
        if self.before is not None:  # the first token of a block follows the token read before the block
            before = self.before.of(self.before.padded([entry.sequence.held_tokens[:1] for entry in self.opening]))
        return PendingLogprobs(self.scheduled, known, read, self.opening, before, self._last_logits())

    def _last_logits(self) -> dict[int, Tensor]:
        wanted = [
            (place, entry)
            for place, entry in enumerate(self.scheduled)
            if entry.sequence.mode == "diffusion" and entry.sequence.request.logprobs is not None
        ]
        return {
            entry.sequence.output.row: self.read.logits[place, len(entry.tokens) - 1].clone() for place, entry in wanted
        }


@dataclass(frozen=True)
class PendingLogprobs:
    """Log-probabilities that are being copied to the host.

    read: after each token of the entries. before: of the first tokens of the blocks in `opening`. known: the known next
    tokens of entries that do not sample. last_logits: by request number, the logits (V,) after the last token, for rows
    whose next block begins there.
    """

    scheduled: Sequence[ScheduledTokens]
    known: Sequence[list[int]]
    read: AsyncHostCopy
    opening: Sequence[ScheduledTokens]
    before: AsyncHostCopy | None
    last_logits: dict[int, Tensor]

    def by_number(self, chosen: Sequence[list[int]]) -> dict[int, list[TokenLogprob]]:
        """Log-probabilities by request number. chosen: the tokens of the sampling entries that count."""
        told = dict(
            zip(
                _numbers(self.scheduled),
                _token_logprobs(self.read, [*chosen, *self.known], self.scheduled),
                strict=True,
            )
        )
        if self.before is not None:
            firsts = _token_logprobs(
                self.before, [entry.sequence.held_tokens[:1] for entry in self.opening], self.opening
            )
            for number, first in zip(_numbers(self.opening), firsts, strict=True):
                told[number] = first + told[number]
        return told


class LogitStats:
    """logits (n, L, V); total (n, L): logsumexp; best (n, L, top): most probable tokens; best_logprobs: of these."""

    def __init__(self, logits: Tensor, top: int) -> None:
        self.logits = logits
        self.total = by_tiles(lambda part: upcast(part).logsumexp(-1), logits)
        self.best = by_tiles(lambda part: part.topk(min(top, part.shape[-1])).indices, logits)
        self.best_logprobs = self._logprobs(self.best)

    def padded(self, rows: Sequence[list[int]]) -> Tensor:
        """Tokens of each row, padded to (len(rows), L)."""
        width = self.logits.shape[1]
        filled = [tokens + [0] * (width - len(tokens)) for tokens in rows]
        return to_device_async(filled, self.logits.device, torch.long).view(len(rows), width)

    def of(self, ids: Tensor) -> AsyncHostCopy:
        """Log-probabilities of tokens (n, L), and the best tokens with theirs."""
        return AsyncHostCopy(self._logprobs(ids[..., None])[..., 0], self.best, self.best_logprobs)

    def _logprobs(self, ids: Tensor) -> Tensor:
        """Log-probabilities of tokens (n, L, k)."""
        total = self.total[..., None]
        return self.logits.gather(-1, ids).to(total.dtype) - total


def _token_logprobs(
    found: AsyncHostCopy, known_next: Sequence[list[int]], scheduled: Sequence[ScheduledTokens]
) -> list[list[TokenLogprob]]:
    """The tokens of each row, in order, with as many alternatives as its request wants."""
    own, best, values = found.tolist()
    out = []
    for place, (tokens, entry) in enumerate(zip(known_next, scheduled, strict=True)):
        top = entry.sequence.request.logprobs or 0
        columns = zip(tokens, own[place], best[place], values[place], strict=False)
        out.append([TokenLogprob(t, p, tuple(zip(b, v, strict=True))[:top]) for t, p, b, v in columns])
    return out


def _alternatives(scheduled: Sequence[ScheduledTokens]) -> int:
    return max((entry.sequence.request.logprobs or 0 for entry in scheduled), default=0)


def _numbers(scheduled: Sequence[ScheduledTokens]) -> list[int]:
    return [entry.sequence.output.row for entry in scheduled]


def numbers_of(logprobs: Sequence[TokenLogprob]) -> list[float]:
    """All log-probabilities."""
    return [number for one in logprobs for number in (one.logprob, *(value for _, value in one.top))]
