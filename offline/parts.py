"""Parts of concepts: sub-concepts at an earlier layer (the recursion of CRAFT, arXiv 2211.10154, section 3.2).

For each concept the crops that excite it most are taken; their mean activations at the earlier layer are factorised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from concepts.bank import Bank, Concept
from concepts.codec import EMPTY
from concepts.cut import Cut
from concepts.errors import NotTrainable
from concepts.kinds.nmf import NmfCodec
from concepts.model import Model
from offline import exemplars, localise, nmf, passes
from offline.exemplars import Excerpt
from offline.images import shuffled
from offline.per_class.crops import CropConfig, Cropping, Crops
from offline.per_class.lesson import Lesson


class PartsConfig(CropConfig):
    """What decides how concepts are split."""

    parts_layer: str | None = Field(
        None, description="Earlier layer at which every concept is split into parts; default: no parts."
    )
    parts: int = Field(3, ge=2, description="Parts a concept (the rank of the factorisation).")
    parts_crops: int = Field(100, ge=2, description="Most crops that a concept is split by: those that excite it most.")


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
        dictionary = torch.cat(rows)
        codec = NmfCodec(dictionary, owners)
        codec.to(task.model.device)
        drawn = exemplars.draw(task.training, excerpts, first=len(bank.concepts))
        numbers = self._statistics(codec, len(owners))
        records = tuple(
            Concept(index, class_index=owner, statistics=statistics, exemplars=shown, parent=parent)
            for index, (owner, statistics, shown, parent) in enumerate(
                zip(owners, numbers, drawn.exemplars, parents, strict=True)
            )
        )
        metrics = {**bank.metrics, "parts": self._metrics(codec, len(owners))}
        layout, layer = self._early.cut.layout, self._early.cut.layer
        whole = replace(bank, metrics=metrics).with_parts(
            "nmf", layer, layout.channels, records, {"dictionary": dictionary}
        )
        return whole, drawn.pictures

    def _learn(self, lesson: Lesson) -> _Learned:
        """Factorise, concept by concept, the crops that excite it most."""
        config = self._config
        late = self._cropping.cut(lesson.keys, "craft", lambda positions: positions.mean(1))
        early = Cropping(self._early, self._cropping.grid).cut(lesson.keys, "craft", lambda p: p.mean(1))
        codes = NmfCodec(lesson.dictionary, [None] * len(lesson.dictionary))
        codes.to(late.vectors.device)
        excited = codes.encode(late.vectors.unsqueeze(0), torch.zeros(1, dtype=torch.int64)).values[0]
        chosen = [_strongest(excited[:, concept], config.parts_crops) for concept in range(excited.shape[1])]
        matrices = [early.vectors[crops].double() for crops in chosen]
        able = [k for k, matrix in enumerate(matrices) if min(matrix.shape) >= config.parts and bool(matrix.any())]
        found = nmf.factorise_all(
            [matrices[k] for k in able],
            config.parts,
            random_starts=config.random_starts,
            seed=config.seed,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
        )
        rows, parents, excerpts = [early.vectors.new_empty(0, early.vectors.shape[1])], [], []
        for concept, answer in zip(able, found, strict=True):
            used = answer.dictionary[0].any(1) & answer.codes[0].any(0)
            rows.append(answer.dictionary[0][used].float())
            parents += [concept] * int(used.sum())
            excerpts += self._excerpts(early, chosen[concept], answer.codes[0][:, used].float())
        return _Learned(torch.cat(rows).cpu(), parents, excerpts)

    def _excerpts(self, crops: Crops, chosen: Tensor, codes: Tensor) -> list[list[Excerpt]]:
        """Return the crops that excite each part most, of those chosen, by their codes ``[n, N]``."""
        everywhere = codes.new_zeros(len(crops.vectors), codes.shape[1])
        everywhere[chosen] = codes
        return self._cropping.excerpts(crops, everywhere.cpu())

    def _statistics(self, codec: NmfCodec, parts: int) -> list[dict[str, float]]:
        """Return each part's mean contribution on held-out images that are predicted as its class."""
        task = self._early
        quota = dict.fromkeys(codec.classes() or (), task.config.held_out_per_class)
        keys = shuffled(task.held_out.keys, task.config.seed)
        total, seen = torch.zeros(parts + 1, dtype=torch.float64), torch.zeros(parts + 1)
        for batch in passes.explain(task.model, task.cut, codec, task.stream(task.held_out, keys), quota):
            slots = batch.codes.ids.masked_fill(batch.codes.ids == EMPTY, parts).flatten().cpu()
            total.index_add_(0, slots, batch.contributions.double().flatten().cpu())
            seen.index_add_(0, slots, torch.ones(len(slots)))
        means = zip(total[:parts].tolist(), seen[:parts].tolist(), strict=True)
        return [{"contribution": value / count} if count else {} for value, count in means]

    def _metrics(self, codec: NmfCodec, parts: int) -> dict[str, Any]:
        """Return where parts look, in the terms of the concepts' own ``localisation``, where the truth is known."""
        task = self._early
        keys = shuffled(task.held_out.keys, task.config.seed)
        measured = localise.localise_held_out(task, codec, parts, keys, task.config.truth_images)
        known = {} if measured is None else {"localisation": measured}
        return {"layer": task.cut.layer, "count": parts, **known}


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


def _strongest(codes: Tensor, most: int) -> Tensor:
    """Return the rows whose codes ``[N]`` are largest, and not zero, int64."""
    order = codes.argsort(descending=True, stable=True)[:most]
    return order[codes[order] > 0]
