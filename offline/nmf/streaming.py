"""One factorisation of more vectors than memory holds: whole passes of exact alternation, in constant memory.

Given W, the codes of a vector depend on no other vector and are solved exactly (``concepts.nnls``); given the codes, W
depends on the vectors through ``UᵀU`` and ``UᵀA`` alone, the statistics of online dictionary learning (Mairal et al.,
JMLR 2010, algorithm 1). Here they are summed over a whole pass, at one W: nothing in them is outdated, there is no rate
of forgetting to choose, each pass tells the objective and the gradient of all vectors as they are, and every step is
one of block coordinate descent. Passes are few, since the first W is the factorisation of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from concepts import nnls
from concepts.errors import NotTrainable
from offline.nmf.descent import sweep
from offline.nmf.many import best_of, check_entries, check_rank, factorise
from offline.nmf.penalties import Penalties, Weights, diagonal, gradient
from offline.vectors import Vectors

_SWEEPS = 100
"""Over the rows of W a pass: they cost nothing beside the pass."""
_MOMENTUM = 0.5
"""Of the first extrapolation."""

Listener = Callable[[int, float, float], None]
"""Hears of a pass: its number, the objective, the projected gradient."""


class Streamed(NamedTuple):
    """What was learned from a stream of N vectors."""

    dictionary: Tensor
    """``W``, float64 ``[K, C]``, ≥ 0; rows have unit length, or are zero where a component is not needed."""
    objective: float
    """``½‖A − UW‖²`` and the penalties, with the best codes for this dictionary."""
    residual: float
    """Relative norm of the projected gradient (see ``projected_gradient``)."""
    passes: int


def factorise_stream(
    vectors: Vectors,
    rank: int,
    *,
    seed: int = 0,
    random_start: bool = False,
    batch_size: int = 8192,
    sample: int = 8192,
    tolerance: float = 1e-3,
    max_passes: int = 30,
    penalties: Penalties | None = None,
    device: torch.device | str = "cpu",
    listener: Listener = lambda *_: None,
) -> Streamed:
    """Learn a dictionary from vectors that are read batch by batch.

    Parameters
    ----------
    vectors
        The rows of ``A``, ≥ 0.
    rank
        K, the number of components; at most the channels.
    seed
        Of the sample, the order of reading, and random starts.
    random_start
        Begin with one random start on the sample, as independent runs are compared; else with the best of several.
    batch_size
        Vectors that are read, and whose codes are solved, at a time.
    sample
        Vectors that are factorised in memory to begin with; those of zeros do not count.
    tolerance
        On the relative norm of the projected gradient of all vectors.
    max_passes
        Passes after which the best dictionary is taken as it is.
    penalties
        None where omitted.
    device
        Where to compute.
    listener
        Hears of every pass.

    Raises
    ------
    NotTrainable
        If vectors have negative or non-finite entries, are all zero, or fewer than the rank, or it does not fit them.
    """
    check_rank(len(vectors), vectors.channels, rank)
    device = torch.device(device)
    square, counted, rows = _survey(vectors, batch_size, seed, max(sample, rank))
    rows = rows.to(device)
    weights = (penalties or Penalties()).weights(square.to(device).sqrt(), counted.to(device), vectors.channels)
    if random_start:
        first = factorise(rows, rank, start="random", seed=seed, tolerance=tolerance, penalties=penalties)
    else:
        first = best_of(rows, rank, seed=seed, tolerance=tolerance, penalties=penalties)
    lengths = first.codes.norm(dim=1).mT * (int(counted) / len(rows)) ** 0.5
    course = _Course(_Place(first.dictionary[0], lengths))
    for number in range(1, max_passes + 1):
        reader = _Reader(course.place, weights)
        for batch in vectors.batches(batch_size, seed=seed, epoch=number):
            reader.add(batch.to(device).double())
        course.judge(reader.seen(square))
        listener(number, course.best.objective, course.best.residual)
        if course.best.residual <= tolerance:
            break
        course.move(weights)
    best = course.best
    return Streamed(best.place.W * (best.place.lengths > 0), best.objective, best.residual, number)


def _survey(vectors: Vectors, batch_size: int, seed: int, sample: int) -> tuple[Tensor, Tensor, Tensor]:
    """Check all vectors; return ``‖A‖²``, how many are not zero, and a sample of these in float64."""
    square, counted = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    kept: list[Tensor] = []
    for batch in vectors.batches(batch_size, seed=seed, epoch=0):
        check_entries(batch)
        rows = batch[batch.any(1)].double()
        square += rows.square().sum()
        if counted < sample:
            kept.append(rows[: sample - int(counted)].clone())  # not the whole batch
        counted += len(rows)
    if not counted:
        raise NotTrainable("activations are all zero: nothing can be learned from them")
    return square, counted, torch.cat(kept)


class _Place(NamedTuple):
    """Where the search is."""

    W: Tensor
    """``[K, C]``; rows of unit length, or zero."""
    lengths: Tensor
    """Of the columns of U, ``[K, 1]``, as they were last: the scale that a penalty on W is measured at."""


class _Seen(NamedTuple):
    """What a pass tells of a place."""

    place: _Place
    UU: Tensor
    UA: Tensor
    code_sums: Tensor
    """``[K, 1]``."""
    objective: float
    residual: float


class _Reader:
    """Solves codes at a place and sums up what they say."""

    def __init__(self, place: _Place, weights: Weights) -> None:
        self._place, self._weights = place, weights
        W = place.W.unsqueeze(0)
        self._charge = weights.of_codes(W)
        self._gram = W @ W.mT
        ridge = self._charge.ridge * diagonal(self._gram)
        if self._charge.group is not None:
            # ‖u‖ ≤ ½ (‖u‖² / length + length), and equal where the length is right: never higher than before.
            ridge = ridge + self._charge.group / place.lengths.clamp_min(torch.finfo(W.dtype).tiny)
        self._quadratic = self._gram + torch.diag_embed(ridge.squeeze(2))
        concepts, channels = place.W.shape
        self._UU, self._UA = W.new_zeros(concepts, concepts), W.new_zeros(concepts, channels)
        self._code_sums, self._constant = W.new_zeros(concepts), W.new_zeros(())

    def add(self, rows: Tensor) -> None:
        """Take in vectors, float64 ``[n, C]``."""
        target = rows @ self._place.W.T
        charged = target if self._charge.lasso is None else target - self._charge.lasso[0, :, 0]
        U = nnls.solve(self._quadratic, charged.unsqueeze(0)).codes[0]
        self._UU += U.T @ U
        self._UA += U.T @ rows
        self._code_sums += U.sum(0)
        self._constant += target.square().sum()

    def seen(self, square: Tensor) -> _Seen:
        """Return what was seen of all vectors, given ``‖A‖²``."""
        place, W = self._place, self._place.W.unsqueeze(0)
        UU, UA, sums = self._UU.unsqueeze(0), self._UA.unsqueeze(0), self._code_sums.view(1, -1, 1)
        lengths = diagonal(UU).sqrt()
        error = 0.5 * (square.to(W) - 2 * (UA * W).sum() + (UU * self._gram).sum())
        objective = error + self._charge.total(sums, lengths, diagonal(self._gram)).sum()
        slope = gradient(W, UA, UU, self._weights.of_sums(sums, lengths)).norm() / UA.norm().clamp_min(1e-300)
        # The codes are exact, but for the scale that a penalty on W was measured at.
        off = torch.zeros(())
        if self._charge.group is not None:
            off = torch.where(lengths > 0, self._charge.group * (1 - lengths / place.lengths), 0.0).norm()
        residual = torch.hypot(slope, off.to(W) / self._constant.sqrt().clamp_min(1e-300))
        return _Seen(_Place(place.W, lengths[0]), self._UU, self._UA, sums[0], float(objective), float(residual))


class _Course:
    """Steps of W, extrapolated as in Ang & Gillis 2019: what was too far is taken back."""

    def __init__(self, place: _Place) -> None:
        self.place, self._momentum = place, _MOMENTUM
        self._best: _Seen | None = None
        self._plain: Tensor | None = None
        """Where the last exact step led."""
        self._worse = False

    @property
    def best(self) -> _Seen:
        """The best place so far, as it was seen."""
        if self._best is None:
            raise ValueError("nothing was seen yet")
        return self._best

    def judge(self, seen: _Seen) -> None:
        """Take in what was seen at the place."""
        self._worse = self._best is not None and seen.objective > self._best.objective
        if not self._worse:
            self._best = seen

    def move(self, weights: Weights) -> None:
        """Go on from the best place."""
        seen = self.best
        plain = _exact(seen, weights)
        ahead = plain
        if self._worse:
            self._momentum /= 2
        elif self._plain is not None:
            ahead = (plain + self._momentum * (plain - self._plain)).clamp_min(0)
            self._momentum = min(1.0, 1.2 * self._momentum)
        self._plain = plain
        self.place = _Place(functional.normalize(ahead, dim=1), seen.place.lengths)


def _exact(seen: _Seen, weights: Weights) -> Tensor:
    """Return the best W for the codes that were seen, rows of unit length."""
    W, UU, UA = seen.place.W.unsqueeze(0), seen.UU.unsqueeze(0), seen.UA.unsqueeze(0)
    charge = weights.of_sums(seen.code_sums.unsqueeze(0), seen.place.lengths.unsqueeze(0))
    return functional.normalize(sweep(W, UA, UU, charge, _SWEEPS)[0], dim=1)
