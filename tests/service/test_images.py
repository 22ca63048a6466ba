"""Reading what callers send: every kind of picture, and every kind of rubbish."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from concepts.errors import InvalidImage
from service import images
from tests.data import real_data

ALL = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


def decode(data: bytes, pixel_limit: int = 10**7, formats: tuple[str, ...] = ALL) -> np.ndarray:
    image = images.decode(data, pixel_limit=pixel_limit, formats=formats)
    assert image.mode == "RGB"
    return np.asarray(image)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def rgb() -> Image.Image:
    ramp = np.arange(12 * 20 * 3, dtype=np.uint32).reshape(12, 20, 3) * 7 % 251
    return Image.fromarray(ramp.astype(np.uint8))


def test_lossless_pictures_come_back_exactly(rgb: Image.Image) -> None:
    for kind, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decode(encode(rgb, kind, **options)), np.asarray(rgb)), kind


def test_real_photographs_of_all_sizes_are_read() -> None:
    paths = sorted((real_data() / "photos").glob("*.JPEG"))
    assert len(paths) == 48
    greys = 0
    for path in paths:
        with Image.open(path) as original:
            expected, greys = original.convert("RGB"), greys + (original.mode == "L")
        assert np.array_equal(decode(path.read_bytes()), np.asarray(expected))
    assert greys


def test_grey_palette_and_transparency(rgb: Image.Image) -> None:
    grey = rgb.convert("L")
    assert np.array_equal(decode(encode(grey)), np.asarray(grey.convert("RGB")))
    one_bit = rgb.convert("1")
    assert set(np.unique(decode(encode(one_bit)))) <= {0, 255}
    palette = rgb.quantize(16)
    assert np.array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    # Transparent is white, whatever colour hides under it; half transparent is half way.
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 128, 255)
    seen = decode(encode(Image.fromarray(rgba)))
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[0, 2].tolist() == [200, 0, 0]
    assert np.abs(seen[0, 1].astype(int) - [227, 127, 127]).max() <= 1
    grey_alpha = Image.fromarray(np.array([[[50, 0], [50, 255]]], np.uint8))
    assert decode(encode(grey_alpha))[0].tolist() == [[255] * 3, [50] * 3]
    with_hole = Image.new("P", (2, 1))
    with_hole.putpalette([10, 20, 30, 40, 50, 60])
    with_hole.putdata([0, 1])
    assert decode(encode(with_hole, transparency=0))[0].tolist() == [[255] * 3, [40, 50, 60]]
    assert decode(encode(rgb, transparency=rgb.getpixel((0, 0))))[0, 0].tolist() == [255] * 3


def test_16_bit_greys_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode(encode(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pictures_out_of_range_are_refused() -> None:
    values = np.array([[0.0, -4.0]], np.float32)
    with pytest.raises(InvalidImage, match="8 bits"):
        decode(encode(Image.fromarray(values), "TIFF"))


def test_cmyk(rgb: Image.Image) -> None:
    cmyk = rgb.convert("CMYK")
    assert np.array_equal(decode(encode(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    seen = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(seen.reshape(-1, 3).mean(0) - [255, 0, 0]).max() < 8


def test_only_the_first_frame_of_an_animation_is_read(rgb: Image.Image) -> None:
    other = Image.new("RGB", rgb.size, "red")
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(rgb, kind, save_all=True, append_images=[other], **options)
        assert np.array_equal(decode(data), np.asarray(rgb)), kind
    gif = encode(
        Image.new("RGB", (4, 4), "blue"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]
    )
    assert decode(gif)[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(rgb: Image.Image, orientation: int) -> None:
    """Against the definition of the tag: where the first row and first column of the file are to be shown."""
    upright = np.asarray(rgb)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)), upright)


def test_unreadable_exif_is_no_reason_to_refuse_pixels(rgb: Image.Image) -> None:
    data = encode(rgb, "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff" + b"\xff" * 40)
    assert np.array_equal(decode(data), np.asarray(rgb))


def test_damaged_exif_still_tells_the_orientation(rgb: Image.Image) -> None:
    """Entries that Pillow can read but not write back are no reason to refuse an image, nor to leave it on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0
    written = exif.tobytes()
    at = written.index(struct.pack(">HH", 0x011A, 5))
    for kind in range(14):  # the rational number claims to be a byte, a string, …
        damaged = written[:at] + struct.pack(">HH", 0x011A, kind) + written[at + 4 :]
        assert decode(encode(rgb, "PNG", exif=damaged)).shape == (20, 12, 3)


def test_truncation_anywhere_is_refused() -> None:
    path = next((real_data() / "cifar10" / "test" / "cat").glob("*.jpg"))
    picture = path.read_bytes()
    for data in (picture, encode(Image.open(path)), encode(Image.open(path), "WEBP")):
        for keep in (0, 1, 10, len(data) // 3, len(data) // 2, len(data) * 9 // 10):
            with pytest.raises(InvalidImage):
                decode(data[:keep])


def test_rubbish_is_refused_and_the_accepted_formats_named() -> None:
    for data in (b"hello", b"\x00" * 1000, b"\xff\xd8\xff" + b"\x01" * 100, b"<svg></svg>", b"GIF89a"):
        with pytest.raises(InvalidImage):
            decode(data)
    with pytest.raises(InvalidImage, match="JPEG, PNG"):
        decode(encode(Image.new("RGB", (4, 4)), "BMP"), formats=("JPEG", "PNG"))
    with pytest.raises(InvalidImage, match="accepted format"):
        decode(encode(Image.new("RGB", (4, 4)), "PPM"))


def bomb(side: int) -> bytes:
    """A PNG of few bytes that would decode to side² pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [4_000, 15_000, 60_000, 2**31 - 1])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    assert len(bomb(side)) < 200
    with pytest.raises(InvalidImage, match="more than 10000000 pixels") as refusal:
        decode(bomb(side))
    assert refusal.value.metadata == {"pixel_limit": "10000000"}


def test_the_pixel_limit_is_inclusive(rgb: Image.Image) -> None:
    decode(encode(rgb), pixel_limit=240)
    with pytest.raises(InvalidImage):
        decode(encode(rgb), pixel_limit=239)


def raw(data: bytes, height: int = 2, width: int = 3, floating: bool = False) -> np.ndarray:
    return np.asarray(images.from_raw(data, height=height, width=width, floating=floating, pixel_limit=100))


def test_raw_pixels(rgb: Image.Image) -> None:
    values = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(raw(values.tobytes()), values)
    assert np.array_equal(raw((values / 255).astype("<f4").tobytes(), floating=True), values)
    assert raw(np.ones(18, "<f4").tobytes(), floating=True).max() == 255


@pytest.mark.parametrize(
    ("data", "options", "remedy"),
    [
        (b"", {}, "18 bytes, not 0"),
        (b"\0" * 17, {}, "18 bytes, not 17"),
        (b"\0" * 18, {"floating": True}, "72 bytes, not 18"),
        (b"", {"height": 0}, "no pixels"),
        (b"", {"height": 20, "width": 20}, "more than 100 pixels"),
        (b"", {"height": 2**32 - 1, "width": 2**32 - 1}, "more than 100 pixels"),
        (np.full(18, np.nan, "<f4").tobytes(), {"floating": True}, "NaN"),
        (np.full(18, np.inf, "<f4").tobytes(), {"floating": True}, "infinity"),
        (np.full(18, 255, "<f4").tobytes(), {"floating": True}, "divide by 255"),
        (np.full(18, -0.1, "<f4").tobytes(), {"floating": True}, r"outside \[0, 1\]"),
    ],
)
def test_wrong_raw_pixels_are_refused(data: bytes, options: dict[str, int], remedy: str) -> None:
    with pytest.raises(InvalidImage, match=remedy):
        raw(data, **options)  # type: ignore[arg-type]
