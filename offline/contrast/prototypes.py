"""Contrastive prototypes: what lies on one side of a plane, in non-negative parts (Herdt et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from concepts.codec import DenseCodes
from concepts.contrast.planes import Planes
from concepts.preprocessing import Box
from offline import nmf, passes
from offline.contrast.config import ContrastConfig
from offline.exemplars import Excerpt
from offline.gallery import Gallery
from offline.task import Task

_BYTES = 2**28
"""Most bytes of matrices that are factorised together; one always is."""


class Prototypes(NamedTuple):
    """K prototypes of a class against another, what they carry most of first."""

    target: int
    other: int
    dictionary: Tensor
    """``[K, C]``, rows of unit length, on the CPU; K may be zero."""
    energy: Tensor
    """Share of the squared codes of all of them, ``[K]``."""
    excerpts: list[list[Excerpt]]
    """Of each, best first."""


class _Images(NamedTuple):
    """Training images of one class; N images, P positions with a place."""

    vectors: Tensor
    """``[N, P, C]``."""
    keys: list[str]
    boxes: list[Box]


def learn(
    task: Task[ContrastConfig],
    planes: Planes,
    pairs: Mapping[int, Sequence[int]],
    members: Mapping[int, Sequence[str]],
) -> Iterator[Prototypes]:
    """Learn prototypes of ordered pairs, with the activations of one class at a time in memory.

    Parameters
    ----------
    task
        Whose layer is non-negative.
    planes
        On the model's device.
    pairs
        By class, the classes that it is contrasted with.
    members
        Keys of each class's training images.
    """
    for step, (target, others) in enumerate(pairs.items()):
        task.report("learning prototypes", step, len(pairs))
        images = _load(task, members[target])
        rows = images.vectors.flatten(0, 1)
        for some in torch.tensor(others, device=rows.device).split(max(_BYTES // (rows.numel() * 8), 1)):
            yield from _learn(task, planes, target, some, images)
    task.report("learning prototypes", len(pairs), len(pairs))


def _load(task: Task[ContrastConfig], keys: Sequence[str]) -> _Images:
    images, parts = _Images(torch.empty(0), [], []), []
    for batch, a in passes.activations(task.model, task.cut, task.stream(task.training, keys)):
        parts.append(task.cut.positions(a)[:, task.cut.layout.tokens :])
        images.keys.extend(batch.keys)
        images.boxes.extend(batch.boxes)
    return images._replace(vectors=torch.cat(parts))


def _learn(
    task: Task[ContrastConfig], planes: Planes, target: int, others: Tensor, images: _Images
) -> Iterator[Prototypes]:
    """Factorise a class's positions, each multiplied by how far it lies on the class's side of the plane to another."""
    config, rows = task.config, images.vectors.flatten(0, 1)
    normals, offsets = planes.between(torch.full_like(others, target), others)
    weights = (rows @ normals.T + offsets).clamp_min(0)
    weighted = {
        other: rows.double() * weights[:, place, None].double()
        for place, other in enumerate(others.tolist())
        if bool((rows * weights[:, place, None]).any())
    }
    factorised = nmf.factorise_all(
        list(weighted.values()),
        min(config.concepts, *rows.shape),
        random_starts=config.random_starts,
        seed=config.seed,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )
    for other, found in zip(weighted, factorised, strict=True):
        codes, dictionary = found.codes[0], found.dictionary[0]
        energy = codes.square().sum(0) * dictionary.any(1)
        order = energy.argsort(descending=True, stable=True)
        order = order[energy[order] > 0]
        share = energy[order] / energy.sum()
        excerpts = _excerpts(task, images, codes[:, order])
        yield Prototypes(target, other, dictionary[order].float().cpu(), share.cpu(), excerpts)


def _excerpts(task: Task[ContrastConfig], images: _Images, codes: Tensor) -> list[list[Excerpt]]:
    """Return the places with the largest codes ``[N · P, K]``, each in another image."""
    layout, view, concepts = task.cut.layout, task.model.spec.preprocessing, codes.shape[1]
    gallery = Gallery(concepts, task.config.exemplars, layout, view, task.config.side(view, layout.grid))
    placed = functional.pad(codes.float().unflatten(0, (len(images.keys), -1)), (0, 0, layout.tokens, 0))
    slots = torch.arange(concepts, device=codes.device).expand(len(images.keys), -1)
    gallery.add(images.keys, images.boxes, DenseCodes(placed, slots))
    return gallery.excerpts(range(concepts))
