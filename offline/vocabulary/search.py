"""The largest products of queries with very many rows: exact, with memory that does not grow with them.

Products in float32 single out candidates: no row is left out that could be among the k largest by their rounding. The
candidates' products are taken anew in float64, each for itself, and these are ranked. So the result depends neither on
how many rows are compared at a time nor on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.errors import InvalidInput

BLOCK_CAPTIONS = 8192
"""How many rows are multiplied at a time: large enough for a fast product."""

_QUERIES = 1024
"""How many queries are."""

_DEPTH = 64
"""How many products share a maximum, which is looked at before they are."""

_PAIRS = 4096
"""How many products are taken anew at a time."""

_UNIT = 1e-3
"""How far norms may be from 1."""


class Nearest(NamedTuple):
    """Captions by cosine, largest first."""

    cosines: Tensor
    """float32 ``[Q, k]``."""
    captions: Tensor
    """Their indices, int64 ``[Q, k]``."""


def nearest(blocks: Iterable[NDArray[np.float16]], queries: Tensor, k: int, device: torch.device) -> Nearest:
    """Return the rows with the largest products; of equal ones the first.

    Parameters
    ----------
    blocks
        Rows of norm 1, ``[n, D]`` each, one block after another; at least ``k`` rows in all.
    queries
        Of norm 1, ``[Q, D]``.
    k
        How many for each query.
    device
        Where the float32 products are taken.

    Raises
    ------
    InvalidInput
        If a query is not of norm 1, or ``k`` is not positive.
    """
    if k < 1:
        raise InvalidInput(f"the {k} nearest captions cannot be asked for: give at least 1")
    wanted = queries.detach().cpu().double()
    if not bool(((wanted.norm(dim=1) - 1).abs() <= _UNIT).all()):
        raise InvalidInput("queries must be finite and of norm 1: give embeddings of the CLIP")
    best, first, exact = _Best(len(queries), k), 0, wanted.numpy()
    candidates = _Candidates(queries.detach().float().to(device), k)
    for block in blocks:
        rows = torch.from_numpy(block).to(device).float()
        for start in range(0, len(queries), _QUERIES):
            these = slice(start, start + _QUERIES)
            asked, found = candidates.of(rows, these, best.least[these])
            asked += start
            best.add(asked, first + found, _products(exact, block, asked, found))
        first += len(block)
    return Nearest(torch.from_numpy(best.cosines.astype(np.float32)), torch.from_numpy(best.captions))


class _Candidates:
    """Finds the rows of a block that can be among the k best."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self._queries, self._k = queries, k
        # Of D products, the sum in float32 is wrong by D · 2⁻²⁴ · ‖q‖‖c‖ at most, in whatever order; beside it, norms
        # that are not quite 1, and the rounding of the bound itself.
        self._error = 1.01 * (queries.shape[1] + 4) * 2.0**-24
        self._room = torch.empty(0, device=queries.device)

    def of(self, rows: Tensor, these: slice, least: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the pairs of some queries and of rows whose product may be at least ``least``, ``[B]``."""
        scores = self._scores(self._queries[these], rows)
        # Of columns that are G apart: their maximum reads memory in order.
        scores = scores.unflatten(1, (_DEPTH, -1))
        largest = scores.amax(1)
        bound = torch.from_numpy(least - self._error).to(largest)
        ranked = largest if largest.shape[1] >= self._k else scores.flatten(1)
        if ranked.shape[1] >= self._k:
            # k rows of this block reach this, but for two errors.
            bound = bound.maximum(ranked.topk(self._k).values[:, -1] - 2 * self._error)
        asked, group = (largest >= bound.unsqueeze(1)).nonzero(as_tuple=True)
        hit, depth = (scores[asked, :, group] >= bound[asked].unsqueeze(1)).nonzero(as_tuple=True)
        asked, found = asked[hit], depth * largest.shape[1] + group[hit]
        real = found < len(rows)
        return asked[real].cpu().numpy(), found[real].cpu().numpy()

    def _scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Return products ``[B, N]``; N is rounded up to a multiple of the depth, with −∞."""
        width = -(-len(rows) // _DEPTH) * _DEPTH
        if self._room.numel() < len(queries) * width:
            self._room = rows.new_empty(len(queries) * width)
        scores = self._room[: len(queries) * width].view(len(queries), width)
        torch.mm(queries, rows.T, out=scores[:, : len(rows)])
        scores[:, len(rows) :] = -torch.inf
        return scores


class _Best:
    """The k largest products of each query so far, in order."""

    def __init__(self, queries: int, k: int) -> None:
        self.cosines = np.full((queries, k), -np.inf)
        self.captions = np.full((queries, k), np.iinfo(np.int64).max)

    @property
    def least(self) -> NDArray[np.float64]:
        """The k-th of each; −∞ as long as there are fewer."""
        return self.cosines[:, -1]

    def add(self, queries: NDArray[np.int64], captions: NDArray[np.int64], cosines: NDArray[np.float64]) -> None:
        """Take in products."""
        k = self.cosines.shape[1]
        touched = np.unique(queries)
        queries = np.concatenate([np.repeat(touched, k), queries])
        captions = np.concatenate([self.captions[touched].ravel(), captions])
        cosines = np.concatenate([self.cosines[touched].ravel(), cosines])
        order = np.lexsort((captions, -cosines, queries))
        queries = queries[order]
        rank = np.arange(len(order)) - np.searchsorted(queries, queries)
        kept = rank < k
        self.captions[queries[kept], rank[kept]] = captions[order][kept]
        self.cosines[queries[kept], rank[kept]] = cosines[order][kept]


def _products(
    queries: NDArray[np.float64], rows: NDArray[np.float16], asked: NDArray[np.int64], found: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the products of pairs, each summed for itself: equal ones of equal rows."""
    products = np.empty(len(asked))
    for first in range(0, len(asked), _PAIRS):
        some = slice(first, first + _PAIRS)
        products[some] = (queries[asked[some]] * rows[found[some]]).sum(1)
    return products
