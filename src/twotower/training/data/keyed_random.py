"""Randomness that is a function of its key, never of a generator's history: resuming and sharding rest on it."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def uniform(*key: int | str) -> float:
    """A number in [0, 1), by the key."""
    return fraction("/".join(map(str, key)).encode())


def fraction(data: bytes) -> float:
    """blake2b of the bytes, as a number in [0, 1)."""
    return (int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 11) * 2.0**-53


def permutation(size: int, *key: int | str) -> np.ndarray:
    """An order of 0 … size−1, by the key.

    Sorted random words: numpy keeps a bit generator's words the same for ever, but not what `permutation` makes of
    them, and a run may be resumed under another numpy.
    """
    seed = blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(seed, dtype="<u8")).random_raw(size)
    return np.argsort(words, kind="stable")
