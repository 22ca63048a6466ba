"""Whether a concept sees the same thing wherever it is active, as an independent encoder judges (FaCT, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def regions(maps: Tensor, features: Tensor, mean: Tensor) -> Tensor:
    """Return what an encoder sees where concepts are active, less what it sees on average.

    ``f = Σ_pos m(pos) F(pos) / Σ_pos m(pos) − mean``, with the map resized bilinearly to the encoder's grid; every cell
    counts where that is coarser, too.

    Parameters
    ----------
    maps
        Activation of a concept in each image, ≥ 0, ``[N, h, w]``.
    features
        Of the same images, ``[N, D, h', w']``.
    mean
        Of the features over images and positions, ``[D]``.

    Returns
    -------
    float32 ``[N, D]``; zero where a map is zero everywhere.
    """
    size = (features.shape[2], features.shape[3])
    weights = functional.interpolate(maps.unsqueeze(1).float(), size=size, mode="bilinear", antialias=True)
    total = weights.sum((2, 3))
    pooled = (features * weights).sum((2, 3)) / total.clamp_min(1e-12)
    return torch.where(total > 0, pooled - mean, 0.0)


def consistency(seen: Tensor, activations: Tensor) -> float:
    """Return the mean cosine of pairs of regions, each pair weighted by the product of its activations.

    ``Σ_{i<j} a_i a_j cos(f_i, f_j) / Σ_{i<j} a_i a_j`` (the C²-score of FaCT, before its baseline is taken off).

    Parameters
    ----------
    seen
        From ``regions``, ``[N, D]``.
    activations
        Of the concept in each image, ≥ 0, ``[N]``.
    """
    unit = functional.normalize(seen.double(), dim=1)
    weights = torch.outer(activations.double(), activations.double()).triu(1)
    total = weights.sum()
    return float((weights * (unit @ unit.T)).sum() / total) if total > 0 else 0.0
