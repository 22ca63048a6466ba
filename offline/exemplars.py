"""The crops that excite each concept most, as pictures."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from concepts.preprocessing import Box
from offline.crops import CropGrid
from offline.images import ImageFolder

LARGEST_SIDE = 256
"""Pictures are reduced to this many pixels a side."""
_LOSSLESS_SIDE = 64
"""Up to here, compression artefacts would show and lossless files are small."""


class Choice(NamedTuple):
    """One crop."""

    image: int
    """Index among the images."""
    crop: int
    """Index within the image's grid."""
    activation: float


def choose(codes: Tensor, crops_per_image: int, count: int) -> list[list[Choice]]:
    """Choose the crops that excite each concept most, each from another image.

    Parameters
    ----------
    codes
        ``[images · crops_per_image, K]``, image by image.
    crops_per_image
        Crops of an image.
    count
        Most crops of a concept.

    Returns
    -------
    list
        For each concept its crops, best first; none with code zero.
    """
    peak, crop = codes.view(-1, crops_per_image, codes.shape[1]).max(dim=1)
    order = peak.argsort(dim=0, descending=True, stable=True)[:count]
    return [
        [
            Choice(image, int(crop[image, concept]), float(peak[image, concept]))
            for image in order[:, concept].tolist()
            if peak[image, concept] > 0
        ]
        for concept in range(codes.shape[1])
    ]


def picture(image: Image.Image, box: Box) -> bytes:
    """Cut a box out of an image as a WebP file."""
    left, top = max(round(box.left), 0), max(round(box.top), 0)
    right, bottom = min(round(box.right), image.width), min(round(box.bottom), image.height)
    crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    crop.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    crop.save(file, "WEBP", lossless=max(crop.size) <= _LOSSLESS_SIDE, quality=85)
    return file.getvalue()


def draw(
    folder: ImageFolder, keys: list[str], boxes: list[Box], grid: CropGrid, chosen: list[list[Choice]]
) -> dict[tuple[int, int], tuple[bytes, Box]]:
    """Return the picture and the box of each chosen crop, by (concept, place); images are opened one at a time.

    Parameters
    ----------
    folder, keys, boxes
        The images that the choices index, and where in each its view lies.
    grid
        Where crops are.
    chosen
        From ``choose``.
    """
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    for concept, choices in enumerate(chosen):
        for place, choice in enumerate(choices):
            wanted.setdefault(choice.image, []).append((concept, place, choice.crop))
    drawn = {}
    for index, uses in sorted(wanted.items()):
        image = folder.open(keys[index])
        for concept, place, crop in uses:
            box = grid.box(crop, boxes[index])
            drawn[concept, place] = (picture(image, box), box)
    return drawn
