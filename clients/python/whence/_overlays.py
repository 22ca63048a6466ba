"""Laying a concept's map over the caller's image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from whence._explanation import Box


def place(values: NDArray[np.float32], view: Box, height: int, width: int) -> NDArray[np.float32]:
    """A map at every pixel of the image.

    Bilinear between the centres of the map's cells, constant beyond the outermost ones. A cell of an ``h × w`` map
    covers ``1/h × 1/w`` of the view, so the centre of cell ``(i, j)`` lies at ``((i + ½)/h, (j + ½)/w)`` of it, and the
    centre of pixel ``(y, x)`` at ``(y + ½, x + ½)``.

    Parameters
    ----------
    values
        ``[h, w]``.
    view
        The part of the image that the map spans, in pixels.
    height, width
        Size of the image, in pixels.

    Returns
    -------
    ``[height, width]`` float32; NaN outside the view.
    """
    rows = _interpolation(values.shape[0], view.top, view.bottom, height)
    columns = _interpolation(values.shape[1], view.left, view.right, width)
    return np.asarray(rows @ values @ columns.T, np.float32)


def _interpolation(cells: int, start: float, stop: float, pixels: int) -> NDArray[np.float32]:
    """``[pixels, cells]`` weights of linear interpolation along one axis; NaN outside ``[start, stop]``."""
    centres = np.arange(pixels) + 0.5
    inside = (centres >= start) & (centres <= stop)
    position = np.clip((centres - start) / max(stop - start, 1e-9) * cells - 0.5, 0, cells - 1)
    lower = np.minimum(position.astype(int), max(cells - 2, 0))
    share = position - lower
    weights = np.zeros((pixels, cells), np.float32)
    weights[np.arange(pixels), lower] = 1 - share
    if cells > 1:
        weights[np.arange(pixels), lower + 1] = share
    weights[~inside] = np.nan
    return weights
