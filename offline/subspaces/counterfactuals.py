"""Counterfactuals of groups: images that lack a group's features and are else most like its own (FALCON)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offline.exemplars import Excerpt
from offline.subspaces.grouping import Group
from offline.subspaces.probing import Probe

_ELEMENTS = 2**24
"""Most products of images and groups that are held at a time."""


def nearest_without(probe: Probe, groups: Sequence[Group], count: int, similarity: float) -> list[list[Excerpt]]:
    """Return the counterfactuals of each group, most similar first; whole views.

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
