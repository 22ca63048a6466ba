"""Counterfactuals of concepts: windows of images that lack the concept and are else like its exemplars.

FALCON (arXiv 2307.10504) takes for a group of features the images in which every one of these is below its mean, and
whose other features are most similar to the group's. Here concepts are of any bank. An image lacks a concept if its
code there is among the smallest quarter: with codes that are mostly zero, the mean still lets in images that show it. A
concept is a direction u of the layer; beside it a window has ``a − ⟨a, u⟩u / ‖u‖²``, and counterfactuals are the
windows in which that is most similar to what it is in the exemplars.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offline.exemplars import Excerpt
from offline.naming.windows import Seen

LACKING = 0.25
"""Share of the images that count as lacking a concept."""

_ELEMENTS = 2**24
"""Most similarities that are held at a time."""


@dataclass(frozen=True)
class Sought:
    """Of K concepts, what their counterfactuals must be like."""

    directions: Tensor
    """float32 ``[K, C]``, of any length."""
    presence: Tensor
    """How much of each is in each image that was seen, ``[N, K]``."""
    references: Sequence[Sequence[Tensor]]
    """Of each the mean activations of its exemplars, ``[C]`` each; without any it has no counterfactuals."""


def nearest_without(seen: Seen, sought: Sought, count: int, similarity: float) -> list[list[Excerpt]]:
    """Return the counterfactuals of concepts, most similar first, each from another image.

    Parameters
    ----------
    seen
        Windows of images.
    sought
        What is looked for in them.
    count
        Most of a concept.
    similarity
        Least cosine with what the exemplars show beside the concept.
    """
    chosen: list[list[Excerpt]] = [[] for _ in sought.references]
    if not seen.keys or not count:
        return chosen
    windows = torch.cat(seen.windows)  # [N, V, C]
    known = [concept for concept, own in enumerate(sought.references) if own]
    step = max(_ELEMENTS // (windows.shape[0] * windows.shape[1]), 1)
    for first in range(0, len(known), step):
        some = known[first : first + step]
        means = torch.stack([torch.stack(list(sought.references[concept])).float().mean(0) for concept in some])
        u = functional.normalize(sought.directions[some].float(), dim=1)
        presence = sought.presence[:, some]
        for concept, places in zip(some, _best(windows, u, presence, means, count, similarity), strict=True):
            for image, window in places:
                box = seen.grid.box(window, seen.views[image])
                chosen[concept].append(Excerpt(seen.keys[image], box, float(sought.presence[image, concept])))
    return chosen


def _best(
    windows: Tensor, u: Tensor, presence: Tensor, means: Tensor, count: int, similarity: float
) -> Iterator[list[tuple[int, int]]]:
    """Yield images and windows of some concepts; unit directions and means ``[k, C]``, presence ``[N, k]``."""
    rest = functional.normalize(means - (means * u).sum(1, keepdim=True) * u, dim=1)
    length = windows.square().sum(2, keepdim=True) - (windows @ u.T).square()
    cosines = (windows @ rest.T) / length.clamp_min(1e-12).sqrt()  # [N, V, k]
    nearest, window = cosines.max(1)
    nearest = nearest.masked_fill(presence > presence.quantile(LACKING, dim=0), -torch.inf)
    order = nearest.argsort(dim=0, descending=True, stable=True)[:count]
    for concept in range(len(u)):
        images = [image for image in order[:, concept].tolist() if nearest[image, concept] >= similarity]
        yield [(image, int(window[image, concept])) for image in images]
