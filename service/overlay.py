"""A map laid over the picture that it explains."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_POSITIVE = np.array([230, 40, 20], np.float32)
_NEGATIVE = np.array([30, 80, 230], np.float32)
_OPACITY = 0.75


def overlay(view: NDArray[np.uint8], values: NDArray[np.float32]) -> bytes:
    """Return a PNG of a map over the image as the model saw it.

    Positive values are red, negative ones blue, the more opaque the larger; the largest is at three quarters. Where
    the map is zero the image shows unchanged.

    Parameters
    ----------
    view
        uint8 ``[h, w, 3]``.
    values
        float32 ``[height, width]``; resized bilinearly to the view.
    """
    height, width = view.shape[:2]
    spread = np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    largest = float(np.abs(spread).max())
    opacity = (_OPACITY / largest if largest > 0 else 0.0) * np.abs(spread)[:, :, None]
    colour = np.where(spread[:, :, None] >= 0, _POSITIVE, _NEGATIVE)
    blended = np.rint(view * (1 - opacity) + colour * opacity).astype(np.uint8)
    return png(blended)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Write RGB or RGBA pixels ``[height, width, 3 or 4]`` as a PNG."""
    file = io.BytesIO()
    # Level 1: a third of the time for a tenth more bytes.
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
