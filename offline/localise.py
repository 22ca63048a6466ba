"""Measuring concepts against the known attributes of a probe set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.codec import EMPTY, Codec, Codes
from concepts.cut import Cut
from concepts.model import Model
from offline.config import TrainingConfig
from offline.images import Stream
from offline.metrics import localisation
from offline.task import Task
from offline.truth import Truth, read_truth


def localise(
    model: Model, cut: Cut, codec: Codec, concepts: int, stream: Stream, truth: Truth
) -> dict[str, Any] | None:
    """Match concepts to attributes and measure where they look.

    Every image gets the codes of every class's concepts. AUROC takes the activation summed over positions, the pointing
    game and the intersection over union the activation maps on images that show the attribute.

    Parameters
    ----------
    model, cut, codec
        As of ``passes.explain``.
    concepts
        How many the bank holds.
    stream
        Images that the truth knows.
    truth
        Their attributes and masks.

    Returns
    -------
    dict or None
        Means over attributes, and a record for each; None where no attribute can be matched, or where the model's
        view is not the whole image, so that masks do not fit it.
    """
    if model.spec.preprocessing.resize is not None:
        return None
    keys: list[str] = []
    coded: list[list[Codes]] = []
    for batch in stream:
        keys += batch.keys
        coded.append(_all_codes(model, cut, codec, batch.views))
    if not keys:
        return None
    present = truth.present[[truth.rows[key] for key in keys]]
    if not bool((present.any(0) & ~present.all(0)).any()):
        return None
    matching = localisation.match(torch.cat([_totals(codes, concepts) for codes in coded]), present)
    records = {}
    for concept, attribute, auroc in zip(*(part.tolist() for part in matching), strict=True):
        rows = present[:, attribute].nonzero().squeeze(1).tolist()
        masks = truth.masks([keys[row] for row in rows], attribute)
        visible = masks.any(2).any(1)
        masks = masks[visible]
        maps = torch.cat([_maps(codes, concept) for codes in coded])[rows, cut.layout.tokens :]
        heatmaps = localisation.enlarge(maps.unflatten(1, cut.layout.grid)[visible], (masks.shape[1], masks.shape[2]))
        records[truth.attributes[attribute]] = {
            "concept": concept,
            "auroc": auroc,
            "pointing_game": float(localisation.pointing_game(heatmaps, masks).double().mean()),
            "iou": localisation.best_iou(heatmaps, masks),
        }
    means = {name: sum(r[name] for r in records.values()) / len(records) for name in ("auroc", "pointing_game", "iou")}
    return {"images": len(keys), **means, "attributes": records}


def localise_held_out(
    task: Task[TrainingConfig], codec: Codec, concepts: int, keys: Sequence[str], most: int
) -> dict[str, Any] | None:
    """Measure on the held-out images that come first in ``keys`` and whose truth is known; see ``localise``."""
    truth = read_truth(task.held_out.root)
    if truth is None:
        return None
    probes = [key for key in keys if key in truth.rows][:most]
    stream = task.stream(task.held_out, probes)
    return localise(task.model, task.cut, codec, concepts, stream, truth)


def _all_codes(model: Model, cut: Cut, codec: Codec, views: NDArray[np.uint8]) -> list[Codes]:
    """Return the codes of a batch for each class that has concepts, or for none in particular."""
    with torch.no_grad():
        positions = cut.positions(cut.trunk(model.inputs(views)))
        return [
            codec.encode(positions, torch.full((len(views),), target, device=model.device)).to("cpu")
            for target in sorted(codec.classes() or {0})
        ]


def _totals(codes: Sequence[Codes], concepts: int) -> Tensor:
    """Return the activation of all concepts of the bank, summed over positions, ``[B, K]``."""
    totals = torch.zeros(len(codes[0].ids), concepts + 1)
    for one in codes:
        totals.scatter_(1, one.ids.masked_fill(one.ids == EMPTY, concepts), one.total())
    return totals[:, :concepts]


def _maps(codes: Sequence[Codes], concept: int) -> Tensor:
    """Return the activation map of one concept, ``[B, P]``; zero where it is silent."""
    for one in codes:
        rows, slots = (one.ids == concept).nonzero(as_tuple=True)
        if len(rows):
            found = one.maps(rows, slots)
            return found.new_zeros(len(one.ids), found.shape[1]).index_copy_(0, rows, found)
    return torch.zeros(len(codes[0].ids), codes[0].values.shape[1])
