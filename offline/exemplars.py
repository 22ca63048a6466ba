"""The crops that excite each concept most, as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from concepts.bank import Exemplar
from concepts.preprocessing import Box
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


class Excerpt(NamedTuple):
    """Part of an image."""

    key: str
    box: Box
    """In the image's pixels."""
    activation: float


class Drawn(NamedTuple):
    """Exemplars, ready for a bank."""

    exemplars: list[tuple[Exemplar, ...]]
    """Of each concept."""
    pictures: dict[str, bytes]
    """By file."""


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


def cut_out(image: Image.Image, box: Box) -> Image.Image:
    """Cut a box out of an image."""
    left, top = max(round(box.left), 0), max(round(box.top), 0)
    right, bottom = min(round(box.right), image.width), min(round(box.bottom), image.height)
    crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    crop.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return crop


def picture(image: Image.Image, box: Box) -> bytes:
    """Cut a box out of an image as a WebP file."""
    crop, file = cut_out(image, box), io.BytesIO()
    crop.save(file, "WEBP", lossless=max(crop.size) <= _LOSSLESS_SIDE, quality=85)
    return file.getvalue()


def draw(folder: ImageFolder, chosen: Sequence[Sequence[Excerpt]], first: int = 0, role: str = "") -> Drawn:
    """Cut out the pictures of some concepts; images are opened one at a time, each once.

    Parameters
    ----------
    folder
        Where the images are.
    chosen
        For each concept its exemplars, best first.
    first
        Id of the first of these concepts: files are named by it.
    role
        Part of the files' names, where the pictures are no exemplars: ``counterfactual``.
    """
    wanted: dict[str, list[tuple[int, int]]] = {}
    for concept, excerpts in enumerate(chosen):
        for place, excerpt in enumerate(excerpts):
            wanted.setdefault(excerpt.key, []).append((concept, place))
    pictures = {}
    for key, uses in sorted(wanted.items()):
        image = folder.open(key)
        for concept, place in uses:
            pictures[_file(first + concept, place, role)] = picture(image, chosen[concept][place].box)
    named = [
        tuple(Exemplar(_file(first + concept, place, role), *excerpt) for place, excerpt in enumerate(excerpts))
        for concept, excerpts in enumerate(chosen)
    ]
    return Drawn(named, pictures)


def _file(concept: int, place: int, role: str = "") -> str:
    return f"exemplars/{concept:05d}{role and '-'}{role}-{place:02d}.webp"
