"""Whether concepts are where the truth is, on images whose attributes and masks are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional


class Matching(NamedTuple):
    """One concept for each attribute, none twice."""

    concepts: Tensor
    """int64 ``[M]``."""
    attributes: Tensor
    """int64 ``[M]``."""
    auroc: Tensor
    """float64 ``[M]``."""


def auroc(scores: Tensor, present: Tensor) -> Tensor:
    """Return the area under the ROC curve of each concept as a detector of each attribute.

    ``P(s⁺ > s⁻) + ½ P(s⁺ = s⁻)``, from ranks (Mann & Whitney 1947).

    Parameters
    ----------
    scores
        Activation of each concept on each image, ``[N, K]``.
    present
        Whether each attribute is there, bool ``[N, A]``.

    Returns
    -------
    float64 ``[K, A]``; NaN for attributes that are always or never there.
    """
    ranks = torch.from_numpy(rankdata(scores.double().cpu().numpy(), axis=0))
    truth = present.cpu().double()
    positives, negatives = truth.sum(0), (1 - truth).sum(0)
    return (ranks.T @ truth - positives * (positives + 1) / 2) / (positives * negatives)


def match(scores: Tensor, present: Tensor) -> Matching:
    """Match concepts to attributes one to one, for the largest sum of AUROC (Hungarian method).

    Attributes that are always or never there are left out. See ``auroc``.
    """
    table = auroc(scores, present)
    known = (~table.isnan().any(0)).nonzero().squeeze(1)
    rows, columns = linear_sum_assignment(-table[:, known].numpy())
    order = np.argsort(columns)
    concepts, attributes = torch.from_numpy(rows[order]), known[torch.from_numpy(columns[order])]
    return Matching(concepts, attributes, table[concepts, attributes])


def pointing_game(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Return whether the largest value of each heatmap lies in the mask (Zhang et al. 2016).

    Parameters
    ----------
    heatmaps
        ``[N, H, W]``, at the masks' size.
    masks
        bool ``[N, H, W]``.

    Returns
    -------
    bool ``[N]``.
    """
    best = heatmaps.flatten(1).argmax(1, keepdim=True)
    return masks.flatten(1).gather(1, best).squeeze(1)


def best_iou(heatmaps: Tensor, masks: Tensor, thresholds: int = 50) -> float:
    """Return the mean intersection over union of thresholded heatmaps and masks, at the concept's best threshold.

    One threshold serves all images, as in network dissection (Bau et al. 2017); it is sought among evenly spaced
    quantiles of the positive values.

    Parameters
    ----------
    heatmaps
        Of one concept, ``[N, H, W]``, at the masks' size.
    masks
        bool ``[N, H, W]``, none empty.
    thresholds
        How many to try.
    """
    positive = heatmaps[heatmaps > 0]
    if not len(positive):
        return 0.0
    steps = (positive.numel() * torch.arange(thresholds) // thresholds).to(positive.device)
    levels = positive.sort().values[steps].unique()
    best = 0.0
    for level in levels:
        inside = heatmaps >= level
        iou = (inside & masks).sum((1, 2)) / (inside | masks).sum((1, 2))
        best = max(best, float(iou.double().mean()))
    return best


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps ``[N, h, w]`` bilinearly to ``[N, H, W]``, as explanations do."""
    return functional.interpolate(maps.unsqueeze(1).float(), size=size, mode="bilinear", align_corners=False).squeeze(1)
