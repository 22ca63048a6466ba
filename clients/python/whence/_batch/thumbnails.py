"""Examples as small pictures: read from where the images are, with a concept's map laid over where there is one."""

from __future__ import annotations

import asyncio
import io
import warnings
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence._batch.counting import Example
from whence._batch.locations import parse
from whence._batch.reader import BatchOutput, block_on
from whence._batch.sources import Source, open_source
from whence._errors import WhenceError, missing_extra
from whence._explanation import Box
from whence._overlays import place

try:
    from PIL import Image, ImageOps
except ImportError as exc:
    raise missing_extra("pictures", exc.name or "pillow") from exc

SIDE = 160
"""Longest side of a picture, in pixels."""
_MAGENTA, _RED, _BLUE = (255, 43, 214), (200, 68, 45), (47, 111, 181)
"""As in the pictures of single explanations: without a sign, for, and against."""
_STRONGEST = 0.75
_AT_ONCE = 8
_LARGEST_BYTES, _LARGEST_PIXELS = 64 * 2**20, 100_000_000
"""Of an image that a page is worth decoding."""

Wanted = tuple[int, Example]
"""A concept's id, and an image in which it is strong."""


@dataclass(frozen=True, slots=True)
class Map:
    """Where a concept is in an image."""

    kind: str
    values: NDArray[np.float32]
    view: Box


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture, or why there is none."""

    picture: str = ""
    """As a ``data:`` address."""
    note: str = ""


def draw(output: BatchOutput, source: str, wanted: Sequence[Wanted]) -> dict[Wanted, Thumbnail]:
    """Draw examples.

    Parameters
    ----------
    source
        Where the images are.

    Raises
    ------
    WhenceError
        If the source cannot be read at all.
    """
    maps = _maps(output, wanted)
    place_of_images = open_source(parse(source))
    return block_on(_draw_all(place_of_images, wanted, maps))


def _maps(output: BatchOutput, wanted: Sequence[Wanted]) -> dict[tuple[int, str], Map]:
    """Maps that were written of the wanted, by concept and key: of several kinds the first."""
    pairs = {(concept, example.key) for concept, example in wanted}
    chunks = {example.chunk for _, example in wanted}
    found: dict[tuple[int, str], Map] = {}
    for _, table in output.numbered("maps", only=chunks):
        names = zip(table["concept_id"].to_pylist(), table["key"].to_pylist(), strict=True)
        for row, pair in enumerate(names):
            if pair in pairs and pair not in found:
                found[pair] = _map(table.slice(row, 1).to_pylist()[0])
    return found


def _map(row: Mapping[str, Any]) -> Map:
    values = np.array(row["values"], np.float32).reshape(row["height"], row["width"])
    return Map(row["kind"], values, Box(**row["view"]))


async def _draw_all(
    source: Source, wanted: Sequence[Wanted], maps: Mapping[tuple[int, str], Map]
) -> dict[Wanted, Thumbnail]:
    """Read every image once, a few at a time, and draw all that is wanted of it."""
    by_key: dict[str, list[Wanted]] = {}
    for each in wanted:
        by_key.setdefault(each[1].key, []).append(each)
    room = asyncio.Semaphore(_AT_ONCE)

    async def draw_one(key: str, of_it: list[Wanted]) -> dict[Wanted, Thumbnail]:
        async with room:
            try:
                listed = await source.head(key)
                if listed is None:
                    return dict.fromkeys(of_it, Thumbnail(note="is gone"))
                if (listed.size or 0) > _LARGEST_BYTES:
                    return dict.fromkeys(of_it, Thumbnail(note="is too large to be shown"))
                content = await source.read(key)
            except WhenceError:
                return dict.fromkeys(of_it, Thumbnail(note="cannot be read"))
            changed = "has changed since" if content.etag != of_it[0][1].etag else ""
            return await asyncio.to_thread(_draw_image, content.data, of_it, {} if changed else maps, changed)

    drawn = await asyncio.gather(*(draw_one(key, of_it) for key, of_it in by_key.items()))
    return {each: thumbnail for some in drawn for each, thumbnail in some.items()}


def _draw_image(
    data: bytes, wanted: Iterable[Wanted], maps: Mapping[tuple[int, str], Map], note: str
) -> dict[Wanted, Thumbnail]:
    """Draw all that is wanted of an image."""
    try:
        small, scale = _reduced(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return dict.fromkeys(wanted, Thumbnail(note="cannot be decoded here"))
    return {
        (concept, example): Thumbnail(_address(_overlaid(small, scale, maps.get((concept, example.key)))), note)
        for concept, example in wanted
    }


def _reduced(data: bytes) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """The image upright and small, and how much smaller: across and down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that is odd
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _LARGEST_PIXELS:
                raise ValueError("too large")
            whole = image.size
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # JPEG is decoded small at once
            turned = image.getexif().get(0x0112, 1) >= 5  # the orientation says that sides are swapped
            upright = ImageOps.exif_transpose(image).convert("RGB")
    width, height = reversed(whole) if turned else whole
    upright.thumbnail((SIDE, SIDE))
    if (steps := SIDE // max(upright.size)) > 1:  # overlays on tiny images would be coarse
        upright = upright.resize((steps * upright.width, steps * upright.height), Image.Resampling.NEAREST)
    return np.asarray(upright), (upright.width / width, upright.height / height)


def _overlaid(pixels: NDArray[np.uint8], scale: tuple[float, float], found: Map | None) -> NDArray[np.uint8]:
    """Tint an image as strongly as a map is."""
    if found is None:
        return pixels
    across, down = scale
    view = Box(found.view.left * across, found.view.top * down, found.view.right * across, found.view.bottom * down)
    strength = np.nan_to_num(place(found.values, view, *pixels.shape[:2]))
    peak = float(np.abs(strength).max())
    if not peak:
        return pixels
    positive = _MAGENTA if found.kind == "activation" else _RED
    tint = np.where(strength[..., None] < 0, _BLUE, positive)
    opacity = _STRONGEST * np.abs(strength[..., None]) / peak
    return np.rint((1 - opacity) * pixels + opacity * tint).astype(np.uint8)


def _address(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"
