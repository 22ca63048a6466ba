"""What a kind of bank must offer to the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """A number for every image, position and concept slot: codes, or contributions of them.

    A slot is a place in the row of one image; ``ids`` says which concept it holds, so that images of one batch may use
    different parts of a bank.
    """

    values: Tensor
    """``[B, P, S]``."""
    ids: Tensor
    """int64 ``[B, S]``: the concept of each slot; −1 where the slot is empty."""
    tolerance: Tensor | None = None
    """``[B]``: largest violation of the codes' optimality conditions, where they have some."""

    def total(self) -> Tensor:
        """Sum over positions, ``[B, S]``."""
        return self.values.sum(1)

    def peak(self) -> Tensor:
        """Largest over positions, ``[B, S]``."""
        return self.values.amax(1)

    def maps(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Values at every position of chosen (row, slot) pairs: two int64 ``[M]`` to ``[M, P]``."""
        return self.values[rows, :, slots]

    def with_values(self, values: Tensor) -> Codes:
        """Return the same slots with other numbers."""
        return replace(self, values=values)


class Codec(Protocol):
    """Codes and components of one bank (methods section 0)."""

    reconstructs: bool
    """Whether the components add up to a reconstruction of the activation."""
    per_class: bool
    """Whether the codes depend on the target class."""
    needs_non_negative: bool
    """Whether only non-negative activations have codes."""

    def to(self, device: torch.device) -> Codec:
        """Return the codec with its tensors on a device."""
        ...

    def classes(self) -> frozenset[int] | None:
        """Return the classes that have concepts; None where concepts belong to no class."""
        ...

    def encode(self, positions: Tensor, targets: Tensor) -> Codes:
        """Return the codes of activations ``[B, P, C]`` for target classes int64 ``[B]``."""
        ...

    def combine(self, codes: Codes, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum of components, ``[B, P, C]``; weights ``[B, S]``, one where omitted.

        All ones is the reconstruction; a single one is the component of that concept.
        """
        ...

    def contributions(self, codes: Codes, gradient: Tensor) -> Codes:
        """Return ``⟨G, comp_k⟩`` at every position for gradients ``[B, P, C]``."""
        ...
