"""How few concepts an explanation needs, and how evenly a bank uses them."""

from __future__ import annotations

import torch
from torch import Tensor

ALWAYS_ON = 0.85
"""A concept active on a larger share of images says little about any of them (methods section 6)."""


def gini(importance: Tensor) -> float:
    """Return the Gini index of importances: 0 where all are equal, ``1 − 1/K`` where one has everything.

    ``Σ_k (2k − K − 1) x_(k) / (K Σ x)`` with x ascending (Hurley & Rickard 2009, Table I; C-Gini of FACE).

    Parameters
    ----------
    importance
        ≥ 0, ``[K]``.
    """
    x = importance.double().sort().values
    k = torch.arange(1, len(x) + 1, dtype=torch.float64, device=x.device)
    total = x.sum()
    return float(((2 * k - len(x) - 1) * x).sum() / (len(x) * total)) if total > 0 else 0.0


def density(active_positions: Tensor, positions: int) -> float:
    """Return the share of non-zero codes over images, positions and concepts.

    Parameters
    ----------
    active_positions
        At how many positions each concept is active, ``[N, K]``.
    positions
        P.
    """
    return float(active_positions.double().mean() / positions)


def l0_per_position(active_positions: Tensor, positions: int) -> float:
    """Return the mean number of active concepts at a position, ``mean_{n,p} ‖z_np‖₀`` (FaCT); see ``density``."""
    return float(active_positions.double().sum(1).mean() / positions)


def l0_per_image(active_positions: Tensor) -> float:
    """Return the mean number of concepts active somewhere in an image; ``active_positions [N, K]``."""
    return float((active_positions > 0).double().sum(1).mean())


def concepts_for_share(contributions: Tensor, share: float = 0.8) -> Tensor:
    """Return how many concepts make up a share of each image's positive contribution (FaCT, section 5).

    Parameters
    ----------
    contributions
        ``[N, K]``.
    share
        Of ``Σ_k max(c_k, 0)``.

    Returns
    -------
    int64 ``[N]``; 0 for images without positive contribution.
    """
    positive = contributions.double().clamp_min(0).sort(dim=1, descending=True).values
    reached = positive.cumsum(1)
    goal = share * reached[:, -1:]
    # The slack keeps rounding from asking for one concept more than needed.
    needed = (reached < goal * (1 - 1e-12)).sum(1) + 1
    return torch.where(reached[:, -1] > 0, needed, 0)


def active_share(active_positions: Tensor) -> Tensor:
    """Return on which share of images each concept is active, ``[N, K]`` to float64 ``[K]``."""
    return (active_positions > 0).double().mean(0)


def alive_share(active_positions: Tensor) -> float:
    """Return the share of concepts that are active on any image; ``active_positions [N, K]``."""
    return float((active_share(active_positions) > 0).double().mean())


def always_on_share(active_positions: Tensor) -> float:
    """Return the share of concepts active on more than 85 % of images; ``active_positions [N, K]``."""
    return float((active_share(active_positions) > ALWAYS_ON).double().mean())
