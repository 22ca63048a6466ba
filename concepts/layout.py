"""Where the positions and channels of an activation are."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Where things are in an activation."""

    order: Literal["bchw", "bhwc", "btc", "bc"]
    channels: int
    grid: tuple[int, int]
    """Rows and columns of the spatial positions."""
    tokens: int
    """Positions before the spatial ones that have no place in the image (class token)."""

    @property
    def positions(self) -> int:
        """Number of positions P, tokens included."""
        return self.tokens + self.grid[0] * self.grid[1]

    def flatten(self, a: Tensor) -> Tensor:
        """Return activations (or gradients) as rows of channels, ``[B, P, C]``; a view where strides allow."""
        if self.order == "bchw":
            return a.flatten(2).transpose(1, 2)
        if self.order == "bhwc":
            return a.flatten(1, 2)
        return a if self.order == "btc" else a.unsqueeze(1)

    def unflatten(self, p: Tensor) -> Tensor:
        """Return ``[B, P, C]`` in the layer's own layout; the inverse of ``flatten``."""
        if self.order == "bchw":
            return p.transpose(1, 2).reshape(len(p), -1, *self.grid)
        if self.order == "bhwc":
            return p.reshape(len(p), *self.grid, -1)
        return p if self.order == "btc" else p.squeeze(1)


def layout_of(a: Tensor, height: int, width: int) -> Layout:
    """Return the layout of an activation of images of that size.

    Parameters
    ----------
    a
        ``[B, C]``, ``[B, T, C]``, ``[B, C, H, W]`` or ``[B, H, W, C]``.
    height, width
        Of the model's input, in pixels.
    """
    if a.ndim == 2:
        return Layout("bc", a.shape[1], (1, 1), 0)
    if a.ndim == 3:
        tokens, grid = _token_grid(a.shape[1], height, width)
        return Layout("btc", a.shape[2], grid, tokens)
    _, d1, d2, d3 = a.shape
    # Swin-like networks keep channels last: then the first two axes, and not the last two, have the image's shape.
    if _in_proportion(d1, d2, height, width) and not _in_proportion(d2, d3, height, width):
        return Layout("bhwc", d3, (d1, d2), 0)
    return Layout("bchw", d1, (d2, d3), 0)


def _token_grid(length: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """Split a token sequence into tokens without a place and a grid of the image's shape."""
    for tokens in range(min(length, 9)):
        side = math.isqrt(max((length - tokens) * height // width, 1))
        for rows in (side, side + 1):
            columns = (length - tokens) // rows
            if rows * columns == length - tokens and _in_proportion(rows, columns, height, width):
                return tokens, (rows, columns)
    return 0, (1, length)


def _in_proportion(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a grid has the image's shape, to within one cell."""
    return abs(rows * width - columns * height) < max(height, width)
