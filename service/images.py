"""From what a caller sends to upright RGB pixels; everything that cannot be used is refused with a remedy."""

from __future__ import annotations

import io
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concepts.errors import InvalidImage
from concepts.pictures import check_pixels, decode

__all__ = ["decode", "from_raw", "is_small"]

_SMALL_BYTES = 16 * 1024
_SMALL_PIXELS = 128 * 128


def is_small(encoded: bytes, formats: Collection[str]) -> bool:
    """Return whether a picture is decoded faster than another thread is woken: a few kilobytes and a few pixels."""
    if len(encoded) > _SMALL_BYTES:
        return False
    try:
        with Image.open(io.BytesIO(encoded), formats=list(formats)) as image:
            return image.width * image.height <= _SMALL_PIXELS
    except Exception:  # noqa: BLE001 - whatever is wrong with it, `decode` says
        return False


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
