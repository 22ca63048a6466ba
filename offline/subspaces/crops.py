"""Where groups of features are in their images, and how much alike these places look to a CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from concepts.layout import Layout
from concepts.preprocessing import Box
from offline import passes
from offline.config import TrainingConfig
from offline.exemplars import Excerpt, cut_out
from offline.images import ImageFolder
from offline.metrics.localisation import enlarge
from offline.subspaces.grouping import Group
from offline.subspaces.probing import Probe
from offline.task import Task

if TYPE_CHECKING:
    from concepts.clip import Clip

_AT_ONCE = 256
"""Crops that are held until they are embedded."""

_ROUNDING = np.float32(1e-5)
"""Relative differences that may be no more than what enlarging a map rounds."""


class Crops:
    """The crops of each group, best first: of any of its images, as the strongest may share what it does not mean.

    Parameters
    ----------
    probe
        The images, in an order that says nothing about them: the first ones of each group are taken.
    groups
        Of these.
    most
        Crops of a group.
    """

    def __init__(self, probe: Probe, groups: Sequence[Group], most: int) -> None:
        self._probe = probe
        self.excerpts: list[list[Excerpt]] = []
        self.embeddings: list[Tensor] = []
        """Of each group, float32 ``[n, D]``."""
        self._uses: dict[int, list[tuple[int, int]]] = {}
        """Of each image, the groups that it is shown for, and in which place."""
        for number, group in enumerate(groups):
            images = torch.from_numpy(group.images[:most])
            strengths = probe.strengths(images, torch.tensor(group.features))
            order = strengths.argsort(descending=True, stable=True)
            self.excerpts.append(
                [
                    Excerpt(probe.keys[image], probe.boxes[image], strength)
                    for image, strength in zip(images[order].tolist(), strengths[order].tolist(), strict=True)
                ]
            )
            for place, image in enumerate(images[order].tolist()):
                self._uses.setdefault(image, []).append((number, place))
        self._features = [list(group.features) for group in groups]

    def cut(self, task: Task[TrainingConfig], clip: Clip, threshold: float) -> None:
        """Find the places in the images by a second pass over these alone, and embed what is there.

        Grad-CAM on the sum of a group's features of the mean over positions: the gradient is the same for each of them
        at every position, and zero for the others, so that the map is the ReLU of the sum of the features' own maps.

        Parameters
        ----------
        task
            As of the probe.
        clip
            Embeds the crops.
        threshold
            Share of the way from a map's least to its largest value from which on a place belongs to the crop.
        """
        self.embeddings = [torch.zeros(len(excerpts), clip.width) for excerpts in self.excerpts]
        pictures: list[Image.Image] = []
        uses: list[tuple[int, int]] = []
        done, total = 0, sum(map(len, self.excerpts))

        def embed() -> None:
            nonlocal done
            for (group, place), row in zip(uses, clip.embed_pictures(pictures), strict=True):
                self.embeddings[group][place] = row
            done += len(uses)
            pictures.clear()
            uses.clear()
            task.report("cutting out groups", done, total)

        for image, maps in self._maps(task):
            picture = task.training.open(self._probe.keys[image])
            for use, map_ in zip(self._uses[image], maps.numpy(), strict=True):
                group, place = use
                box = place_of(map_, threshold, self._probe.boxes[image])
                self.excerpts[group][place] = self.excerpts[group][place]._replace(box=box)
                pictures.append(cut_out(picture, box))
                uses.append(use)
            if len(pictures) >= _AT_ONCE:
                embed()
        if pictures:
            embed()

    def _maps(self, task: Task[TrainingConfig]) -> Iterator[tuple[int, Tensor]]:
        """Yield each image with the maps of its groups at the size of the model's view, ``[n, H, W]``."""
        images = sorted(self._uses)
        numbers = {self._probe.keys[image]: image for image in images}
        view, layout = task.model.spec.preprocessing, task.cut.layout
        stream = task.stream(task.training, [self._probe.keys[image] for image in images])
        for batch, a in passes.activations(task.model, task.cut, stream):
            for key, positions in zip(batch.keys, task.cut.positions(a), strict=True):
                image = numbers[key]
                features = [self._features[group] for group, _ in self._uses[image]]
                maps = torch.stack([grid_map(positions, own, layout) for own in features])
                yield image, enlarge(maps, (view.height, view.width)).cpu()


def embed(folder: ImageFolder, chosen: Sequence[Sequence[Excerpt]], clip: Clip) -> list[Tensor]:
    """Return what excerpts look like to a CLIP, of each group ``[n, D]``; each image is opened once."""
    boxes: dict[str, set[Box]] = {}
    for excerpt in chain.from_iterable(chosen):
        boxes.setdefault(excerpt.key, set()).add(excerpt.box)
    found: dict[tuple[str, Box], Tensor] = {}
    for key, wanted in boxes.items():
        picture, own = folder.open(key), sorted(wanted)
        rows = clip.embed_pictures([cut_out(picture, box) for box in own])
        found |= {(key, box): row for box, row in zip(own, rows, strict=True)}
    nothing = torch.zeros(0, clip.width)
    return [
        torch.stack([found[excerpt.key, excerpt.box] for excerpt in excerpts]) if excerpts else nothing
        for excerpts in chosen
    ]


def grid_map(positions: Tensor, features: Sequence[int], layout: Layout) -> Tensor:
    """Return the map of a group in an image's activation ``[P, C]``: the ReLU of its features' sum, ``[h, w]``."""
    summed = positions[layout.tokens :, list(features)].sum(1)
    return summed.relu().view(layout.grid)


def place_of(map_: NDArray[np.float32], threshold: float, view: Box) -> Box:
    """Return the box around the largest connected place where a map is high.

    Parameters
    ----------
    map_
        ``[H, W]``, of the model's view.
    threshold
        Share of the way from its least to its largest value. A map that is the same everywhere is high everywhere.
    view
        Where the view lies in the image, in the image's pixels, as is the answer.
    """
    least, most = map_.min(), map_.max()
    if most - least <= _ROUNDING * abs(most):
        most = least
    labels, count = ndimage.label(map_ >= least + np.float32(threshold) * (most - least))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    rows, columns = ndimage.find_objects(labels)[int(sizes.argmax())]
    y, x = (view.bottom - view.top) / map_.shape[0], (view.right - view.left) / map_.shape[1]
    return Box(
        view.left + columns.start * x, view.top + rows.start * y, view.left + columns.stop * x, view.top + rows.stop * y
    )


def cohesion(embeddings: Tensor) -> float:
    """Return the mean cosine of all pairs of unit rows ``[n, D]``, n at least 2."""
    count = len(embeddings)
    together = embeddings.double().sum(0).square().sum() - embeddings.double().square().sum()
    return float(together / (count * (count - 1)))
