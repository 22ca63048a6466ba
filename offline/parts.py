"""Parts of concepts: sub-concepts at an earlier layer (the recursion of CRAFT, arXiv 2211.10154, section 3.2).

For each concept the crops that excite it most are taken. Their mean activations at the earlier layer are factorised,
weighed by how much of each position belongs to the concept: what else a crop shows must not become a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from concepts import nnls, parts
from concepts.bank import Bank, Concept
from concepts.cut import Cut
from concepts.engine import Engine
from concepts.errors import NotTrainable
from concepts.kinds.nmf import NmfCodec
from concepts.layout import Layout
from concepts.model import Model
from offline import exemplars, nmf, splits
from offline.exemplars import Excerpt
from offline.per_class.crops import CropConfig, Cropping, Crops
from offline.per_class.lesson import Lesson


class PartsConfig(CropConfig):
    """What decides how concepts are split."""

    parts_layer: str | None = Field(
        None, description="Earlier layer at which every concept is split into parts; default: no parts."
    )
    parts: int = Field(5, ge=2, description="Parts a concept (the rank of the factorisation).")
    parts_crops: int = Field(100, ge=2, description="Most crops that a concept is split by: those that excite it most.")
    parts_images: int = Field(300, ge=1, description="Most held-out images that parts are measured on.")


@dataclass(frozen=True)
class _Learned:
    """The parts of one class's concepts; K' parts."""

    dictionary: Tensor
    """float32 ``[K', C']``, rows of unit length."""
    parents: list[int]
    """Of each part, the concept's place in its class."""
    excerpts: list[list[Excerpt]]
    """Of each part."""


class Splitting:
    """Splits the concepts of a bank into parts.

    Parameters
    ----------
    cropping
        How the concepts' images were cut.
    config
        How to split them.

    Raises
    ------
    NotTrainable
        If the earlier layer is none, or its activation can be negative; layers that would do are named.
    UnknownLayer, InvalidCut
        If the model cannot be cut there.
    """

    def __init__(self, cropping: Cropping, config: PartsConfig) -> None:
        self._cropping, self._config = cropping, config
        task = cropping.task
        self._early = replace(task, cut=_earlier(task.model, task.cut, config.parts_layer or ""))

    def split(self, lessons: Mapping[int, Lesson], bank: Bank) -> tuple[Bank, dict[str, bytes]]:
        """Return the bank with parts, its metrics with theirs, and the pictures of their exemplars.

        Parameters
        ----------
        lessons
            What was learned of each class, in the order of the bank.
        bank
            The bank of these concepts, not frozen.
        """
        task, owners, parents = self._cropping.task, [], []
        rows: list[Tensor] = []
        excerpts: list[list[Excerpt]] = []
        first = 0
        for step, (target, lesson) in enumerate(lessons.items()):
            task.report("splitting concepts", step, len(lessons))
            found = self._learn(lesson)
            rows.append(found.dictionary)
            owners += [target] * len(found.dictionary)
            parents += [first + parent for parent in found.parents]
            excerpts += found.excerpts
            first += len(lesson.dictionary)
        task.report("splitting concepts", len(lessons), len(lessons))
        if not owners:
            return bank, {}
        drawn = exemplars.draw(task.training, excerpts, first=len(bank.concepts))
        records = tuple(
            Concept(index, class_index=owner, exemplars=shown, parent=parent)
            for index, (owner, shown, parent) in enumerate(zip(owners, drawn.exemplars, parents, strict=True))
        )
        layout, layer = self._early.cut.layout, self._early.cut.layer
        whole = bank.with_parts("nmf", layer, layout.channels, records, {"dictionary": torch.cat(rows)})
        return self._measured(whole), drawn.pictures

    def _measured(self, bank: Bank) -> Bank:
        """Return the bank with what is measured of its parts on held-out images."""
        task = self._early
        if bank.parts is None:
            return bank

        def engine(of: Bank) -> Engine:
            of_parts = None if of.parts is None else Engine(task.model, of.parts, task.cut)
            return Engine(task.model, of, self._cropping.task.cut, of_parts=of_parts)

        found = splits.measure(task, bank, engine, self._config.parts_images)
        numbers = found.contributions
        records = tuple(
            replace(part, statistics={"contribution": numbers[part.id]} if part.id in numbers else {})
            for part in bank.parts.concepts
        )
        known = {} if found.attributes is None else {"attributes": found.attributes}
        metrics = {**bank.metrics, "parts": {"layer": bank.parts.layer, "count": len(records), **known}}
        return replace(bank, metrics=metrics, parts=replace(bank.parts, concepts=records, metrics=metrics))

    def _learn(self, lesson: Lesson) -> _Learned:
        """Factorise, concept by concept, the crops that excite it most."""
        config = self._config
        excited, early = self._means(lesson)
        chosen = [_strongest(excited[:, concept], config.parts_crops) for concept in range(excited.shape[1])]
        matrices = [early.vectors[crops, concept].double() for concept, crops in enumerate(chosen)]
        able = [k for k, matrix in enumerate(matrices) if min(matrix.shape) >= config.parts and bool(matrix.any())]
        found = nmf.factorise_all(
            [matrices[k] for k in able],
            config.parts,
            random_starts=config.random_starts,
            seed=config.seed,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
        )
        rows, parents, excerpts = [early.vectors.new_empty(0, early.vectors.shape[2])], [], []
        for concept, answer in zip(able, found, strict=True):
            used = answer.dictionary[0].any(1) & answer.codes[0].any(0)
            rows.append(answer.dictionary[0][used].float())
            parents += [concept] * int(used.sum())
            # Solved anew: where parts are much alike, the factorisation's own codes are not quite settled.
            codes = nnls.codes(matrices[concept].unsqueeze(0), answer.dictionary[:, used].double())[0]
            excerpts += self._excerpts(early, chosen[concept], codes.float())
        return _Learned(torch.cat(rows).cpu(), parents, excerpts)

    def _means(self, lesson: Lesson) -> tuple[Tensor, Crops]:
        """Return how much crops excite each concept ``[N, K]``, and the mean of its share of each, ``[N, K, C']``."""
        codec = NmfCodec(lesson.dictionary, [None] * len(lesson.dictionary))
        codec.to(self._cropping.task.model.device)

        def coded(positions: Tensor) -> Tensor:
            rows = torch.cat([positions.mean(1, keepdim=True), positions], 1)
            return codec.encode(rows, torch.zeros(len(rows), dtype=torch.int64)).values

        late = self._cropping.cut(lesson.keys, coded).vectors
        grids = _crop_layout(self._cropping.task.cut.layout, late.shape[1] - 1)
        left = iter(late[:, 1:])

        def weighed(positions: Tensor) -> Tensor:
            codes = torch.stack([next(left) for _ in range(len(positions))])
            grid = _crop_layout(self._early.cut.layout, positions.shape[1])
            shares = parts.shares(codes, codes.sum(2), grids, grid)
            means: Tensor = torch.einsum("npk,npc->nkc", shares, positions)
            return means / shares.sum(1).clamp_min(torch.finfo(shares.dtype).tiny).unsqueeze(2)

        early = Cropping(self._early, self._cropping.grid).cut(lesson.keys, weighed)
        return late[:, 0], early

    def _excerpts(self, crops: Crops, chosen: Tensor, codes: Tensor) -> list[list[Excerpt]]:
        """Return the crops that excite each part most, of those chosen, by their codes ``[n, N]``."""
        everywhere = codes.new_zeros(len(crops.vectors), codes.shape[1])
        everywhere[chosen] = codes
        return self._cropping.excerpts(crops, everywhere.cpu())


def _earlier(model: Model, cut: Cut, layer: str) -> Cut:
    """Cut the model at a layer before another one, where activations are non-negative."""
    earlier = model.cut(layer)
    running = model.layers()
    order = [found.name for found in running]
    before = running[: order.index(cut.layer)]
    able = [found.name for found in before if found.non_negative and found.layout.order != "bc"]
    remedy = f"layers that would do: {', '.join(able[-5:])}" if able else "no layer before it would do"
    if layer not in [found.name for found in before]:
        raise NotTrainable(f"parts are learned at a layer before {cut.layer!r}, which {layer!r} is not; {remedy}")
    if layer not in able:
        raise NotTrainable(
            f"activations at layer {layer!r} can be negative, or have no positions, which parts cannot be learned "
            f"from; {remedy}"
        )
    return earlier


def _crop_layout(layout: Layout, positions: int) -> Layout:
    """Return the layout of crops' positions at a layer, tokens left out: crops that are not enlarged are squares."""
    rows, columns = layout.grid
    side = math.isqrt(positions)
    return layout._replace(grid=(rows, columns) if rows * columns == positions else (side, side), tokens=0)


def _strongest(codes: Tensor, most: int) -> Tensor:
    """Return the rows whose codes ``[N]`` are largest, and not zero, int64."""
    order = codes.argsort(descending=True, stable=True)[:most]
    return order[codes[order] > 0]
