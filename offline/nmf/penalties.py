"""What can be charged for a factorisation beside its error, at whatever scale its factors are.

``UW`` leaves the scale of a component open: ``u_k`` may be doubled where ``w_k`` is halved. A penalty therefore
measures one of the two while the other has unit length. It says the same of every scale, so that making the rows of W
unit vectors in the end changes nothing, and a penalty on one factor alone cannot be evaded through the other:

    Σ_k  λ_U ‖u_k‖₁ ‖w_k‖₂  +  λ_W ‖u_k‖₂ ‖w_k‖₁  +  ½ λ₂ ‖u_k‖₂² ‖w_k‖₂²

The ridge on U and that on W, each at the unit length of the other, are one and the same. With all but one component
fixed, each of the two factors has its minimiser in closed form: soft thresholding, and shrinking as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalties:
    """Weights of the penalties, pure numbers: a matrix that is scaled keeps its dictionary."""

    codes_l1: float = 0.0
    """Makes codes sparse. In root mean squared lengths of A's rows (those of zeros do not count): by so much each code
    is lowered."""
    dictionary_l1: float = 0.0
    """Makes concepts sparse in channels. In root mean squared lengths of A's columns."""
    l2: float = 0.0
    """Makes components small, 1 as much as the error does."""

    def weigh(self, rows: Tensor) -> Weights:
        """Return the weights for matrices ``[B, N, C]``."""
        if not self.codes_l1 and not self.dictionary_l1:
            return Weights(None, None, self.l2)
        counted = rows.any(2).sum(1)[:, None, None].clamp_min(1)
        return self.weights(rows.norm(dim=(1, 2))[:, None, None], counted, rows.shape[2])

    def weights(self, length: Tensor, counted: Tensor, channels: int) -> Weights:
        """Return the weights, given ``‖A‖`` and how many rows are not zero."""
        return Weights(
            self.codes_l1 * length / counted.sqrt() if self.codes_l1 else None,
            self.dictionary_l1 * length / channels**0.5 if self.dictionary_l1 else None,
            self.l2,
        )


class Charge(NamedTuple):
    """What the components of one factor are charged while the other is fixed."""

    lasso: Tensor | None
    """For each component's sum, ``[B, K, 1]``."""
    group: Tensor | None
    """For its length."""
    ridge: float
    """For half its squared length, times that of the other factor."""

    def total(self, sums: Tensor, lengths: Tensor, squares: Tensor) -> Tensor:
        """Return what each component costs, given its sum and length, and the other factor's squared length."""
        total = 0.5 * self.ridge * squares * lengths.square()
        if self.lasso is not None:
            total = total + self.lasso * sums
        return total if self.group is None else total + self.group * lengths


class Weights(NamedTuple):
    """``λ_U``, ``λ_W`` (``[B, 1, 1]``; None for zero) and ``λ₂``."""

    codes: Tensor | None
    dictionary: Tensor | None
    l2: float

    def of_codes(self, W: Tensor) -> Charge:
        """Return what U is charged, given ``W [B, K, C]``."""
        return Charge(_times(self.codes, W, 2), _times(self.dictionary, W, 1), self.l2)

    def of_dictionary(self, U: Tensor) -> Charge:
        """Return what W is charged, given Uᵀ, ``[B, K, N]``."""
        return Charge(_times(self.dictionary, U, 2), _times(self.codes, U, 1), self.l2)

    def of_sums(self, sums: Tensor, lengths: Tensor) -> Charge:
        """Return what W is charged, given the sums and the lengths of U's columns, ``[B, K, 1]``."""
        return Charge(
            None if self.dictionary is None else self.dictionary * lengths,
            None if self.codes is None else self.codes * sums,
            self.l2,
        )

    def total(self, U: Tensor, W: Tensor) -> Tensor | float:
        """Return the penalties of Uᵀ and W, ``[B, 1, 1]``."""
        if self.codes is None and self.dictionary is None and not self.l2:
            return 0.0
        lengths = U.norm(dim=2, keepdim=True)
        squares = W.square().sum(2, keepdim=True)
        return self.of_codes(W).total(U.sum(2, keepdim=True), lengths, squares).sum(1, keepdim=True)

    def select(self, which: Tensor) -> Weights:
        """Return those of chosen problems."""
        return Weights(
            None if self.codes is None else self.codes[which],
            None if self.dictionary is None else self.dictionary[which],
            self.l2,
        )


def gradient(factor: Tensor, target: Tensor, gram: Tensor, charge: Charge) -> Tensor:
    """Return the objective's gradient for a factor ``[B, K, M]``, without parts that push against the bounds.

    Where a component is zero, the subgradient that is nearest to zero.
    """
    slope = gram @ factor - target
    if charge.ridge:
        slope = slope + charge.ridge * diagonal(gram) * factor
    if charge.lasso is not None:
        slope = slope + charge.lasso
    length = factor.norm(dim=2, keepdim=True)
    if charge.group is not None:
        slope = slope + torch.where(length > 0, charge.group * factor / length, 0.0)
    slope = torch.where(factor > 0, slope, slope.clamp_max(0))
    if charge.group is not None:
        slope = torch.where(length > 0, slope, shrunk(slope, charge.group))
    return slope


def shrunk(rows: Tensor, by: Tensor) -> Tensor:
    """Return rows made shorter by so much, ``[B, K, 1]``; zero where they are not that long."""
    length = rows.norm(dim=2, keepdim=True)
    return rows * torch.where(length > by, 1 - by / length, 0.0)


def diagonal(gram: Tensor) -> Tensor:
    """Return the diagonals of ``[B, K, K]`` as ``[B, K, 1]``."""
    return gram.diagonal(dim1=1, dim2=2).unsqueeze(2)


def _times(weight: Tensor | None, factor: Tensor, order: int) -> Tensor | None:
    return None if weight is None else weight * factor.norm(p=order, dim=2, keepdim=True)
