"""Interpolated Kneser–Ney n-gram model, a baseline for the bits per byte of the model card.

    P_n(w | h) = max(c(hw) − D, 0) / c(h) + D · N₁₊(h·) / c(h) · P_{n−1}(w | h′)

The highest order uses raw counts, lower orders use continuation counts (number of distinct left neighbours). The
unigram is mixed with the uniform distribution. D = n₁ / (n₁ + 2·n₂) for each order (Chen & Goodman 1999).
An n-gram is coded as one integer, and counts are sorted arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twotower.errors import ArgumentError

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    grams: Codes
    counts: NDArray[np.float64]
    histories: Codes
    history_totals: NDArray[np.float64]
    history_types: NDArray[np.float64]
    discount: float


class KneserNey:
    """Counts n-grams of documents of token ids < vocab_size, each padded with order − 1 copies of its first token."""

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocab_size: int) -> None:
        if vocab_size**order >= 2**63:
            raise ArgumentError(
                f"order {order} with vocab_size {vocab_size} exceeds 64-bit n-gram codes; use a lower order"
            )
        self.order, self.vocab_size = order, vocab_size
        grams, counts = np.unique(self._grams(documents, order), return_counts=True)
        self.orders = [_order(grams, counts.astype(np.float64), vocab_size)]
        for _ in range(order - 1):  # continuation counts: number of distinct n-grams that end in the same n − 1 tokens
            size = vocab_size ** (order - len(self.orders))
            grams, counts = np.unique(self.orders[-1].grams % size, return_counts=True)
            self.orders.append(_order(grams, counts.astype(np.float64), vocab_size))

    def nats(self, documents: Sequence[Sequence[int]]) -> float:
        """−ln P, summed over all tokens of the documents but the first of each."""
        grams = self._grams(documents, self.order)
        prob = np.full(len(grams), 1.0 / self.vocab_size)
        for n, table in reversed(list(enumerate(self.orders))):
            prob = _probability(table, grams % self.vocab_size ** (self.order - n), self.vocab_size, prob)
        return float(-np.log(prob).sum())

    def _grams(self, documents: Sequence[Sequence[int]], order: int) -> Codes:
        """Codes of all n-grams: one for each token of a document but the first, with its `order − 1` predecessors."""
        codes = []
        for document in documents:
            ids = np.array([document[0]] * (order - 2) + list(document), dtype=np.int64)
            count = len(document) - 1
            code = np.zeros(count, dtype=np.int64)
            for k in range(order):
                code = code * self.vocab_size + ids[k : k + count]
            codes.append(code)
        return np.concatenate(codes)


def _order(grams: Codes, counts: NDArray[np.float64], vocab_size: int) -> _Order:
    histories, first, types = np.unique(grams // vocab_size, return_index=True, return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = float(once / (once + 2 * twice)) if once else 0.5
    return _Order(grams, counts, histories, np.add.reduceat(counts, first), types.astype(np.float64), discount)


def _probability(table: _Order, grams: Codes, vocab_size: int, lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """One step of the recursion; for an unseen history the result is the lower order's probability."""
    count = _look_up(table.grams, table.counts, grams)
    total = _look_up(table.histories, table.history_totals, grams // vocab_size)
    types = _look_up(table.histories, table.history_types, grams // vocab_size)
    seen = np.maximum(total, 1.0)
    mixed = (np.maximum(count - table.discount, 0.0) + table.discount * types * lower) / seen
    return np.where(total > 0, mixed, lower)


def _look_up(keys: Codes, values: NDArray[np.float64], wanted: Codes) -> NDArray[np.float64]:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)
