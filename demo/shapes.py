"""Where an object is: each shape as a test on coordinates turned with the object and measured in its radius."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Inside = NDArray[np.bool_]

EXTENT = 1.1
"""No shape reaches farther from its centre than this many radii."""


def _cross(u: Array, v: Array) -> Inside:
    u, v = np.abs(u), np.abs(v)
    return (np.minimum(u, v) <= 0.32) & (np.maximum(u, v) <= 1.0)


def _disc(u: Array, v: Array) -> Inside:
    return u * u + v * v <= 0.88**2


def _ring(u: Array, v: Array) -> Inside:
    squared = u * u + v * v
    return (squared <= 1.0) & (squared >= 0.48**2)


def _triangle(u: Array, v: Array) -> Inside:
    slant = np.float32(np.sqrt(3) / 2) * np.abs(u) + np.float32(0.5) * v
    return (slant <= EXTENT / 2) & (v >= -EXTENT / 2)


SHAPES: Mapping[str, Callable[[Array, Array], Inside]] = MappingProxyType(
    {"cross": _cross, "disc": _disc, "ring": _ring, "triangle": _triangle}
)
"""For each shape, whether points at (u, v) radii from the centre are inside."""


def ellipse(u: Array, v: Array, half_u: Array, half_v: Array) -> Inside:
    """Tell which points lie in an ellipse with the given half axes, all in the same unit."""
    return (u / half_u) ** 2 + (v / half_v) ** 2 <= 1.0
