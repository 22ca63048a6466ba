"""What regions look like: every surface is a field in [0, 1] that mixes two tones.

Textures live on objects and turn with them; their two tones are a light and a dark shade of the object's colour, so
that texture and colour never hide one another. Backgrounds stand upright and keep to dull tones no object has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"blue": (50, 80, 225), "green": (35, 165, 60), "red": (220, 40, 45), "yellow": (240, 205, 35)}
)
"""The light tone of each colour, RGB in 0..255."""

SHADE = 0.4
"""The dark tone of a texture, as a fraction of its light tone."""

TONES: Mapping[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = MappingProxyType(
    {
        "bricks": ((140, 104, 90), (196, 186, 176)),
        "night": ((22, 22, 44), (235, 235, 220)),
        "sand": ((182, 160, 126), (224, 206, 172)),
        "waves": ((84, 128, 140), (158, 192, 196)),
    }
)
"""The tones of each background where its field is 0 and where it is 1, RGB in 0..255."""


def _chequered(x: Array, y: Array) -> Array:
    cells: Array = np.floor(x / 5.5) + np.floor(y / 5.5)
    return (cells % 2).astype(np.float32)


def _dotted(x: Array, y: Array) -> Array:
    dx, dy = x % 6.0 - 3.0, y % 6.0 - 3.0
    return (dx * dx + dy * dy > 1.7**2).astype(np.float32)


def _striped(x: Array, y: Array) -> Array:
    return (x % 6.0 < 3.0).astype(np.float32)


TEXTURES: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {"chequered": _chequered, "dotted": _dotted, "striped": _striped}
)
"""For each texture, its field (1: light tone) at (x, y) pixels along the object's own axes."""


def _bricks(x: Array, y: Array, grain: Array) -> Array:
    row = np.floor(y / 8.0)
    mortar: NDArray[np.bool_] = (y % 8.0 < 1.5) | ((x + 7.0 * (row % 2)) % 14.0 < 1.5)
    return mortar.astype(np.float32)


def _night(x: Array, y: Array, grain: Array) -> Array:
    stars: Array = np.maximum(grain - 0.98, 0.0) * 50.0  # one pixel in fifty, of all brightnesses
    return stars


def _sand(x: Array, y: Array, grain: Array) -> Array:
    return grain


def _waves(x: Array, y: Array, grain: Array) -> Array:
    crests: Array = np.sin((y + 2.0 * np.sin(x * np.float32(0.35))) * np.float32(2 * np.pi / 9.0))
    return crests.clip(0.0, 1.0)


BACKGROUNDS: Mapping[str, Callable[[Array, Array, Array], Array]] = MappingProxyType(
    {"bricks": _bricks, "night": _night, "sand": _sand, "waves": _waves}
)
"""For each background, its field at (x, y) pixels from a random origin, given white noise in [0, 1)."""


def sticker(side: int) -> NDArray[np.uint8]:
    """Draw the sticker: magenta and cyan quarters in a white frame, uint8 [side, side, 3]."""
    picture = np.full((side, side, 3), 250, np.uint8)
    half = (np.arange(side - 2) >= (side - 2) // 2).astype(np.int64)
    quarters = half[:, None] ^ half[None, :]
    picture[1:-1, 1:-1] = np.array([(225, 40, 205), (30, 215, 220)], np.uint8)[quarters]
    return picture
