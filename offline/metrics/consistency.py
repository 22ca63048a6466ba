"""Whether a concept sees the same thing wherever it is active, as an independent encoder judges (FaCT, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps ``[N, h, w]`` on another grid, bilinearly; every cell counts where that is coarser, too."""
    if maps.shape[1:] == size:
        return maps
    return functional.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", antialias=True).squeeze(1)


def on_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return what maps of a coarser grid meet of features, so that neither need be resized for every map.

    ``Σ_cell m(cell) F'(cell) = Σ_pos m'(pos) F(pos)``, where m' is the map m, resized to the features' grid.

    Parameters
    ----------
    features
        ``[N, D, h', w']``.
    grid
        Rows and columns of the maps, h and w.

    Returns
    -------
    float32 ``[N, D + 1, h·w]``; the last feature is one everywhere in F.
    """
    cells = torch.eye(grid[0] * grid[1]).view(-1, *grid)
    spread = resized(cells, (features.shape[2], features.shape[3])).flatten(1)
    ones = features.new_ones(len(features), 1, *features.shape[2:])
    return torch.cat([features, ones], dim=1).flatten(2) @ spread.T


def regions(maps: Tensor, features: Tensor, mean: Tensor) -> Tensor:
    """Return what an encoder sees where concepts are active, less what it sees on average.

    ``f = Σ_pos m'(pos) F(pos) / Σ_pos m'(pos) − mean``.

    Parameters
    ----------
    maps
        Activation of a concept in each image, ≥ 0, float32 ``[N, h, w]``.
    features
        Of the same images, from ``on_grid``.
    mean
        Of the features over images and positions, ``[D]``.

    Returns
    -------
    float32 ``[N, D]``; zero where a map is zero everywhere.
    """
    summed = (features @ maps.flatten(1).unsqueeze(2)).squeeze(2)
    total = summed[:, -1:]
    return torch.where(total > 0, summed[:, :-1] / total.clamp_min(1e-12) - mean, 0.0)


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
