"""How well a bank's reconstruction ``â`` stands for the activation ``a``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReconstructionError:
    """Sums over activation vectors that arrive in batches; all arithmetic in float64."""

    vectors: int = 0
    squared_error: Tensor | float = 0.0
    squared_norm: Tensor | float = 0.0
    total: Tensor | float = 0.0
    """Σ a, ``[C]``."""
    squared_total: Tensor | float = 0.0
    """Σ a², ``[C]``."""
    channels: int = 0

    def add(self, a: Tensor, reconstruction: Tensor) -> None:
        """Take in vectors ``[…, C]`` and their reconstructions."""
        a, reconstruction = a.reshape(-1, a.shape[-1]).double(), reconstruction.reshape(-1, a.shape[-1]).double()
        self.vectors += len(a)
        self.channels = a.shape[1]
        self.squared_error += (a - reconstruction).square().sum()
        self.squared_norm += a.square().sum()
        self.total += a.sum(0)
        self.squared_total += a.square().sum(0)

    def relative_error(self) -> float:
        """Return ``‖A − Â‖ / ‖A‖`` in the Frobenius norm."""
        return float((torch.as_tensor(self.squared_error) / torch.as_tensor(self.squared_norm)).sqrt())

    def mse(self) -> float:
        """Return ``‖A − Â‖² / (N·C)``: the mean over vectors and channels (FACE, Table 1)."""
        return float(self.squared_error) / (self.vectors * self.channels)

    def variance_explained(self) -> float:
        """Return ``R² = 1 − ‖A − Â‖² / Σ_n ‖a_n − ā‖²`` with the mean ``ā`` taken per dimension.

        A scalar mean would inflate it: differences between channels would count as variance explained (Xplique).
        """
        spread = torch.as_tensor(self.squared_total - torch.as_tensor(self.total).square() / self.vectors).sum()
        return float(1.0 - torch.as_tensor(self.squared_error) / spread)
