"""What callers pass as an image, made into what travels."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from whence._errors import InvalidArgument, missing_extra
from whence.v1 import image_pb2

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    ImageLike: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | PillowImage | NDArray[Any]

# Modes that travel as they are in memory. Any other (palette, alpha, CMYK, 16 bits) is written into a lossless file, so
# that the service treats it as it treats such files.
_RAW_MODES = ("RGB", "L")


@dataclass(frozen=True, slots=True, repr=False)
class Source:
    """An image as it travels."""

    content: bytes
    """A file, or pixels row by row; the caller's own where possible, since images are large."""
    shape: tuple[int, int] | None = None
    """Height and width of pixels; None for a file."""
    pixel_type: image_pb2.PixelType = image_pb2.PIXEL_TYPE_UNSPECIFIED

    def write(self, message: image_pb2.Image) -> None:
        """Put the image into a message."""
        if self.shape is None:
            message.encoded = self.content
        else:
            message.raw.height, message.raw.width = self.shape
            message.raw.pixel_type = self.pixel_type
            message.raw.data = self.content

    def pixels(self) -> NDArray[np.uint8]:
        """``[height, width, 3]`` RGB after EXIF orientation, as the caller sees the image; needs Pillow for files."""
        if self.shape is None:
            return _decode(self.content)
        if self.pixel_type == image_pb2.PIXEL_TYPE_FLOAT32:
            floats: NDArray[np.float32] = np.frombuffer(self.content, "<f4").reshape(*self.shape, 3)
            return np.rint(floats * 255).astype(np.uint8)
        return np.frombuffer(self.content, np.uint8).reshape(*self.shape, 3)

    def __repr__(self) -> str:
        return f"Source({'encoded' if self.shape is None else 'raw'}, {len(self.content)} bytes)"


def read(image: ImageLike) -> Source:
    """Take an image in any of its forms.

    Parameters
    ----------
    image
        A path, the bytes of an image file, a Pillow image, or an array: uint8 or floating ``[H, W, 3]``, ``[H, W]`` or
        ``[H, W, 1]``, floating values in [0, 1]. Anything that numpy can read as an array will do.

    Raises
    ------
    InvalidArgument
        If it is none of these; reason ``INVALID_IMAGE`` or ``UNREADABLE_FILE``.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(image))
    if isinstance(image, (str, os.PathLike)):
        return _from_path(Path(image))
    if _is_pillow(image):
        return _from_pillow(image)
    if hasattr(image, "__array__"):
        return _from_array(_as_array(image))
    raise _refusal(
        f"A {type(image).__name__} is not an image: "
        "pass a path, the bytes of an image file, a Pillow image or an array."
    )


def _from_bytes(encoded: bytes) -> Source:
    if not encoded:
        raise _refusal("The image is empty: 0 bytes.")
    return Source(encoded)


def _from_path(path: Path) -> Source:
    try:
        encoded = path.read_bytes()
    except (OSError, ValueError) as exc:  # the latter of a path with a null byte
        why = getattr(exc, "strerror", None) or exc
        raise InvalidArgument(f"Cannot read {path}: {why}.", reason="UNREADABLE_FILE") from exc
    if not encoded:
        raise _refusal(f"{path} is empty.")
    return Source(encoded)


def _is_pillow(image: object) -> TypeGuard[PillowImage]:
    """Whether this is a Pillow image, without loading Pillow: who has one has loaded it."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _as_array(image: object) -> NDArray[Any]:
    try:
        return np.asarray(image)
    except Exception as exc:  # whatever its type says, such as that it is on a GPU
        raise _refusal(f"The {type(image).__name__} cannot be read as an array: {exc}") from exc


def _from_pillow(image: PillowImage) -> Source:
    from PIL import ImageOps

    if 0 in image.size:
        raise _refusal(f"The image is empty: {image.width}×{image.height} pixels.")
    try:
        image.load()  # Pillow reads files when their pixels are wanted
    except (OSError, SyntaxError, ValueError) as exc:  # SyntaxError of a PNG that is broken
        raise _refusal(f"Pillow cannot read the image: {exc}.") from exc
    upright = ImageOps.exif_transpose(image)  # as the service does with files
    if upright.mode in ("YCbCr", "HSV"):  # no file format keeps them well
        upright = upright.convert("RGB")
    if upright.mode in _RAW_MODES and "transparency" not in upright.info:
        return _from_array(np.asarray(upright))
    file = io.BytesIO()
    try:
        upright.save(file, "TIFF" if upright.mode in ("CMYK", "F") else "PNG")
    except (OSError, ValueError) as exc:
        raise _refusal(f"Pillow images of mode {upright.mode} cannot be sent: use .convert('RGB').") from exc
    return _from_bytes(file.getvalue())


def _from_array(array: NDArray[Any]) -> Source:
    height, width = _grid(array)
    rgb = array.reshape(height, width, -1)
    if array.dtype == np.uint8:
        kind, values = image_pb2.PIXEL_TYPE_UINT8, rgb
    elif np.issubdtype(array.dtype, np.floating):
        _check_range(array)
        kind, values = image_pb2.PIXEL_TYPE_FLOAT32, rgb.astype("<f4")
    else:
        raise _refusal(
            f"An array of {array.dtype} is not an image: use uint8 (0 to 255) or floating values in [0, 1], "
            "e.g. array.astype(np.uint8)."
        )
    data = np.broadcast_to(values, (height, width, 3)).tobytes()
    return Source(data, (height, width), kind)


def _grid(array: NDArray[Any]) -> tuple[int, int]:
    """Height and width of an array that has the shape of an image."""
    shape = array.shape
    if array.size == 0:
        raise _refusal(f"The image is empty: an array of shape {shape}.")
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)):
        return shape[0], shape[1]
    remedy = ""
    if len(shape) == 4:
        remedy = " Send one image at a time, or use explain_many."
    elif len(shape) == 3 and shape[0] in (1, 3):
        remedy = " Channels come last: np.moveaxis(array, 0, -1)."
    elif len(shape) == 3 and shape[2] == 4:
        remedy = " Leave the fourth channel out: array[..., :3]."
    raise _refusal(f"An array of shape {shape} is not an image: use [H, W, 3] or [H, W].{remedy}")


def _check_range(array: NDArray[Any]) -> None:
    """Refuse values that are not in [0, 1]."""
    low, high = float(array.min()), float(array.max())
    if low >= 0 and high <= 1:
        return
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise _refusal(f"The image has {count} pixel values that are NaN or infinite.")
    remedy = " Divide by 255, or send uint8." if low >= 0 and high <= 255 else " Undo the normalisation first."
    raise _refusal(f"Floating pixels must be in [0, 1]; these run from {low:g} to {high:g}.{remedy}")


def _decode(encoded: bytes) -> NDArray[np.uint8]:
    """Pixels of a file, upright, for looking at."""
    try:
        from PIL import Image, ImageOps
    except ImportError as exc:
        raise missing_extra("pictures", "Pillow") from exc
    with Image.open(io.BytesIO(encoded)) as file:
        image = ImageOps.exif_transpose(file)
    # As the service reads files: 16-bit greys are scaled, transparent pixels laid on white.
    if image.mode.startswith(("I", "F")):
        greys = np.rint(np.clip(np.asarray(image, np.float64), 0, 65535) / 257).astype(np.uint8)
        return np.repeat(greys[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _refusal(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason="INVALID_IMAGE")
