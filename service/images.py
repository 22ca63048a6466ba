"""From what a caller sends to upright RGB pixels; everything that cannot be used is refused with a remedy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concepts.errors import InvalidImage
from concepts.pictures import check_pixels, decode

__all__ = ["decode", "from_raw"]


def from_raw(data: bytes, *, height: int, width: int, floating: bool, pixel_limit: int) -> Image.Image:
    """Return raw RGB pixels as a picture.

    Parameters
    ----------
    data
        ``height × width × 3`` values, row by row: uint8, or little-endian float32 in [0, 1] if ``floating``.
    height, width
        In pixels.
    floating
        Whether values are float32.
    pixel_limit
        Most pixels (width × height).

    Raises
    ------
    InvalidImage
        If the sizes do not fit the data, or a value is not a number or out of range.
    """
    if height < 1 or width < 1:
        raise InvalidImage(f"A raw image of {height}×{width} pixels has no pixels; set its height and width.")
    check_pixels(width, height, pixel_limit)
    expected = height * width * 3 * (4 if floating else 1)
    if len(data) != expected:
        kind = "float32" if floating else "uint8"
        raise InvalidImage(
            f"A raw {kind} image of {height}×{width} RGB pixels has {expected} bytes, not {len(data)}; "
            "check its height, width and pixel type."
        )
    if not floating:
        return Image.fromarray(np.frombuffer(data, np.uint8).reshape(height, width, 3))
    return Image.fromarray(_quantised(np.frombuffer(data, "<f4").reshape(height, width, 3)))


def _quantised(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round [0, 1] to 8 bits."""
    if not np.isfinite(values).all():
        raise InvalidImage("The raw image holds NaN or infinity; send finite values in [0, 1].")
    if values.min() < 0 or values.max() > 1:
        raise InvalidImage("The raw image holds values outside [0, 1]; scale them, e.g. divide by 255.")
    rounded: NDArray[np.uint8] = np.rint(values * np.float32(255)).astype(np.uint8)
    return rounded
