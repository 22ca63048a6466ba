"""From what a caller sends to upright RGB pixels; everything that cannot be used is refused with a remedy."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from concepts.errors import InvalidImage

_SMALL_BYTES = 16 * 1024
_SMALL_PIXELS = 128 * 128


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
        with warnings.catch_warnings():
            # Our own limit comes before Pillow's; and odd metadata is no reason to refuse pixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=list(formats)) as image:
                _check_pixels(image.width, image.height, pixel_limit)
                # Lets the JPEG decoder finish early where it can; loads the pixels, so truncation shows here.
                image.load()
                return _rgb(_upright(image))
    except UnidentifiedImageError:
        accepted = ", ".join(formats)
        raise InvalidImage(f"The image is not a picture of an accepted format; send one of {accepted}.") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(pixel_limit) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        # Pillow's decoders raise any of these on damaged files.
        raise InvalidImage("The image is damaged or truncated; send the whole file.") from error


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
    _check_pixels(width, height, pixel_limit)
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


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise _too_many_pixels(limit)


def _too_many_pixels(limit: int) -> InvalidImage:
    return InvalidImage(f"The image has more than {limit} pixels; send a smaller one.", pixel_limit=limit)


def _quantised(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round [0, 1] to 8 bits."""
    if not np.isfinite(values).all():
        raise InvalidImage("The raw image holds NaN or infinity; send finite values in [0, 1].")
    if values.min() < 0 or values.max() > 1:
        raise InvalidImage("The raw image holds values outside [0, 1]; scale them, e.g. divide by 255.")
    rounded: NDArray[np.uint8] = np.rint(values * np.float32(255)).astype(np.uint8)
    return rounded


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, IndexError, OverflowError, ZeroDivisionError):
        # EXIF data that cannot be read says nothing about the orientation.
        return image


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
