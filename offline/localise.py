"""Measuring concepts against the known attributes of a probe set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from concepts.codec import Codec
from concepts.cut import Cut
from concepts.model import Model
from offline.images import Stream
from offline.metrics import localisation
from offline.truth import Truth


def localise(model: Model, cut: Cut, codec: Codec, stream: Stream, truth: Truth) -> dict[str, Any] | None:
    """Match concepts to attributes and measure where they look.

    Every image gets the codes of every class's concepts. AUROC takes the activation summed over positions, the pointing
    game and the intersection over union the activation maps on images that show the attribute.

    Parameters
    ----------
    model, cut, codec
        As of ``passes.explain``.
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
    maps: list[Tensor] = []
    for batch in stream:
        keys += batch.keys
        maps.append(_all_maps(model, cut, codec, batch.views))
    if not keys:
        return None
    all_maps = torch.cat(maps)
    present = truth.present[[truth.rows[key] for key in keys]]
    if not bool((present.any(0) & ~present.all(0)).any()):
        return None
    matching = localisation.match(all_maps.sum((2, 3)), present)
    records = {}
    for concept, attribute, auroc in zip(*(part.tolist() for part in matching), strict=True):
        rows = present[:, attribute].nonzero().squeeze(1).tolist()
        masks = truth.masks([keys[row] for row in rows], attribute)
        visible = masks.any(2).any(1)
        masks = masks[visible]
        heatmaps = localisation.enlarge(all_maps[rows, concept][visible], (masks.shape[1], masks.shape[2]))
        records[truth.attributes[attribute]] = {
            "concept": concept,
            "auroc": auroc,
            "pointing_game": float(localisation.pointing_game(heatmaps, masks).double().mean()),
            "iou": localisation.best_iou(heatmaps, masks),
        }
    means = {name: sum(r[name] for r in records.values()) / len(records) for name in ("auroc", "pointing_game", "iou")}
    return {"images": len(keys), **means, "attributes": records}


def _all_maps(model: Model, cut: Cut, codec: Codec, views: Any) -> Tensor:
    """Return activation maps of all concepts of the bank, float32 ``[B, K, h, w]``."""
    with torch.no_grad():
        positions = cut.positions(cut.trunk(model.inputs(views)))
        classes = codec.classes() or {0}
        found: dict[int, Tensor] = {}
        for target in sorted(classes):
            codes = codec.encode(positions, torch.full((len(views),), target, device=model.device))
            grids = codes.values[:, cut.layout.tokens :].mT.unflatten(2, cut.layout.grid).float().cpu()
            found |= {concept: grids[:, slot] for slot, concept in enumerate(codes.ids[0].tolist()) if concept >= 0}
    return torch.stack([found[concept] for concept in sorted(found)], dim=1)
