"""Hyperplanes between all pairs of classes, from one direction a class.

The vectors of a class are the positions that speak for it; *neutral* ones speak for no class. With ``m_c = μ_c − μ_0``
the mean of a class from the neutral mean and Σ the covariance that classes and neutral share, the plane between i and j
is ``n·(a − μ_0) = 0`` with the normal of least variance that sees the classes alike::

    n_ij = argmin nᵀΣn   such that   n·m_i = 1,   n·m_j = −1
         = α_ij Σ⁻¹m_i + β_ij Σ⁻¹m_j

It is a linear discriminant of two classes through the neutral mean. What both classes share does not cancel where α and
−β differ: positions that are neutral in images of the two, but unlike the mean of all neutral ones, may lie off it.
α and β follow from the products ``K = m Σ⁻¹ mᵀ`` of the two classes alone; so n classes need n directions and not n²
planes, and turning a pair round negates normal and offset to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from concepts.errors import CorruptData

PARALLEL = 1e-6
"""Classes whose means differ in direction by less (1 − cos² under Σ⁻¹) have no plane between them."""


class Weights(NamedTuple):
    """Every pair's normal, before it is made a unit vector: ``α_ij W_i + β_ij W_j``; float64 ``[n, n]`` all."""

    alpha: Tensor
    beta: Tensor
    norm: Tensor
    """Of the normal; it is 1 where there is no plane."""
    exists: Tensor
    """bool: whether there is a plane."""


class Planes:
    """The hyperplanes between n classes in C dimensions.

    Parameters
    ----------
    directions
        ``W = Σ⁻¹(μ_c − μ_0)``, float ``[n, C]``.
    products
        ``K_ij = (μ_i − μ_0)·W_j``, float ``[n, n]``, symmetric.
    centre
        μ_0, float ``[C]``.
    known
        Which classes there are data of, bool ``[n]``.

    Raises
    ------
    CorruptData
        If the shapes do not match or a value is not finite.
    """

    def __init__(self, directions: Tensor, products: Tensor, centre: Tensor, known: Tensor) -> None:
        classes, channels = directions.shape if directions.ndim == 2 else (0, 0)
        shapes = (tuple(products.shape), tuple(centre.shape), tuple(known.shape))
        if not directions.numel() or shapes != ((classes, classes), (channels,), (classes,)):
            raise CorruptData(f"directions {list(directions.shape)} do not go with {', '.join(map(str, shapes))}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (directions, products, centre)):
            raise CorruptData("the planes of a contrast bank must be finite")
        self.directions, self.products, self.centre, self.known = directions, products, centre, known.bool()
        self.weights = self._weights()

    def to(self, device: torch.device | str) -> Planes:
        """Return the planes on a device."""
        return Planes(*(tensor.to(device) for tensor in (self.directions, self.products, self.centre, self.known)))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in (self.directions, self.products, self.centre, *self.weights))

    def _weights(self) -> Weights:
        k, w = self.products.double(), self.directions.double()
        own = k.diagonal()
        determinant = own.unsqueeze(1) * own.unsqueeze(0) - k.square()
        pair = self.known.unsqueeze(1) & self.known.unsqueeze(0)
        exists = pair & (determinant > PARALLEL * own.unsqueeze(1) * own.unsqueeze(0))
        exists &= ~torch.eye(len(own), dtype=torch.bool, device=k.device)
        safe = determinant.masked_fill(~exists, 1.0)
        alpha = ((own.unsqueeze(0) + k) / safe).masked_fill(~exists, 0.0)
        beta = -alpha.T  # of (i, j): −(K_ii + K_ij) / determinant
        gram = w @ w.T
        length = gram.diagonal()
        square = alpha.square() * length.unsqueeze(1) + beta.square() * length.unsqueeze(0) + 2 * alpha * beta * gram
        norm = square.clamp_min(0).sqrt()
        exists &= norm > 0
        return Weights(alpha, beta, norm.masked_fill(~exists, 1.0), exists)

    def between(self, targets: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the planes of some pairs, each of which must exist: unit normals towards the target, and offsets.

        Parameters
        ----------
        targets, others
            Classes i and j, int64 ``[B]``.

        Returns
        -------
        normals : float32 ``[B, C]``
        offsets : float32 ``[B]``
            ``normal·a + offset`` is the signed distance of a, positive on the target's side.
        """
        # Each in the order of its classes, and then turned: so that turning is exact.
        first, second = torch.minimum(targets, others), torch.maximum(targets, others)
        alpha, beta = self.weights.alpha[first, second], self.weights.beta[first, second]
        w = self.directions.double()
        normals = alpha.unsqueeze(1) * w[first] + beta.unsqueeze(1) * w[second]
        normals /= torch.linalg.vector_norm(normals, dim=1, keepdim=True)
        offsets = -(normals @ self.centre.double())
        sign = torch.where(first == targets, 1.0, -1.0).to(normals)
        return (sign.unsqueeze(1) * normals).float(), (sign * offsets).float()

    def projected(self, vectors: Tensor) -> Tensor:
        """Return ``(a − μ_0)·W_c``, float64 ``[N, n]``, of vectors ``[N, C]``: what all distances are made of."""
        return (vectors.double() - self.centre.double()) @ self.directions.double().T

    def distances(self, projected: Tensor, target: int) -> Tensor:
        """Return signed distances to the planes between a class and each other, float64 ``[N, n]``, from projections.

        Where there is no plane they are zero.
        """
        alpha, beta, norm = (each[target] for each in self.weights[:3])
        return (projected[:, target : target + 1] * alpha + projected * beta) / norm
