"""The prototype test (Herdt et al., 2025): a collage of a class's prototypes should be predicted as the class.

Cut out of images that the model takes for other classes, the prototypes must carry the class by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.preprocessing import Preprocessing
from offline.config import TrainingConfig
from offline.images import ImageFolder, shuffled
from offline.nearest import Found, Place, corner, search
from offline.task import Task

GRIDS = {4: (2, 2), 6: (2, 3)}
"""Rows and columns of the collages, by the number of crops."""

CROPS = max(GRIDS)
"""Most crops of a collage."""


class Collage(NamedTuple):
    """Crops of a class's prototypes side by side."""

    target: int
    """The class."""
    name: str
    """Of the metric: ``collage_4``, ``collage_6``, and ``…_excluded`` with no crop from an image predicted as it."""
    view: NDArray[np.uint8]
    """``[height, width, 3]``: what the model sees."""


class Tested(NamedTuple):
    """What the test found."""

    metrics: dict[int, dict[str, float]]
    """By class: 1 if the collage of that name is predicted as the class, else 0, and the class's probability."""
    found: Found
    """Where the crops come from."""


def measure(
    task: Task[TrainingConfig], dictionaries: Mapping[int, Tensor], folder: ImageFolder, images: int, count: int = CROPS
) -> Tested:
    """Find the prototypes of every class in some images, paste them together, and ask the model.

    Parameters
    ----------
    task
        The model, cut at the layer of the concepts.
    dictionaries
        The concepts of each class, ``[K, C]``, most important first.
    folder
        The probe set.
    images
        Most of its images to look at.
    count
        Places of a concept to find, if more than a collage needs.
    """
    keys = shuffled(folder.keys, task.config.seed)[:images]
    found = search(task, folder, keys, dictionaries, max(count, CROPS))
    metrics: dict[int, dict[str, float]] = {target: {} for target in dictionaries}
    made = collages(folder, task.model.spec.preprocessing, found)
    while some := list(islice(made, task.config.batch_size)):
        targets = torch.tensor([collage.target for collage in some], device=task.model.device)
        with torch.no_grad():
            logits = task.model.module(task.model.inputs(np.stack([collage.view for collage in some])))
        shares = logits.softmax(1).nan_to_num(0.0)
        probability = shares.gather(1, targets.unsqueeze(1)).squeeze(1)
        predicted = (probability == shares.amax(1)) & (probability > 0)
        for collage, taken, share in zip(some, predicted.tolist(), probability.tolist(), strict=True):
            metrics[collage.target] |= {collage.name: float(taken), f"{collage.name}_probability": share}
    return Tested(metrics, found)


def collages(folder: ImageFolder, view: Preprocessing, found: Found) -> Iterator[Collage]:
    """Yield the collages of every class, but those that there are too few places for; images are opened as needed."""
    for suffix, places in (("", found.nearest), ("_excluded", found.elsewhere)):
        for target, of_concepts in places.items():
            # The nearest place of each concept in turn, then, where concepts are few, the second of each.
            chosen = [place for rank in zip_longest(*of_concepts) for place in rank if place is not None][:CROPS]
            views = {key: view.fit(folder.open(key))[0] for key in {place.key for place in chosen}}
            for count, grid in GRIDS.items():
                if len(chosen) >= count:
                    yield Collage(target, f"collage_{count}{suffix}", paste(chosen[:count], views, view, grid))


def paste(
    places: Sequence[Place], views: Mapping[str, NDArray[np.uint8]], view: Preprocessing, grid: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return a picture of the model's input size: crops around places, at their own scale, along rows.

    Parameters
    ----------
    places
        One a cell.
    views
        What the model sees of their images, by key.
    view
        The size.
    grid
        Rows and columns.
    """
    picture = np.zeros((view.height, view.width, 3), np.uint8)
    rows, columns = grid
    for cell, place in enumerate(places):
        row, column = divmod(cell, columns)
        top, bottom = view.height * row // rows, view.height * (row + 1) // rows
        left, right = view.width * column // columns, view.width * (column + 1) // columns
        y, x = corner(place, view, bottom - top, right - left)
        picture[top:bottom, left:right] = views[place.key][y : y + bottom - top, x : x + right - left]
    return picture
