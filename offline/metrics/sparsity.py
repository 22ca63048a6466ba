"""How few concepts an explanation needs, and how evenly a bank uses them."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class Activity:
    """On how many images, and at how many of P positions, each of K concepts is active; grows batch by batch."""

    concepts: int
    positions: int
    images: int = 0
    active_images: Tensor = field(init=False)
    """``[K]``."""
    active_positions: Tensor = field(init=False)
    """Over all images, ``[K]``."""

    def __post_init__(self) -> None:
        self.active_images, self.active_positions = torch.zeros(2, self.concepts, dtype=torch.float64)

    def add(self, active: Tensor, ids: Tensor) -> None:
        """Take in at how many positions concepts are active, ``[R, S]``, and which these are; −1: none, ``[R, S]``."""
        used = ids >= 0
        self.images += len(ids)
        self.active_images.index_add_(0, ids[used], (active[used] > 0).double())
        self.active_positions.index_add_(0, ids[used], active[used].double())

    def share(self) -> Tensor:
        """Return on which share of images each concept is active, float64 ``[K]``."""
        return self.active_images / self.images

    def density(self) -> float:
        """Return the share of non-zero codes over images, positions and concepts."""
        return self.l0_per_position() / self.concepts

    def l0_per_position(self) -> float:
        """Return the mean number of active concepts at a position, ``mean_{n,p} ‖z_np‖₀`` (FaCT)."""
        return float(self.active_positions.sum()) / (self.images * self.positions)

    def l0_per_image(self) -> float:
        """Return the mean number of concepts active somewhere in an image."""
        return float(self.active_images.sum()) / self.images

    def alive_share(self) -> float:
        """Return the share of concepts that are active on any image."""
        return float((self.active_images > 0).double().mean())

    def dead_share(self) -> float:
        """Return the share of concepts that are active on no image."""
        return float((self.active_images == 0).double().mean())

    def always_on_share(self) -> float:
        """Return the share of concepts active on more than 85 % of images."""
        return float((self.share() > ALWAYS_ON).double().mean())


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
