"""Products with codes that are almost all zero.

Codes ``Z [n, K]`` are given by M pairs (vector, latent) and a value for each. The three products of an autoencoder's
step touch only these: ``Z D``, ``⟨e_i, d_j⟩`` at the pairs, and ``Zᵀ E``. Each is a bag of rows added up in one fixed
order, so that results are the same bits in every run, on GPUs too.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_LONGEST_SUM = 512
"""Rows that a GPU adds up in one go. A latent that fires on every vector would keep one thread busy long after all
others are done; longer sums are split and their parts added up."""
_DENSE_FROM = {("cpu", torch.bfloat16): 1 / 24, ("cuda", torch.bfloat16): 1 / 128}
"""Share of pairs from which a dense product takes less time than its sparse counterpart, by device and type."""
_DENSE_FROM_ELSE = 1 / 12


def make_pairs(rows: Tensor, latents: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Pairs:
    """Return pairs whose products are sparse or dense, whichever is less work.

    Parameters
    ----------
    rows
        int64 ``[M]``, ascending: the vector of each pair.
    latents
        int64 ``[M]``: its latent. No pair may occur twice.
    shape
        Number of vectors and of latents, ``(n, K)``.
    dtype
        Of dense products; sparse ones are computed in the type of what they are given.
    """
    n, width = shape
    from_share = _DENSE_FROM.get((rows.device.type, dtype), _DENSE_FROM_ELSE)
    if len(rows) > from_share * n * width:
        return DensePairs(rows, latents, shape, dtype)
    return Pairs(rows, latents, shape)


class Pairs:
    """M pairs of n vectors and K latents; parameters as of ``make_pairs``."""

    def __init__(self, rows: Tensor, latents: Tensor, shape: tuple[int, int]) -> None:
        self.rows = rows
        self.latents = latents
        self.shape = shape

    def decode(self, values: Tensor, table: Tensor) -> Tensor:
        """Return ``Z D [n, C]`` for values ``[M]`` and a table ``D [K, C]``."""
        return embedding_bag(self.latents, table, self._starts, mode="sum", per_sample_weights=values)

    def dots(self, left: Tensor, table: Tensor) -> Tensor:
        """Return ``⟨e_i, d_j⟩ [M]`` at every pair, for ``E [n, C]`` and ``D [K, C]``."""
        # The gradient of a bag's sum with respect to its weights is this product; torch has no public name for it.
        products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            left, table, self.latents, self._starts, self.rows, 0
        )
        return products

    def accumulate(self, values: Tensor, left: Tensor) -> Tensor:
        """Return ``Zᵀ E [K, C]`` for values ``[M]`` and ``E [n, C]``."""
        order, starts = self._by_latent
        longest = _LONGEST_SUM if values.is_cuda else None
        return sum_bags(self.rows[order], left, starts, values[order], longest)

    def totals(self, values: Tensor) -> Tensor:
        """Return the sum of the values of each latent, ``[K]``."""
        ones = torch.ones(self.shape[0], 1, dtype=values.dtype, device=values.device)
        order, starts = self._by_latent
        return sum_bags(self.rows[order], ones, starts, values[order], _LONGEST_SUM).squeeze(1)

    @cached_property
    def _starts(self) -> Tensor:
        """Where each vector's pairs begin, ``[n]``."""
        return torch.searchsorted(self.rows, torch.arange(self.shape[0], device=self.rows.device))

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor]:
        """The order of pairs by latent, ``[M]``, and where each latent's begin in it, ``[K]``."""
        latents, order = self.latents.sort(stable=True)
        return order, torch.searchsorted(latents, torch.arange(self.shape[1], device=latents.device))


class DensePairs(Pairs):
    """The same by dense products in a given type, of codes with the zeros written out."""

    def __init__(self, rows: Tensor, latents: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(rows, latents, shape)
        self._dtype = dtype
        self._places = rows * shape[1] + latents

    def decode(self, values: Tensor, table: Tensor) -> Tensor:
        """See ``Pairs.decode``."""
        return (self._matrix(values) @ table.to(self._dtype)).to(table.dtype)

    def dots(self, left: Tensor, table: Tensor) -> Tensor:
        """See ``Pairs.dots``."""
        products = left.to(self._dtype) @ table.to(self._dtype).T
        return products.flatten()[self._places].to(left.dtype)

    def accumulate(self, values: Tensor, left: Tensor) -> Tensor:
        """See ``Pairs.accumulate``."""
        return (self._matrix(values).T @ left.to(self._dtype)).to(left.dtype)

    def _matrix(self, values: Tensor) -> Tensor:
        n, width = self.shape
        matrix = torch.zeros(n * width, dtype=self._dtype, device=values.device)
        return matrix.scatter_(0, self._places, values.to(self._dtype)).view(n, width)


def sum_bags(members: Tensor, table: Tensor, starts: Tensor, weights: Tensor, longest: int | None = None) -> Tensor:
    """Return the weighted sum of each bag of table rows, ``[bags, C]``.

    Parameters
    ----------
    members
        int64 ``[M]``: rows of the table, bag after bag.
    table
        ``[n, C]``.
    starts
        int64 ``[bags]``, ascending: where each bag begins in ``members``.
    weights
        ``[M]``.
    longest
        Split the sums of bags so that none adds up more members than this; None leaves them whole.
    """
    if longest is None or len(members) <= longest:
        return embedding_bag(members, table, starts, mode="sum", per_sample_weights=weights)
    # Cut at the bags' starts and at every multiple. A start goes before a multiple at the same place, so that what
    # follows a bag's start, up to the next bag's, is the bag.
    multiples = torch.arange(0, len(members), longest, device=members.device)
    cuts, order = torch.cat([starts, multiples]).sort(stable=True)
    parts = embedding_bag(members, table, cuts, mode="sum", per_sample_weights=weights)
    positions = torch.arange(len(cuts), device=members.device)
    rank = torch.empty_like(order).scatter_(0, order, positions)
    return embedding_bag(positions, parts, rank[: len(starts)], mode="sum")
