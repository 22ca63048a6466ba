"""The known-concepts world: images of which everything is known.

An image of 64×64 pixels shows one object of some shape, colour and texture, of any size, place and rotation, on some
background among a few grey pebbles that mean nothing, and sometimes a sticker in the corner. Its class follows from
its attributes (`demo.attributes`); which pixels show each attribute is known exactly.

>>> world = World(seed=0)
>>> batch = world.sample(4, "heldout")
>>> batch.images.shape, batch.masks.shape
((4, 64, 64, 3), (4, 16, 64, 64))

Two splits. In ``train`` the sticker is on 95 % of the images of one class and on none of the others; in ``heldout`` it
is on a small share of all images, whatever their class (`STICKER_RATES`). Image `i` of a split is a pure function of
the seed, the split and `i`: the same alone, in any batch, on any machine. The supply does not end, so training need not
repeat an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from concepts.errors import InvalidInput
from demo.attributes import ATTRIBUTES, CLASS_NAMES, FAMILIES, SPURIOUS, SPURIOUS_CLASS, caption_of, labels_of
from demo.randomness import noise, uniform
from demo.shapes import EXTENT, SHAPES, ellipse
from demo.surfaces import BACKGROUNDS, COLOURS, SHADE, TEXTURES, TONES, sticker

Split = Literal["train", "heldout"]

SIDE = 64
"""Height and width of an image, in pixels."""
RADIUS = (12.5, 18.0)
"""Smallest and largest radius of an object, in pixels; shapes reach up to `EXTENT` radii."""
PEBBLES = 3
"""Most grey pebbles, the distractors, in an image."""
STICKER_SIDE = 10
"""Side of the sticker, in pixels."""
STICKER_JITTER = 4
"""The sticker's distance from the lower right corner, in pixels, is below this, in each direction."""
CHUNK = 64
"""Images drawn at a time, few enough for their arrays to stay in the processor's cache."""


@dataclass(frozen=True)
class StickerRate:
    """How often the sticker is present, as shares of the images."""

    spurious_class: float
    """Among images of `SPURIOUS_CLASS`."""
    other_classes: float
    """Among images of every other class."""


STICKER_RATES = MappingProxyType({"train": StickerRate(0.95, 0.0), "heldout": StickerRate(0.03, 0.03)})
"""For each split, how the sticker goes with the classes."""

# What a pixel shows; higher numbers were drawn over lower ones.
_BACKGROUND, _PEBBLE, _OBJECT, _STICKER = range(4)
_REGION_OF_FAMILY = {"shape": _OBJECT, "colour": _OBJECT, "texture": _OBJECT, "background": _BACKGROUND}
_REGION_OF_ATTRIBUTE = np.array(
    [_REGION_OF_FAMILY[family] for family, names in FAMILIES.items() for _ in names] + [_STICKER], np.uint8
)
_Y, _X = np.meshgrid(np.arange(SIDE, dtype=np.float32) + 0.5, np.arange(SIDE, dtype=np.float32) + 0.5, indexing="ij")


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and the truth about them."""

    images: NDArray[np.uint8]
    """RGB, [n, 64, 64, 3]."""
    labels: NDArray[np.int64]
    """Indices into `demo.attributes.CLASSES`, [n]."""
    attributes: NDArray[np.bool_]
    """Which of `demo.attributes.ATTRIBUTES` each image shows, [n, A]."""
    regions: NDArray[np.uint8]
    """What each pixel shows (0 background, 1 pebble, 2 object, 3 sticker), [n, 64, 64]."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """The pixels that show each attribute, [n, A, 64, 64]; empty where the attribute is absent."""
        shows: NDArray[np.bool_] = self.regions[:, None] == _REGION_OF_ATTRIBUTE[None, :, None, None]
        shows &= self.attributes[:, :, None, None]
        return shows

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """One sentence per image that names its attributes."""
        return tuple(caption_of(shown) for shown in self.attributes)


@dataclass(frozen=True)
class World:
    """An endless supply of images with known concepts.

    Parameters
    ----------
    seed
        From 0 to 2**31 - 1; each seed is another world with the same rules.

    Raises
    ------
    InvalidInput
        If the seed is outside that range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise InvalidInput(f"world: the seed must be from 0 to 2147483647, not {self.seed}")

    def sample(self, n: int, split: Split, start: int = 0) -> Batch:
        """Draw images `start` to `start + n - 1` of a split.

        Parameters
        ----------
        n
            Images, at least 1.
        split
            ``train`` or ``heldout``: how the sticker goes with the classes. No image is in both.
        start
            Index of the first image.

        Raises
        ------
        InvalidInput
            If there is nothing to draw or no such split.
        """
        if n < 1 or start < 0:
            raise InvalidInput(f"world: ask for at least one image from index 0 on, not {n} from {start}")
        if split not in get_args(Split):
            raise InvalidInput(f"world: the split must be one of {', '.join(get_args(Split))}, not {split!r}")
        images = np.empty((n, SIDE, SIDE, 3), np.uint8)
        regions = np.empty((n, SIDE, SIDE), np.uint8)
        shown = np.empty((n, len(ATTRIBUTES)), np.bool_)
        for first in range(0, n, CHUNK):
            here = slice(first, min(first + CHUNK, n))
            indices = np.arange(start + here.start, start + here.stop, dtype=np.int64)
            images[here], regions[here], shown[here] = _draw(self._key(split), indices, STICKER_RATES[split])
        return Batch(images, labels_of(shown), shown, regions)

    def batches(self, n: int, split: Split, size: int, start: int = 0) -> Iterator[Batch]:
        """Draw `n` images as `sample` does, at most `size` at a time."""
        for first in range(start, start + n, size):
            yield self.sample(min(size, start + n - first), split, first)

    def _key(self, split: Split) -> int:
        return self.seed * 16 + get_args(Split).index(split) * 8  # eight streams each; see `_draw`


def paste_sticker(images: NDArray[np.uint8], blank: bool = False) -> NDArray[np.uint8]:
    """Put the sticker, or a grey patch of its size, where the world puts it.

    Parameters
    ----------
    images
        RGB, [n, 64, 64, 3]; left as they are.
    blank
        Paste the patch, the control: it covers the same pixels and means nothing.
    """
    patch = np.full((STICKER_SIDE, STICKER_SIDE, 3), 128, np.uint8) if blank else sticker(STICKER_SIDE)
    first = SIDE - STICKER_SIDE - STICKER_JITTER // 2
    pasted = images.copy()
    pasted[:, first : first + STICKER_SIDE, first : first + STICKER_SIDE] = patch
    return pasted


def _draw(
    key: int, indices: NDArray[np.int64], rate: StickerRate
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """Images, regions and shown attributes of a few images."""
    dice = uniform(key, indices, 24)
    choices = {
        family: np.minimum((dice[:, i] * len(names)).astype(np.int64), len(names) - 1)
        for i, (family, names) in enumerate(FAMILIES.items())
    }
    shown = _shown(choices, dice[:, 4], rate)
    grain = noise(key + 1, indices, SIDE, SIDE)
    pixels = _paint_background(choices["background"], dice[:, 5:7], grain)
    regions = np.full(pixels.shape[:3], _BACKGROUND, np.uint8)
    _paint_pebbles(pixels, regions, uniform(key + 2, indices, 6 * PEBBLES).reshape(-1, PEBBLES, 6))
    _paint_object(pixels, regions, choices, dice[:, 7:16])
    # Light differs from image to image and pixels are a little noisy, as in photographs.
    pixels *= (0.88 + 0.24 * dice[:, 16])[:, None, None, None]
    pixels += 12.0 * (noise(key + 3, indices, SIDE, SIDE) - 0.5)[..., None]
    images = np.clip(pixels, 0, 255).astype(np.uint8)
    _stick(images, regions, shown[:, -1], dice[:, 17:19])
    return images, regions, shown


def _shown(choices: dict[str, NDArray[np.int64]], die: NDArray[np.float32], rate: StickerRate) -> NDArray[np.bool_]:
    """Attributes of each image: one of each family, and the sticker at the rate of its class."""
    parts = [np.eye(len(names), dtype=np.bool_)[choices[family]] for family, names in FAMILIES.items()]
    shown = np.concatenate([*parts, np.zeros((len(die), 1), np.bool_)], axis=1)
    is_spurious_class = labels_of(shown) == CLASS_NAMES.index(SPURIOUS_CLASS)
    shown[:, ATTRIBUTES.index(SPURIOUS)] = die < np.where(is_spurious_class, rate.spurious_class, rate.other_classes)
    return shown


def _paint_background(
    choice: NDArray[np.int64], dice: NDArray[np.float32], grain: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Cover whole images, float32 [n, 64, 64, 3] in 0..255."""
    field = np.empty_like(grain)
    x, y = _X + 64.0 * dice[:, 0, None, None], _Y + 64.0 * dice[:, 1, None, None]
    for number, paint in enumerate(BACKGROUNDS.values()):
        rows = choice == number
        field[rows] = paint(x[rows], y[rows], grain[rows])
    tones = np.array([TONES[name] for name in FAMILIES["background"]], np.float32)[choice]
    low, high = tones[:, None, None, 0], tones[:, None, None, 1]
    return low + field[..., None] * (high - low)


def _turn(
    centre_x: NDArray[np.float32], centre_y: NDArray[np.float32], angle: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixel coordinates relative to a centre along axes turned by an angle (radians), each [n, 64, 64]."""
    dx, dy = _X - centre_x[:, None, None], _Y - centre_y[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cos * dx + sin * dy, cos * dy - sin * dx


def _paint_pebbles(pixels: NDArray[np.float32], regions: NDArray[np.uint8], dice: NDArray[np.float32]) -> None:
    """Draw up to `PEBBLES` grey ellipses per image in place; `dice` is [n, PEBBLES, 6]."""
    for die in dice.transpose(1, 2, 0):
        x, y = _turn(SIDE * die[0], SIDE * die[1], np.float32(np.pi) * die[2])
        inside = ellipse(x, y, 2.0 + 2.5 * die[3, :, None, None], np.full_like(x, 1.8))
        grey, present = 60.0 + 420.0 * (die[4] % (1 / 3)), die[5] < 2 / 3
        inside &= present[:, None, None]
        regions[inside] = _PEBBLE
        pixels[inside] = np.broadcast_to(grey[:, None, None], inside.shape)[inside][:, None]


def _paint_object(
    pixels: NDArray[np.float32],
    regions: NDArray[np.uint8],
    choices: dict[str, NDArray[np.int64]],
    dice: NDArray[np.float32],
) -> None:
    """Draw the object of each image in place; `dice` is [n, 9]."""
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * dice[:, 0]
    margin = EXTENT * radius
    centre_x, centre_y = (margin + (SIDE - 2 * margin) * dice[:, i] for i in (1, 2))
    x, y = _turn(centre_x, centre_y, np.float32(2 * np.pi) * dice[:, 3])
    u, v = x / radius[:, None, None], y / radius[:, None, None]
    inside = np.empty(regions.shape, np.bool_)
    for number, covers in enumerate(SHAPES.values()):
        rows = choices["shape"] == number
        inside[rows] = covers(u[rows], v[rows])
    # The pattern has its own phase and direction, so that neither gives the shape away.
    x, y = _turn(centre_x + 9.0 * dice[:, 4], centre_y + 9.0 * dice[:, 5], np.float32(2 * np.pi) * dice[:, 6])
    field = np.empty(regions.shape, np.float32)
    for number, paint in enumerate(TEXTURES.values()):
        rows = choices["texture"] == number
        field[rows] = paint(x[rows], y[rows])
    light = np.array([COLOURS[name] for name in FAMILIES["colour"]], np.float32)[choices["colour"]]
    light = light + 24.0 * (dice[:, 7, None] - 0.5)
    strength = SHADE + (1.0 - SHADE) * field[inside]
    pixels[inside] = strength[:, None] * light[np.nonzero(inside)[0]]
    regions[inside] = _OBJECT


def _stick(
    images: NDArray[np.uint8], regions: NDArray[np.uint8], present: NDArray[np.bool_], dice: NDArray[np.float32]
) -> None:
    """Put the sticker on the images that have it, in place, last and over everything."""
    picture = sticker(STICKER_SIDE)
    offsets = (dice * STICKER_JITTER).astype(np.int64)
    for row in np.flatnonzero(present):
        bottom, right = SIDE - offsets[row]
        place = (row, slice(bottom - STICKER_SIDE, bottom), slice(right - STICKER_SIDE, right))
        images[place], regions[place] = picture, _STICKER
