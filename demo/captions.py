"""Captions of the known-concepts world: what can be said of an image, or of a part of one, and whether it is true.

>>> says("a dotted ring on sand, with grey pebbles") == says("PEBBLES dotted, sand: ring")
True
>>> captions()[:3]
('cross', 'a cross', 'a picture of a cross')

A caption is true of a crop when everything it names can be made out there. A crop may show an object's colour and not
enough of it to tell its shape: then nothing that names a shape is true of it, and nothing is false for that reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from demo.attributes import ATTRIBUTES, FAMILIES, PLACES, SPURIOUS
from demo.world import Batch

PEBBLES = "pebbles"
THINGS = (*ATTRIBUTES, PEBBLES)
"""All that captions speak of: the attributes, then the pebbles, which mean nothing but are seen."""

PHRASINGS = ("tag", "phrase", "sentence")
"""Of the same: ``red disc on sand``, ``a red disc on sand`` and ``a picture of a red disc on sand``."""

FAMILY_OF = MappingProxyType({name: family for family, names in FAMILIES.items() for name in names})

_WORDS = MappingProxyType({**{name: name for name in THINGS}, "grey": PEBBLES})
"""The thing that each telling word names."""

SHAPE_SHARE = 0.8
"""Share of an object's pixels that must lie in a crop for its shape to be told."""
COLOUR_PIXELS = 24
"""Object pixels in a crop from which its colour can be told."""
TEXTURE_PIXELS = 80
"""Object pixels in a crop from which its texture can be told: a few periods of it."""
BACKGROUND_SHARE = 0.2
"""Share of a crop's pixels that must be background for it to be told."""
STICKER_SHARE = 0.8
"""Share of the sticker's pixels that must lie in a crop."""
PEBBLE_PIXELS = 12
"""Pebble pixels in a crop, one small pebble, from which pebbles are seen."""

_BACKGROUND, _PEBBLE, _OBJECT, _STICKER = range(4)  # as in `Batch.regions`


@cache
def says(text: str) -> frozenset[str]:
    """Return the things that a text names; other words tell nothing."""
    return frozenset(_WORDS[word] for word in re.findall("[a-z]+", text.lower()) if word in _WORDS)


def describe(things: frozenset[str], phrasing: str) -> str:
    """Put at least one thing, at most one of each family, into words."""
    chosen = {FAMILY_OF[name]: name for name in things if name in FAMILY_OF}
    tag, background = phrasing == "tag", chosen.get("background", "")
    marks = [word for thing, word in ((PEBBLES, "grey pebbles"), (SPURIOUS, "a sticker")) if thing in things]
    head = _object([chosen[family] for family in ("texture", "colour", "shape") if family in chosen], chosen, tag)
    if background:
        alone = PLACES[background] if phrasing == "phrase" else background
        head = f"{head} {PLACES[background]}" if head else alone
    if not head:
        head, marks = " and ".join(marks).removeprefix("a " if tag else ""), []
    text = f"{head}, with {' and '.join(marks)}" if marks else head
    return f"a picture of {text}" if phrasing == "sentence" else text


def _object(words: list[str], chosen: dict[str, str], tag: bool) -> str:
    """Name an object by what is known of it: nothing, if that is nothing."""
    if tag or not words:
        return " ".join(words)
    return f"a {' '.join(words)}" if "shape" in chosen else f"something {' and '.join(words)}"


@cache
def captions() -> tuple[str, ...]:
    """Return all captions: each combination of things, in each phrasing, fewer things before more."""
    spoken = [describe(things, phrasing) for things in sorted(_combinations(), key=_place) for phrasing in PHRASINGS]
    single = [word for word in _WORDS if word not in ATTRIBUTES]
    return tuple(dict.fromkeys([*spoken, *single]))


def _combinations() -> Iterator[frozenset[str]]:
    """Every set of things that one image can show, but for the empty one."""
    choices = [("", *names) for names in FAMILIES.values()] + [("", SPURIOUS), ("", PEBBLES)]
    for chosen in product(*choices):
        if any(chosen):
            yield frozenset(filter(None, chosen))


def _place(things: frozenset[str]) -> tuple[int, list[int]]:
    """Sort by number, then in the order of `THINGS`."""
    return len(things), sorted(THINGS.index(name) for name in things)


def seen(batch: Batch, tops: NDArray[np.int64], lefts: NDArray[np.int64], side: int) -> NDArray[np.int8]:
    """Tell what can be made out in one square crop of each image.

    Parameters
    ----------
    batch
        The images, n of them.
    tops, lefts
        First row and column of each crop, [n].
    side
        Of all crops, in pixels.

    Returns
    -------
    int8 [n, len(THINGS)]
        1 where a thing is seen, -1 where it is certainly not there, 0 where too little is in view to tell.
    """
    regions = crops(batch.regions, tops, lefts, side)
    background, pebbles, inside, sticker = (
        (regions == region).sum((1, 2)) for region in (_BACKGROUND, _PEBBLE, _OBJECT, _STICKER)
    )
    whole = (batch.regions == _OBJECT).sum((1, 2))
    whole_sticker = np.maximum((batch.regions == _STICKER).sum((1, 2)), 1)
    families = {
        "shape": (inside, inside >= SHAPE_SHARE * whole),
        "colour": (inside, inside >= COLOUR_PIXELS),
        "texture": (inside, inside >= TEXTURE_PIXELS),
        "background": (background, background >= BACKGROUND_SHARE * side**2),
    }
    answer = np.empty((len(batch), len(THINGS)), np.int8)
    for column, name in enumerate(ATTRIBUTES[:-1]):
        pixels, enough = families[FAMILY_OF[name]]
        answer[:, column] = np.where(enough & batch.attributes[:, column], 1, np.where(enough | (pixels == 0), -1, 0))
    for column, pixels, enough in (
        (THINGS.index(SPURIOUS), sticker, sticker >= STICKER_SHARE * whole_sticker),
        (THINGS.index(PEBBLES), pebbles, pebbles >= PEBBLE_PIXELS),
    ):
        answer[:, column] = np.where(enough, 1, np.where(pixels == 0, -1, 0))
    return answer


def crops(images: NDArray[np.uint8], tops: NDArray[np.int64], lefts: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
    """Cut one square of each image [n, height, width, ...]: [n, side, side, ...]."""
    steps = np.arange(side)
    cut: NDArray[np.uint8] = images[
        np.arange(len(images))[:, None, None], (tops[:, None] + steps)[:, :, None], (lefts[:, None] + steps)[:, None]
    ]
    return cut


def truth(seen: NDArray[np.int8], texts: tuple[str, ...]) -> NDArray[np.int8]:
    """Tell which texts are true of which crops.

    Parameters
    ----------
    seen
        What is made out in each crop, as `seen` returns it, [n, len(THINGS)].
    texts
        Any texts; those that name nothing are true of everything.

    Returns
    -------
    int8 [n, len(texts)]
        1 true, -1 false, 0 neither: it names nothing false, but something that cannot be told.
    """
    names = np.array([[thing in says(text) for thing in THINGS] for text in texts], np.float32)
    contradicted, untold = ((seen == state).astype(np.float32) @ names.T > 0 for state in (-1, 0))
    return np.where(contradicted, -1, np.where(untold, 0, 1)).astype(np.int8)


def random_caption(seen: NDArray[np.int8], dice: np.random.Generator) -> str:
    """Say something true of one crop (int8 [len(THINGS)]), of any length; nothing, if nothing is made out."""
    there = [name for name, state in zip(THINGS, seen, strict=True) if state == 1]
    if not there:
        return ""
    count = dice.integers(1, len(there) + 1)
    return describe(frozenset(dice.permutation(there)[:count].tolist()), PHRASINGS[dice.integers(len(PHRASINGS))])
