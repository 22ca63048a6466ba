"""What callers pass as an image, and what travels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import whence
from tests.data import real_data
from whence import _images
from whence.v1 import image_pb2

PHOTO = "n01614925_bald_eagle.JPEG"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def truncated() -> Image.Image:
    """A picture of which half is missing, as Pillow opens it."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = encoded(Image.fromarray(noise))
    return Image.open(io.BytesIO(whole[: len(whole) // 2]))


class OnDevice:
    """Like an array that must be moved first."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        raise TypeError("it is on a GPU")


def sent(image: Any) -> image_pb2.Image:
    message = image_pb2.Image()
    _images.read(image).write(message)
    return message


def test_files_travel_as_they_are() -> None:
    path = real_data() / "photos" / PHOTO
    content = path.read_bytes()
    for form in (path, str(path), content, bytearray(content), memoryview(content)):
        assert sent(form) == image_pb2.Image(encoded=content)
    with Image.open(path) as photo:
        assert np.array_equal(_images.read(content).pixels(), np.asarray(photo))


def test_uint8_arrays(image: NDArray[np.uint8]) -> None:
    message = sent(image)
    assert message.raw == image_pb2.RawImage(
        height=4, width=6, pixel_type=image_pb2.PIXEL_TYPE_UINT8, data=image.tobytes()
    )


def test_arrays_in_any_memory_layout(image: NDArray[np.uint8]) -> None:
    for strided in (
        np.asfortranarray(image),
        image[:, ::-1][:, ::-1],
        np.moveaxis(np.moveaxis(image, -1, 0).copy(), 0, -1),
    ):
        assert sent(strided) == sent(image)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_greys_become_rgb(shape: tuple[int, ...]) -> None:
    grey = np.arange(35, dtype=np.uint8).reshape(shape)
    pixels = _images.read(grey).pixels()
    assert pixels.shape == (5, 7, 3)
    assert (pixels == grey.reshape(5, 7, 1)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floating_arrays_travel_as_little_endian_float32(dtype: Any, image: NDArray[np.uint8]) -> None:
    raw = sent((image / 255).astype(dtype)).raw
    assert raw.pixel_type == image_pb2.PIXEL_TYPE_FLOAT32
    values = np.frombuffer(raw.data, "<f4").reshape(raw.height, raw.width, 3)
    assert np.allclose(values, image / 255, atol=1e-3)


def test_what_is_like_an_array_is_taken_as_one(image: NDArray[np.uint8]) -> None:
    class Tensor:
        def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[np.uint8]:
            return image

    assert sent(Tensor()) == sent(image)


def test_the_callers_array_may_change_afterwards(image: NDArray[np.uint8]) -> None:
    source = _images.read(image)
    before = image.copy()
    image[:] = 0
    assert np.array_equal(source.pixels(), before)


def test_pillow_images_are_sent_as_pixels(image: NDArray[np.uint8]) -> None:
    assert sent(Image.fromarray(image)) == sent(image)
    grey = image[..., 0]
    assert np.array_equal(_images.read(Image.fromarray(grey)).pixels()[..., 2], grey)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_other_pillow_modes_travel_without_loss(mode: str, image: NDArray[np.uint8]) -> None:
    original = Image.fromarray(image[..., 0]) if mode == "I;16" else Image.fromarray(image)
    picture = original.convert(mode)
    message = sent(picture)
    assert message.WhichOneof("source") == "encoded"
    with Image.open(io.BytesIO(message.encoded)) as back:
        assert back.size == picture.size
        assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_pillow_modes_without_a_file_format_travel_as_rgb(mode: str, image: NDArray[np.uint8]) -> None:
    picture = Image.fromarray(image).convert(mode)
    assert np.array_equal(_images.read(picture).pixels(), np.asarray(picture.convert("RGB")))


def test_pillow_modes_that_cannot_be_sent_name_the_remedy() -> None:
    with pytest.raises(whence.InvalidArgument, match="convert"):
        _images.read(Image.new("LAB", (2, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_the_same_by_file_and_by_pillow(orientation: int) -> None:
    canvas = np.zeros((16, 32, 3), np.uint8)
    canvas[:8, :8] = 255  # a corner that tells all eight orientations apart, with the sides' lengths
    exif = Image.Exif()
    exif[274] = orientation
    file = encoded(Image.fromarray(canvas), "PNG", exif=exif)
    with Image.open(io.BytesIO(file)) as picture:
        by_pillow = _images.read(picture).pixels()
    by_file = _images.read(file).pixels()
    assert np.array_equal(by_pillow, by_file)
    assert by_file.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))


def test_pictures_show_transparency_and_depth_as_the_service_reads_them() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (_images.read(encoded(clear)).pixels() == 255).all()
    deep = Image.fromarray(np.full((2, 2), 257 * 100, np.uint16))
    assert (_images.read(encoded(deep)).pixels() == 100).all()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 4, 3), np.int64), "astype"),
        (np.zeros((4, 4, 3), bool), "uint8"),
        (np.zeros((4, 4, 3), complex), "uint8"),
        (np.zeros((3, 5, 7), np.uint8), "moveaxis"),
        (np.zeros((4, 5, 4), np.uint8), "fourth channel"),
        (np.zeros((2, 4, 5, 3), np.uint8), "explain_many"),
        (np.zeros(5, np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.full((4, 4, 3), np.nan), "48 pixel values that are NaN"),
        (np.full((4, 4), np.inf, np.float32), "infinite"),
        (np.full((4, 4, 3), 200.0), "Divide by 255"),
        (np.full((4, 4, 3), -1.5), "normalisation"),
        (b"", "0 bytes"),
        (Image.new("RGB", (0, 3)), "empty"),
        (12, "int is not an image"),
        (None, "NoneType is not an image"),
        (OnDevice(), "OnDevice cannot be read as an array: it is on a GPU"),
        (truncated(), "Pillow cannot read the image: image file is truncated"),
    ],
)
def test_what_is_no_image_is_refused_with_a_remedy(image: Any, says: str) -> None:
    with pytest.raises(whence.InvalidArgument, match=says) as caught:
        _images.read(image)
    assert caught.value.reason == "INVALID_IMAGE"


def test_one_nan_is_enough(image: NDArray[np.uint8]) -> None:
    floating = image / 255
    floating[2, 3, 1] = np.nan
    with pytest.raises(whence.InvalidArgument, match="1 pixel values"):
        _images.read(floating)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jpg", tmp_path, "null\0byte.jpg"):
        with pytest.raises(whence.InvalidArgument) as caught:
            _images.read(path)
        assert caught.value.reason == "UNREADABLE_FILE"
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(whence.InvalidArgument, match="is empty"):
        _images.read(empty)
