"""Random numbers that are a pure function of (key, image index, position).

A generator with a state would make image 7 depend on how many images were drawn before it. Here every number is the
hash of where it is used (SplitMix64; Steele, Lea & Flood 2014), so that an image is the same alone or in any batch, and
a whole batch is drawn by a few array operations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: 64 bits in, 64 well-mixed bits out."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def _words(key: int, indices: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """`count` words of 64 bits for each index, [n, count]."""
    streams = _mix(indices.astype(np.uint64) * _GOLDEN + np.uint64(key))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return _mix(_mix(streams)[:, None] + steps[None, :])


def uniform(key: int, indices: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Draw numbers in [0, 1).

    Parameters
    ----------
    key
        Which stream; two keys give unrelated numbers. From 0 to 2**63 - 1.
    indices
        Image indices, [n].
    count
        Numbers per image.

    Returns
    -------
    float32 [n, count]
    """
    return (_words(key, indices, count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def noise(key: int, indices: NDArray[np.int64], height: int, width: int) -> NDArray[np.float32]:
    """Draw white noise in [0, 1) with 256 levels, float32 [n, height, width] (`height * width` a multiple of 8)."""
    words = _words(key, indices, height * width // 8)
    levels = words.astype("<u8", copy=False).view(np.uint8).reshape(len(indices), height, width)
    return levels.astype(np.float32) * np.float32(1 / 256)
