"""The insertion test (Herdt et al., 2025): crops of a prototype of class j, pasted into images predicted as class i.

If what the prototype shows is what tells j from i, the prediction should become j, and should not when a blank patch
covers the same pixels, or when any other patch of j is pasted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from concepts.bank import Concept, Exemplar
from concepts.model import Model
from concepts.pictures import decode
from concepts.preprocessing import Preprocessing
from offline.exemplars import LARGEST_SIDE, Excerpt
from offline.images import ImageFolder, Stream
from offline.progress import Reporter

PLACES = "places"
"""Tensor of a contrast bank: where in its view each exemplar was cut out, see ``places``."""

Variant = Literal["insertion", "blank", "random"]
VARIANTS: tuple[Variant, ...] = ("insertion", "blank", "random")
"""What is pasted: a prototype's crop; the mean colour of the pixels that it covers; any patch of class j."""

SHARES = tuple(f"{variant}_{what}" for variant in VARIANTS for what in ("flips", "gain"))
"""Statistics of a prototype that the test gives, beside ``insertion_images``."""

_VIEWS_BYTES = 2**28
"""Of the decoded images that are kept for the next prototypes."""


class Crop(NamedTuple):
    """What is pasted and where, in pixels of the view."""

    pixels: NDArray[np.uint8]
    """``[height, width, 3]``, at the view's scale."""
    top: int
    left: int


class Insertion(NamedTuple):
    """A prototype to paste."""

    target: int
    """Its class j."""
    other: int
    """Class i: into images predicted as it."""
    crops: Sequence[Crop]
    """They take turns over the images; at least one."""
    number: int
    """Whose random patches these are: a prototype's id."""


@dataclass(frozen=True, eq=False)
class Effect:
    """What pasting did to N images; rows by ``VARIANTS``."""

    target: int
    keys: Sequence[str]
    before: NDArray[np.float64]
    """Probability of class j in the image as it is, ``[N]``."""
    after: NDArray[np.float64]
    """Then, ``[3, N]``; NaN of a variant that could not be made."""
    predicted: NDArray[np.int64]
    """Class, ``[3, N]``; −1 where there is none, or where the model answers with NaN or infinity."""

    def flips(self, variant: Variant) -> float | None:
        """Return the share of images whose prediction becomes j; None where the variant could not be made."""
        row = VARIANTS.index(variant)
        return None if np.isnan(self.after[row]).any() else float((self.predicted[row] == self.target).mean())

    def gain(self, variant: Variant) -> float | None:
        """Return the mean change of the probability of j; None likewise."""
        row = self.after[VARIANTS.index(variant)]
        return None if np.isnan(row).any() else float((row - self.before).mean())

    def statistics(self) -> dict[str, float]:
        """Return all of it as a bank stores it of the prototype."""
        found: dict[str, float] = {"insertion_images": float(len(self.keys))}
        for variant in VARIANTS:
            values = {"flips": self.flips(variant), "gain": self.gain(variant)}
            found |= {f"{variant}_{name}": value for name, value in values.items() if value is not None}
        return found


@dataclass
class Pool:
    """Images by the class that a model predicts them as, decoded when they are needed.

    Parameters
    ----------
    model
        Which predicts.
    folder
        Where the images are.
    members
        Keys of the images predicted as each class.
    batch_size
        Images a forward pass.
    skipped
        Takes down what cannot be decoded.
    """

    model: Model
    folder: ImageFolder
    members: Mapping[int, Sequence[str]]
    batch_size: int = 128
    skipped: dict[str, str] = field(default_factory=dict)
    _kept: OrderedDict[tuple[int, int], Seen] = field(default_factory=OrderedDict)

    def seen(self, target: int, count: int) -> Seen:
        """Return the first images predicted as a class."""
        known = self._kept.pop((target, count), None) or self._look(self.members.get(target, ())[:count])
        self._kept[target, count] = known  # now the latest
        while len(self._kept) > 2 and sum(each.views.nbytes for each in self._kept.values()) > _VIEWS_BYTES:
            self._kept.popitem(last=False)
        return known

    def _look(self, keys: Sequence[str]) -> Seen:
        view = self.model.spec.preprocessing
        stream = Stream(self.folder, keys, view, self.batch_size, self.skipped)
        found = [(batch.keys, batch.views, probabilities(self.model, batch.views)) for batch in stream]
        if not found:
            nothing = np.zeros((0, view.height, view.width, 3), np.uint8)
            return Seen([], nothing, np.zeros((0, len(self.model.spec.class_names))))
        names, views, shares = zip(*found, strict=True)
        return Seen([key for some in names for key in some], np.concatenate(views), np.concatenate(shares))


class Seen(NamedTuple):
    """N images predicted as one class."""

    keys: list[str]
    views: NDArray[np.uint8]
    """``[N, height, width, 3]``."""
    probabilities: NDArray[np.float64]
    """``[N, n_classes]``."""


def probabilities(model: Model, views: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the model's probabilities ``[B, n_classes]``; zeros for an image that it answers with NaN or infinity."""
    with torch.no_grad():
        shares = model.module(model.inputs(views)).double().softmax(1)
    found: NDArray[np.float64] = shares.nan_to_num(0.0).cpu().numpy()
    return found


def places(folder: ImageFolder, chosen: Sequence[Sequence[Excerpt]], view: Preprocessing) -> Tensor:
    """Return where in its view each exemplar was cut out: a bank's tensor ``places``.

    Parameters
    ----------
    folder
        Where the exemplars' images are.
    chosen
        For each concept its exemplars.
    view
        What the model sees of an image.

    Returns
    -------
    float32 ``[K, exemplars, 4]``
        Left and right as shares of the view's width, top and bottom of its height, in the order of a ``Box``; NaN where
        a concept has fewer exemplars.
    """
    found = torch.full((len(chosen), max(map(len, chosen), default=0), 4), torch.nan)
    boxes = {key: view.fit(folder.open(key))[1] for key in {e.key for excerpts in chosen for e in excerpts}}
    for concept, excerpts in enumerate(chosen):
        for place, (key, box, _) in enumerate(excerpts):
            whole = boxes[key]
            across = [(x - whole.left) / (whole.right - whole.left) for x in (box.left, box.right)]
            down = [(y - whole.top) / (whole.bottom - whole.top) for y in (box.top, box.bottom)]
            found[concept, place] = torch.tensor([across[0], down[0], across[1], down[1]])
    return found


def crops(concept: Concept, places: Tensor, picture: Callable[[Exemplar], bytes], view: Preprocessing) -> list[Crop]:
    """Return the exemplars of a prototype at the scale and place of the model's view.

    Parameters
    ----------
    concept
        The prototype.
    places
        Of its exemplars, ``[exemplars, 4]``; a row of the bank's tensor.
    picture
        Reads an exemplar's file.
    view
        What the model sees of an image.
    """
    found = []
    for exemplar, place in zip(concept.exemplars, places.tolist(), strict=False):
        left, right = (min(max(round(place[n] * view.width), 0), view.width) for n in (0, 2))
        top, bottom = (min(max(round(place[n] * view.height), 0), view.height) for n in (1, 3))
        image = decode(picture(exemplar), pixel_limit=LARGEST_SIDE**2, formats=("WEBP",))
        size = (max(right - left, 1), max(bottom - top, 1))
        pixels = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
        found.append(Crop(np.asarray(pixels), min(top, view.height - 1), min(left, view.width - 1)))
    return found


def insertions(
    concepts: Sequence[Concept], places: Tensor, picture: Callable[[Exemplar], bytes], view: Preprocessing
) -> list[Insertion]:
    """Return every prototype that has exemplars, to be pasted into images of the class that it is contrasted with.

    Parameters
    ----------
    concepts
        Of a contrast bank.
    places
        The bank's tensor of that name.
    picture, view
        As of ``crops``.
    """
    return [
        Insertion(
            concept.class_index, concept.other_index, crops(concept, places[concept.id], picture, view), concept.id
        )
        for concept in concepts
        if concept.exemplars and concept.class_index is not None and concept.other_index is not None
    ]


def tested(
    pool: Pool,
    concepts: Sequence[Concept],
    places: Tensor,
    pictures: Mapping[str, bytes],
    images: int,
    seed: int,
    report: Reporter,
) -> tuple[Concept, ...]:
    """Return the concepts of a contrast bank, each with what ``measure`` found among its statistics.

    Parameters
    ----------
    pool
        The model, and held-out images.
    concepts, places
        As of ``insertions``.
    pictures
        Of the exemplars, by file.
    images, seed, report
        As of ``measure``.
    """
    wanted = insertions(concepts, places, lambda exemplar: pictures[exemplar.file], pool.model.spec.preprocessing)
    effects = zip(wanted, measure(pool, wanted, images, seed, report), strict=True)
    known = {one.number: effect.statistics() for one, effect in effects if effect is not None}
    return tuple(replace(c, statistics={**c.statistics, **known.get(c.id, {})}) for c in concepts)


def measure(
    pool: Pool, insertions: Sequence[Insertion], images: int, seed: int, report: Reporter, stage: str = "inserting"
) -> list[Effect | None]:
    """Paste prototypes into images, and ask the model.

    At most a batch of edited images exists at a time, beside the decoded ones.

    Parameters
    ----------
    pool
        The model, and images that are neither of its training nor of the bank's.
    insertions
        The prototypes; batches are filled across them.
    images
        Most images a prototype.
    seed
        Of the random patches.
    report
        Hears of it.
    stage
        What it hears.

    Returns
    -------
    list
        In the order of the insertions; None where no image is predicted as the class to paste into.
    """
    # Class by class, so that the images of one are decoded once.
    order = sorted(range(len(insertions)), key=lambda number: (insertions[number].other, number))
    effects: list[Effect | None] = [None] * len(insertions)
    edits = _edits(pool, insertions, order, images, seed, effects)
    report(stage, 0, len(order))
    while some := list(islice(edits, pool.batch_size)):
        shares = probabilities(pool.model, np.stack([edit.view for edit in some]))
        for edit, share in zip(some, shares, strict=True):
            edit.effect.after[edit.variant, edit.row] = share[edit.effect.target]
            edit.effect.predicted[edit.variant, edit.row] = share.argmax() if share.any() else -1
        report(stage, min(some[-1].rank, len(order) - 1), len(order))
    report(stage, len(order), len(order))
    return effects


class _Edit(NamedTuple):
    """One image to ask the model about, and where its answer goes."""

    rank: int
    effect: Effect
    variant: int
    row: int
    view: NDArray[np.uint8]


def _edits(
    pool: Pool,
    insertions: Sequence[Insertion],
    order: Sequence[int],
    images: int,
    seed: int,
    effects: list[Effect | None],
) -> Iterator[_Edit]:
    """Yield all edited images, and put the effects that they fill in their place."""
    for rank, number in enumerate(order):
        one = insertions[number]
        seen, source = pool.seen(one.other, images), pool.seen(one.target, images)
        count = len(seen.keys)
        if not count:
            continue
        before = seen.probabilities[:, one.target]
        nothing = np.full((len(VARIANTS), count), np.nan), np.full((len(VARIANTS), count), -1)
        effect = effects[number] = Effect(one.target, seen.keys, before, *nothing)
        for row, view in enumerate(seen.views):
            for variant, edited in variants(one, row, view, source.views, seed).items():
                yield _Edit(rank, effect, VARIANTS.index(variant), row, edited)


def variants(
    insertion: Insertion, row: int, view: NDArray[np.uint8], source: NDArray[np.uint8], seed: int
) -> dict[Variant, NDArray[np.uint8]]:
    """Return one image with everything that is pasted into it, each by itself.

    Parameters
    ----------
    insertion
        The prototype.
    row
        The image's number.
    view
        The image ``[height, width, 3]``.
    source
        Images to cut random patches from, ``[M, height, width, 3]``; without any, no such patch is pasted.
    seed
        With the insertion and the row it decides which patch that is.
    """
    crop = insertion.crops[row % len(insertion.crops)]
    height, width = crop.pixels.shape[:2]
    # The mean of what it covers brings in least. In a corner of bricks-triangle images (the demo's CNN),
    # grey alone flips 16 to 19 % of them to bricks-cross, the whole image's mean colour 6 to 8 %, this 5 to 6 %.
    covered = view[crop.top : crop.top + height, crop.left : crop.left + width]
    blank = np.broadcast_to(np.rint(covered.mean((0, 1))).astype(np.uint8), crop.pixels.shape)
    pasted: dict[Variant, NDArray[np.uint8]] = {
        "insertion": paste(view, crop),
        "blank": paste(view, crop._replace(pixels=blank)),
    }
    if len(source):
        dice = np.random.default_rng([seed, insertion.target, insertion.other, insertion.number, row])
        image = source[dice.integers(len(source))]
        top, left = (
            int(dice.integers(whole - part + 1)) for whole, part in zip(view.shape, (height, width), strict=False)
        )
        pasted["random"] = paste(view, Crop(image[top : top + height, left : left + width], top, left))
    return pasted


def paste(view: NDArray[np.uint8], crop: Crop) -> NDArray[np.uint8]:
    """Return a copy of a view with a crop in it."""
    height, width = crop.pixels.shape[:2]
    pasted = view.copy()
    pasted[crop.top : crop.top + height, crop.left : crop.left + width] = crop.pixels
    return pasted
