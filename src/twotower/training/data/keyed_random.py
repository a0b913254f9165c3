"""Random numbers as a function of a key, without generator state. Resuming and sharding rely on this."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def uniform(*key: int | str) -> float:
    """A random number in [0, 1) for the key."""
    return fraction("/".join(map(str, key)).encode())


def fraction(data: bytes) -> float:
    """The blake2b hash of the bytes, as a number in [0, 1)."""
    return (int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 11) * 2.0**-53


def permutation(size: int, *key: int | str) -> np.ndarray:
    """A random order of 0 … size−1 for the key.

    Sorts random words: numpy guarantees the words of a bit generator across versions, but not `permutation`. A run
    may be resumed with another version of numpy.
    """
    seed = blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(seed, dtype="<u8")).random_raw(size)
    return np.argsort(words, kind="stable")
