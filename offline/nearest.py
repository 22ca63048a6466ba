"""The places in images that are nearest to each concept's direction: prototype pictures (Herdt et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from concepts.layout import Layout
from concepts.preprocessing import Box, Preprocessing
from offline import passes
from offline.config import TrainingConfig
from offline.exemplars import Excerpt
from offline.images import ImageFolder
from offline.task import Task

WINDOW = 2
"""Rows and columns of positions that are averaged: one position alone may be an accident."""

_COSINES = 2**25
"""Most that are held at a time, or those of one image: a batch has as many as windows and concepts multiplied."""


class Place(NamedTuple):
    """A window of positions in an image."""

    key: str
    view: Box
    """Where in the image the model's view lies."""
    centre: tuple[float, float]
    """Of the window, from the upper left of the view: its share of the height and of the width."""
    cosine: float
    """Between the mean activation there and the concept's direction."""


class Found(NamedTuple):
    """The places of every class's concepts."""

    nearest: dict[int, list[list[Place]]]
    """By class, of each of its concepts, nearest first, each in another image; none at a right angle to it."""
    elsewhere: dict[int, list[list[Place]]]
    """Likewise, in images that the model does not predict as the class."""


class Nearest:
    """The nearest places of concepts, each in another image, kept while any number of images passes by.

    Parameters
    ----------
    layout
        Of the layer.
    dictionaries
        The concepts of each class, ``[K, C]``.
    count
        Most places of a concept.
    device
        Where activations come from.
    """

    def __init__(self, layout: Layout, dictionaries: Mapping[int, Tensor], count: int, device: torch.device) -> None:
        self._layout, self._window = layout, window_of(layout)
        self._sizes = {target: len(dictionary) for target, dictionary in dictionaries.items()}
        owners = [target for target, size in self._sizes.items() for _ in range(size)]
        self._owners = torch.tensor(owners, device=device)
        self._directions = functional.normalize(torch.cat(list(dictionaries.values())), dim=1).to(device)
        self._anywhere, self._elsewhere = _Best(count, len(owners)), _Best(count, len(owners))
        self._keys: list[str] = []
        self._views: list[Box] = []

    def add(self, keys: Sequence[str], views: Sequence[Box], positions: Tensor, predicted: Tensor) -> None:
        """Take in images.

        Parameters
        ----------
        keys, views
            Of the images, and where in each the model's view lies.
        positions
            Their activations, ``[B, P, C]``.
        predicted
            Their classes, int64 ``[B]``.
        """
        windows = functional.normalize(self._pooled(positions), dim=2)
        cosines, window = self._largest(windows)
        others = cosines.masked_fill(predicted.unsqueeze(1) == self._owners, 0.0)
        self._anywhere.add(cosines.cpu(), window.cpu(), len(self._keys))
        self._elsewhere.add(others.cpu(), window.cpu(), len(self._keys))
        self._keys += keys
        self._views += views

    def _largest(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest cosine of each concept in each of some images, and its window: ``[B, K]`` both."""
        size = max(_COSINES // (windows.shape[1] * len(self._directions)), 1)
        found = [(some @ self._directions.T).max(1) for some in windows.split(size)]
        return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])

    def found(self) -> Found:
        """Return the places."""
        return Found(self._by_class(self._anywhere), self._by_class(self._elsewhere))

    def _by_class(self, best: _Best) -> dict[int, list[list[Place]]]:
        places = (
            [
                Place(self._keys[image], self._views[image], self._centre(window), cosine)
                for image, window, cosine in best.of(concept)
            ]
            for concept in range(len(self._owners))
        )
        return {target: list(islice(places, size)) for target, size in self._sizes.items()}

    def _pooled(self, positions: Tensor) -> Tensor:
        """Return the mean of every window, ``[B, windows, C]``; tokens without a place are left out."""
        grid = positions[:, self._layout.tokens :].unflatten(1, self._layout.grid).permute(0, 3, 1, 2)
        return functional.avg_pool2d(grid, self._window, stride=1).flatten(2).transpose(1, 2)

    def _centre(self, window: int) -> tuple[float, float]:
        (rows, columns), (height, width) = self._layout.grid, self._window
        row, column = divmod(window, columns - width + 1)
        return (row + height / 2) / rows, (column + width / 2) / columns


class _Best:
    """The largest cosines of K concepts so far, with their images and windows."""

    def __init__(self, count: int, concepts: int) -> None:
        self._count = count
        self._cosines = torch.zeros(0, concepts)
        self._places = torch.zeros(2, 0, concepts, dtype=torch.int64)

    def add(self, cosines: Tensor, windows: Tensor, first: int) -> None:
        """Take in images, ``[B, K]``, numbered from ``first``."""
        images = torch.arange(len(cosines)).unsqueeze(1).expand_as(windows) + first
        # Sorted stably, so that of equals the first image stays.
        best = torch.cat([self._cosines, cosines]).sort(dim=0, descending=True, stable=True)
        order = best.indices[: self._count]
        places = torch.cat([self._places, torch.stack([images, windows])], dim=1)
        self._cosines, self._places = best.values[: self._count], places.gather(1, order.expand(2, -1, -1))

    def of(self, concept: int) -> Iterator[tuple[int, int, float]]:
        """Yield image, window and cosine of one concept, largest first, while they are positive."""
        cosines, (images, windows) = self._cosines[:, concept].tolist(), self._places[:, :, concept].tolist()
        return ((i, w, c) for i, w, c in zip(images, windows, cosines, strict=True) if c > 0)


def search(
    task: Task[TrainingConfig], folder: ImageFolder, keys: Sequence[str], dictionaries: Mapping[int, Tensor], count: int
) -> Found:
    """Look through images once for the nearest places of all classes' concepts.

    Parameters
    ----------
    task
        The model, cut at the layer of the concepts.
    folder, keys
        The images.
    dictionaries
        Of each class, ``[K, C]``.
    count
        Most places of a concept.
    """
    nearest = Nearest(task.cut.layout, dictionaries, count, task.model.device)
    done = 0
    for batch, a in passes.activations(task.model, task.cut, task.stream(folder, keys)):
        with torch.no_grad():
            nearest.add(batch.keys, batch.boxes, task.cut.positions(a), task.cut.head(a).argmax(1))
        done += len(batch.keys)
        task.report("looking for prototypes", min(done, len(keys) - 1), len(keys))
    task.report("looking for prototypes", len(keys), len(keys))
    return nearest.found()


def window_of(layout: Layout) -> tuple[int, int]:
    """Return rows and columns of the windows of a layer."""
    rows, columns = layout.grid
    return min(WINDOW, rows), min(WINDOW, columns)


def corner(place: Place, view: Preprocessing, height: int, width: int) -> tuple[int, int]:
    """Return top and left of a rectangle around a place that stays within the view; all in pixels of the view."""
    top = round(place.centre[0] * view.height - height / 2)
    left = round(place.centre[1] * view.width - width / 2)
    return min(max(top, 0), view.height - height), min(max(left, 0), view.width - width)


def excerpt(place: Place, layout: Layout, view: Preprocessing) -> Excerpt:
    """Return what is shown of a place: half the view's height and width around it, or its window where that is more."""
    (rows, columns), window = layout.grid, window_of(layout)
    height = max(view.height // 2, view.height * window[0] // rows, 1)
    width = max(view.width // 2, view.width * window[1] // columns, 1)
    top, left = corner(place, view, height, width)
    shown = place.view
    y, x = (shown.bottom - shown.top) / view.height, (shown.right - shown.left) / view.width
    upper, first = shown.top + top * y, shown.left + left * x
    return Excerpt(place.key, Box(first, upper, first + width * x, upper + height * y), place.cosine)
