"""From the bytes of a file to upright RGB pixels: one rule for images that teach and images to explain."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from concepts.errors import InvalidImage


def decode(encoded: bytes, *, pixel_limit: int, formats: Collection[str]) -> Image.Image:
    """Return the first frame of an encoded picture, upright, in mode RGB.

    Transparent pixels are laid on white. 16-bit greys are scaled to 8 bits.

    Parameters
    ----------
    encoded
        A whole file.
    pixel_limit
        Most pixels (width × height); checked on the header, before anything is decoded.
    formats
        Accepted formats, in Pillow's names.

    Raises
    ------
    InvalidImage
        If it is empty, truncated, too large, or of a format that is not accepted or not known.
    """
    if not encoded:
        raise InvalidImage("The image is empty; send the bytes of an image file.")
    try:
        # Our own limit comes before Pillow's; and odd metadata is no reason to refuse pixels.
        with _without_warnings(), Image.open(io.BytesIO(encoded), formats=list(formats)) as image:
            check_pixels(image.width, image.height, pixel_limit)
            image.load()  # truncation shows here
            return _rgb(_upright(image))
    except UnidentifiedImageError:
        accepted = ", ".join(formats)
        raise InvalidImage(f"The image is not a picture of an accepted format; send one of {accepted}.") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(pixel_limit) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        # Pillow's decoders raise any of these on damaged files.
        raise InvalidImage("The image is damaged or truncated; send the whole file.") from error


def check_pixels(width: int, height: int, limit: int) -> None:
    """Raise InvalidImage if an image has more pixels than allowed."""
    if width * height > limit:
        raise _too_many_pixels(limit)


def _too_many_pixels(limit: int) -> InvalidImage:
    return InvalidImage(f"The image has more than {limit} pixels; send a smaller one.", pixel_limit=limit)


_switch = threading.Lock()
_within: list[warnings.catch_warnings[None]] = []


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence warnings: for the whole process, so the first thread in does it and the last one out undoes it."""
    with _switch:
        _within.append(_within[0] if _within else warnings.catch_warnings())
        if len(_within) == 1:
            _within[0].__enter__()
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _switch:
            silenced = _within.pop()
            if not _within:
                silenced.__exit__(None, None, None)


_UPRIGHT: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by its EXIF orientation."""


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: that writes the EXIF data anew, and fails in many ways where they are damaged.
    try:
        change = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - data that cannot be read, however that shows, say nothing about the orientation
        return image
    return image if change is None else image.transpose(change)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _grey_16(image).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey_16(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys to 8 bits; Pillow's own conversion would clip them."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise InvalidImage("The image's greys are not 8 or 16 bits deep; convert it to 8 bits a channel.")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))
