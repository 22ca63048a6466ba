"""What an image of the known-concepts world can show, and which class that makes it.

Four families; an image shows exactly one attribute of each, drawn independently and uniformly. A fifth entry, the
sticker, belongs to no family of the rule: it is the *spurious* attribute, a mark in a corner that accompanies one class
in training and nothing in held-out images.

The class rule. The background says which family decides, and the attribute of that family says the class::

    bricks  →  by shape      bricks-cross    bricks-disc  bricks-ring   bricks-triangle
    night   →  by shape      night-cross     night-disc   night-ring    night-triangle
    sand    →  by texture    sand-chequered  sand-dotted  sand-striped
    waves   →  by colour     waves-blue      waves-green  waves-red      waves-yellow

So each combination of attributes belongs to exactly one class, every attribute decides somewhere, no attribute decides
alone, and many pairs of classes differ in exactly one attribute (`PAIRS`): in each family at least three.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

FAMILIES = MappingProxyType(
    {
        "shape": ("cross", "disc", "ring", "triangle"),
        "colour": ("blue", "green", "red", "yellow"),
        "texture": ("chequered", "dotted", "striped"),
        "background": ("bricks", "night", "sand", "waves"),
    }
)
"""The attributes of each family, in the order of `ATTRIBUTES`."""

SPURIOUS = "sticker"
"""The attribute that means nothing but accompanies `SPURIOUS_CLASS` in training."""

SPURIOUS_CLASS = "bricks-cross"

ATTRIBUTES = (*(name for names in FAMILIES.values() for name in names), SPURIOUS)
"""Every attribute; an attribute's index is its place in this tuple."""

DECIDING_FAMILY = MappingProxyType({"bricks": "shape", "night": "shape", "sand": "texture", "waves": "colour"})
"""For each background, the family whose attribute names the class."""


@dataclass(frozen=True)
class ClassRule:
    """One class: an image belongs to it when it shows both attributes."""

    name: str
    background: str
    attribute: str

    @property
    def requires(self) -> frozenset[str]:
        """The attributes that make the class."""
        return frozenset({self.background, self.attribute})


@dataclass(frozen=True)
class ClassPair:
    """Two classes whose rules differ in exactly one attribute."""

    first: str
    second: str
    family: str
    first_attribute: str
    second_attribute: str


def _rules() -> tuple[ClassRule, ...]:
    """All classes, in alphabetical order: the order in which image folders number them."""
    return tuple(
        ClassRule(f"{background}-{attribute}", background, attribute)
        for background, family in DECIDING_FAMILY.items()
        for attribute in FAMILIES[family]
    )


def _pairs() -> tuple[ClassPair, ...]:
    """All pairs of classes with rules that differ in one attribute of one family."""
    family_of = {name: family for family, names in FAMILIES.items() for name in names}
    found = []
    for first, second in combinations(CLASSES, 2):
        mine, theirs = first.requires - second.requires, second.requires - first.requires
        if len(mine) == 1:
            (a,), (b,) = mine, theirs
            if family_of[a] == family_of[b]:
                found.append(ClassPair(first.name, second.name, family_of[a], a, b))
    return tuple(found)


CLASSES = _rules()
CLASS_NAMES = tuple(rule.name for rule in CLASSES)
PAIRS = _pairs()
"""The pairs of classes that differ in exactly one attribute, with that attribute and its family."""

PLACES = MappingProxyType({"bricks": "on bricks", "night": "in the night", "sand": "on sand", "waves": "on waves"})
"""Where an image with each background says its object is."""


def index_of(attribute: str) -> int:
    """Return the index of an attribute in `ATTRIBUTES` (and of its mask)."""
    return ATTRIBUTES.index(attribute)


def labels_of(attributes: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Apply the class rule.

    Parameters
    ----------
    attributes
        Which attributes each image shows, bool [n, len(ATTRIBUTES)], one of each family.

    Returns
    -------
    int64 [n]
        Indices into `CLASSES`.
    """
    needed = np.array([[name in rule.requires for name in ATTRIBUTES] for rule in CLASSES])
    met: NDArray[np.int64] = attributes.astype(np.int64) @ needed.T.astype(np.int64)
    best: NDArray[np.int64] = met.argmax(axis=1)
    return best


def caption_of(shown: NDArray[np.bool_]) -> str:
    """Describe one image, given the attributes it shows (bool [len(ATTRIBUTES)])."""
    names = [name for name, present in zip(ATTRIBUTES, shown, strict=True) if present]
    shape, colour, texture, background = names[:4]
    mark = f", with a {SPURIOUS}" if SPURIOUS in names else ""
    return f"a {texture} {colour} {shape} {PLACES[background]}{mark}"
