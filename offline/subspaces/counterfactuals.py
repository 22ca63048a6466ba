"""Counterfactuals of groups: images that lack a group's features and are else most like its own (FALCON)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from concepts.preprocessing import Box
from offline.exemplars import Excerpt
from offline.subspaces.grouping import Group
from offline.subspaces.probing import Probe

_ELEMENTS = 2**24
"""Most products of images and groups that are held at a time."""


def nearest_without(probe: Probe, groups: Sequence[Group], count: int, similarity: float) -> list[list[Excerpt]]:
    """Return the counterfactuals of each group, most similar first; whole views, see ``cut_like``.

    A counterfactual is an image in which each feature of the group is below the mean of all entries, and whose other
    features have a cosine of at least ``similarity`` with those of the mean of the group's images.

    Parameters
    ----------
    probe
        The images, N.
    groups
        Of these.
    count
        Most of a group.
    similarity
        Least cosine.
    """
    found: list[list[Excerpt]] = []
    step = max(_ELEMENTS // max(len(probe.keys), 1), 1)
    for first in range(0, len(groups), step):
        some = groups[first : first + step]
        means = torch.stack([probe.representations[torch.from_numpy(group.images)].mean(0) for group in some])
        for row, group in enumerate(some):
            means[row, list(group.features)] = 0.0
        products = probe.representations @ torch.nn.functional.normalize(means, dim=1).T
        for row, group in enumerate(some):
            found.append(_nearest(probe, group, products[:, row], count, similarity))
    return found


def cut_like(
    probe: Probe, without: Sequence[Sequence[Excerpt]], crops: Sequence[Sequence[Excerpt]]
) -> list[list[Excerpt]]:
    """Return counterfactuals cut at the places of their group's crops, these taken in turn.

    A CLIP then compares what is of one size, and sees no more of one than of the other.

    Parameters
    ----------
    probe
        The images.
    without
        From ``nearest_without``.
    crops
        Of each group, at least one.
    """
    views = dict(zip(probe.keys, probe.boxes, strict=True))
    return [
        [
            excerpt._replace(box=_moved(places[turn % len(places)], views, excerpt.box))
            for turn, excerpt in enumerate(excerpts)
        ]
        for excerpts, places in zip(without, crops, strict=True)
    ]


def _moved(crop: Excerpt, views: Mapping[str, Box], to: Box) -> Box:
    """Return where a crop's place in its own image's view lies in another view."""
    own, box = views[crop.key], crop.box
    x, y = (to.right - to.left) / (own.right - own.left), (to.bottom - to.top) / (own.bottom - own.top)
    left, top = to.left + (box.left - own.left) * x, to.top + (box.top - own.top) * y
    return Box(left, top, left + (box.right - box.left) * x, top + (box.bottom - box.top) * y)


def _nearest(probe: Probe, group: Group, products: torch.Tensor, count: int, similarity: float) -> list[Excerpt]:
    """Return one group's, from the products of all images with the unit mean of its other features, ``[N]``."""
    features = torch.tensor(group.features)
    own = probe.representations[:, features]
    others = (probe.representations.square().sum(1) - own.square().sum(1)).clamp_min(1e-12).sqrt()
    cosines = (products / others).masked_fill((own >= probe.mean).any(1), -torch.inf)
    images = cosines.argsort(descending=True, stable=True)[:count]
    images = images[cosines[images] >= similarity]
    strengths = probe.strengths(images, features).tolist()
    return [
        Excerpt(probe.keys[image], probe.boxes[image], strength)
        for image, strength in zip(images.tolist(), strengths, strict=True)
    ]
