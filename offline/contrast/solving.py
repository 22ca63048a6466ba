"""Planes between all pairs of classes, from sums over their vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from concepts.contrast.planes import Planes
from concepts.errors import NotTrainable
from offline.contrast.statistics import Statistics

_ROUNDING = 1e-12
"""Variance relative to the mean square of the vectors that is nothing but rounding."""


def solve(found: Statistics, fewest: int, shrinkage: float) -> Planes:
    """Return the planes between all classes that have enough images, on the CPU.

    Parameters
    ----------
    found
        From training images.
    fewest
        Images that a class needs.
    shrinkage
        λ of the covariance ``(1 − λ)Σ + λ tr(Σ)/C · I``.

    Raises
    ------
    NotTrainable
        If fewer than two classes have enough images, the covariance cannot be inverted, or no two classes differ.
    """
    known = found.images >= fewest
    if int(known.sum()) < 2:
        raise NotTrainable(
            f"{int(known.sum())} of {len(known)} classes have the {fewest} training images needed, and planes lie "
            "between two: add images that the model predicts as different classes, name more --classes, or lower "
            "--min-images"
        )
    means = found.sums / found.counts.clamp_min(1).unsqueeze(1)
    centre = _centre(found, means[known])
    m = (means - centre) * known.to(means).unsqueeze(1)
    directions = torch.cholesky_solve(m.T, _factor(_covariance(found, means), shrinkage)).T
    products = m @ directions.T
    planes = Planes(directions.float().cpu(), ((products + products.T) / 2).cpu(), centre.float().cpu(), known)
    if not bool(planes.weights.exists.any()):
        raise NotTrainable("at this layer the model tells no two classes apart: choose a later one")
    return planes


def _centre(found: Statistics, means: Tensor) -> Tensor:
    """Return what is neutral: the mean of the neutral vectors, where there are any."""
    if bool(found.neutral_count > 0):
        return found.neutral_sum / found.neutral_count
    # Two classes lie in line with their mean, which leaves no plane through it that sees them alike.
    return means.mean(0) if len(means) > 2 else torch.zeros_like(found.neutral_sum)


def _covariance(found: Statistics, means: Tensor) -> Tensor:
    """Return the covariance that classes and neutral vectors share, float64 ``[C, C]``."""
    total = found.counts.sum() + found.neutral_count
    neutral = found.neutral_sum / found.neutral_count.clamp_min(1)
    between = means.T @ found.sums + torch.outer(neutral, found.neutral_sum)
    covariance = (found.squares - between) / total
    if not float(covariance.trace()) > _ROUNDING * float(found.squares.trace() / total):
        raise NotTrainable(
            "at this layer the vectors of each class are all alike, so that nothing tells how far apart classes are: "
            "give more and different images, or choose another layer"
        )
    return (covariance + covariance.T) / 2


def _factor(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return the Cholesky factor of the covariance, shrunk."""
    channels = len(covariance)
    identity = torch.eye(channels, dtype=covariance.dtype, device=covariance.device)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / channels * identity
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    pivots = factor.diagonal().square()
    if bool(failed) or not float(pivots.min()) > _ROUNDING * float(pivots.max()):
        raise NotTrainable(
            f"the covariance of {channels} channels is singular, as it is where some are always zero or there are few "
            "vectors: raise --shrinkage"
        )
    return factor
