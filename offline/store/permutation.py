"""A random order of any number of things that needs no memory: a Feistel network with cycle walking."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def permuted(places: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Return what comes at some places of a permutation of ``range(size)``.

    A Feistel network permutes the numbers of twice ``half`` bits, whatever its rounds compute. What lands outside the
    range goes through it again until it lands inside; that is a permutation, too (Black and Rogaway, CT-RSA 2002).

    Parameters
    ----------
    places
        Any of ``range(size)``.
    size
        How many things there are.
    key
        Another key is another permutation; 0 to 2⁶⁴ − 1.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _mixed(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))
    found = _network(places.astype(np.uint64), np.uint64(half), keys)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        found[outside] = _network(found[outside], np.uint64(half), keys)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def _network(x: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return left << half | right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each number (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
