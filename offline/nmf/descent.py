"""Hierarchical alternating least squares with extrapolation, for many problems and several starts of each at once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from offline.nmf.penalties import Charge, Penalties, Weights, diagonal, gradient, shrunk
from offline.nmf.starts import Factors

_INNER_SWEEPS = 2
"""Sweeps per Gram matrix: products with A cost more than sweeps (Gillis & Glineur 2012, section 4)."""
_CHECK_EVERY = 10
"""Iterations between two looks at the projected gradient."""
_FIRST_HALVING = 10
"""Iterations after which the worse half of the starts is given up; after as many again the next time, and so on."""


class Factorisation(NamedTuple):
    """B problems of N rows, C columns and K components, solved."""

    codes: Tensor
    """``U``, ``[B, N, K]``, ≥ 0."""
    dictionary: Tensor
    """``W``, ``[B, K, C]``, ≥ 0; rows have unit length, or are zero where a component is not needed."""
    objective: Tensor
    """``½‖A − UW‖²`` and the penalties, ``[B]``."""
    residual: Tensor
    """Relative norm of the projected gradient at the end, ``[B]`` (see ``projected_gradient``)."""
    iterations: Tensor
    """Alternations done, int64 ``[B]``."""


class Descended(NamedTuple):
    """Where a descent ended: P problems, the best start of each."""

    factors: Factors
    residual: Tensor
    """``[P]``."""
    iterations: Tensor
    """int64 ``[P]``."""


def descend(
    batch: Tensor,
    factors: Factors,
    weights: Weights,
    tolerance: float,
    max_iterations: int,
    spent: Tensor | None = None,
) -> Descended:
    """Improve factors until their projected gradient is small.

    Each component of ``U`` and ``W`` in turn gets its exact minimiser with the others fixed (Cichocki & Phan 2009,
    eq. 18); extrapolation with restarts (Ang & Gillis 2019) makes that several times faster. Of several starts of a
    problem the worse half is given up again and again, until one is left. A problem stops by itself, whatever its
    batch mates do: the answer is that of the problem alone.

    Parameters
    ----------
    batch
        ``A``, ``[P, N, C]``.
    factors
        S places of each, that of ``[p, s]`` at ``p · S + s``.
    weights
        Of the penalties.
    tolerance, max_iterations
        As of ``factorise``.
    spent
        Alternations that each problem has had before and that count, int64 ``[P]``; none where omitted.
    """
    problems, starts = len(batch), len(factors.U) // len(batch)
    iterations = torch.zeros(problems, dtype=torch.int64, device=batch.device) if spent is None else spent.clone()
    left = max_iterations - iterations
    ends = set(left.tolist())
    state = _State.begin(batch, factors, weights)
    done = Factors(*(torch.empty_like(factor[::starts]) for factor in factors))
    residual = torch.full((problems,), torch.inf, dtype=batch.dtype, device=batch.device)
    active, halving = torch.arange(problems, device=batch.device), _FIRST_HALVING
    for iteration in range(max(ends) + 1):
        last, looked = iteration == max(ends), iteration % _CHECK_EVERY == 0
        if state.starts > 1 and (iteration == halving or last):
            state, halving = state.best(1 if last else -(-state.starts // 2)), 2 * halving
        if state.starts == 1 and (looked or iteration in ends):
            residual[active], iterations[active] = state.residual(), max_iterations - left[active] + iteration
            done.U[active], done.W[active] = state.U, state.W
            # Where only others end here, a problem goes on to its next look, as it would by itself.
            unfinished = (left[active] > iteration) & ((residual[active] > tolerance) | (not looked))
            active, state = active[unfinished], state.select(unfinished)
        if last or not len(active):
            break
        state.advance()
    return Descended(done, residual, iterations)


def finish(batch: Tensor, found: Descended, weights: Weights) -> Factorisation:
    """Return what was found in its final form."""
    U, W = _scaled(*found.factors)
    error = (batch - U.mT @ W).norm(dim=(1, 2), keepdim=True).square()
    objective = 0.5 * error + weights.total(U, W)
    return Factorisation(U.mT.contiguous(), W, objective.flatten(), found.residual, found.iterations)


def projected_gradient(rows: Tensor, codes: Tensor, dictionary: Tensor, penalties: Penalties | None = None) -> Tensor:
    """Return how far each factorisation is from a stationary point, ``[B]``.

    The gradient of the objective with the parts that push against the bounds set to zero (Lin 2007, eq. 21), for U
    and for W, each relative to its gradient's part that does not depend on the factor itself (``‖AWᵀ‖``, ``‖UᵀA‖``):
    a pure number, unchanged when A or a pair of components is scaled.

    Parameters
    ----------
    rows, codes, dictionary
        ``A [B, N, C]``, ``U [B, N, K]``, ``W [B, K, C]``.
    penalties
        That are part of the objective; none where omitted.
    """
    return _residual(rows, codes.mT, dictionary, (penalties or Penalties()).weigh(rows))


def sweep(factor: Tensor, target: Tensor, gram: Tensor, charge: Charge, sweeps: int = _INNER_SWEEPS) -> Tensor:
    """Update a factor's rows ``[B, K, M]`` one by one, given ``gram [B, K, K]`` and ``target [B, K, M]``."""
    factor = factor.clone()
    own = diagonal(gram)
    # A component whose partner is zero has no effect: any value minimises, so it keeps its own.
    inverse = torch.where(own > torch.finfo(gram.dtype).tiny, 1.0 / (own * (1 + charge.ridge)), 0.0)
    target = (target if charge.lasso is None else target - charge.lasso) * inverse
    group = None if charge.group is None else charge.group * inverse
    keep = torch.where(inverse > 0, 0.0, 1.0)
    others = gram * inverse
    others.diagonal(dim1=1, dim2=2).copy_(-keep.squeeze(2))
    for _ in range(sweeps):
        for k in range(factor.shape[1]):
            here = slice(k, k + 1)
            row = torch.baddbmm(target[:, here], others[:, here], factor, alpha=-1).clamp_min_(0)
            factor[:, here] = row if group is None else shrunk(row, group[:, here])
    return factor


@dataclass
class _State:
    """Factors of several problems on their way, extrapolated as in Ang & Gillis 2019 (algorithm 2)."""

    A: Tensor
    """``[P, N, C]``, shared by the starts of a problem; all others are ``[P · S, …]``."""
    U: Tensor
    W: Tensor
    U_ahead: Tensor
    W_ahead: Tensor
    objective: Tensor
    """Less ``½‖A‖²``."""
    momentum: Tensor
    limit: Tensor
    weights: Weights

    @classmethod
    def begin(cls, A: Tensor, factors: Factors, weights: Weights) -> _State:
        U, W = factors
        ones = torch.ones(len(U), 1, 1, dtype=A.dtype, device=A.device)
        each = torch.arange(len(A), device=A.device).repeat_interleave(len(U) // len(A))
        return cls(A, U, W, U, W, ones * torch.inf, ones * 0.5, ones, weights.select(each))

    @property
    def starts(self) -> int:
        """S."""
        return len(self.U) // len(self.A) if len(self.A) else 1

    def advance(self) -> None:
        """Update both factors from their extrapolated places; where that went up, forget the momentum."""
        WA, WW = _against(self.A.mT, self.W_ahead), self.W_ahead @ self.W_ahead.mT
        U = sweep(self.U_ahead, WA, WW, self.weights.of_codes(self.W_ahead))
        U_ahead = (U + self.momentum * (U - self.U)).clamp_min_(0)
        UA, UU = _against(self.A, U_ahead), U_ahead @ U_ahead.mT
        W = sweep(self.W_ahead, UA, UU, self.weights.of_dictionary(U_ahead))
        W_ahead = (W + self.momentum * (W - self.W)).clamp_min_(0)
        objective = ((0.5 * UU @ W - UA) * W).sum(dim=(1, 2), keepdim=True) + self.weights.total(U_ahead, W)
        worse = objective > self.objective
        self.limit = torch.where(worse, self.momentum, (1.01 * self.limit).clamp_max(1.0))
        self.momentum = torch.where(worse, self.momentum / 1.5, torch.minimum(1.05 * self.momentum, self.limit))
        self.objective = objective
        self.U_ahead, self.W_ahead = torch.where(worse, U, U_ahead), torch.where(worse, W, W_ahead)
        self.U, self.W = U, W

    def residual(self) -> Tensor:
        """Return the relative norm of the projected gradient, ``[P · S]``, at the scale of the final form."""
        return _residual(self.A, *_scaled(self.U, self.W), self.weights)

    def best(self, count: int) -> _State:
        """Return the best starts of each problem."""
        objective = self.objective.view(len(self.A), -1)
        chosen = objective.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
        first = torch.arange(len(self.A), device=chosen.device).unsqueeze(1) * objective.shape[1]
        return self._take((chosen + first).flatten(), self.A)

    def select(self, which: Tensor) -> _State:
        """Return the problems that a boolean mask keeps, where each has one start left."""
        return self if bool(which.all()) else self._take(which, self.A[which])

    def _take(self, which: Tensor, A: Tensor) -> _State:
        rest = {field.name: getattr(self, field.name)[which] for field in fields(self)[1:-1]}
        return replace(self, A=A, weights=self.weights.select(which), **rest)


def _scaled(U: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product with rows of W of unit length, or zero; U transposed."""
    length = W.norm(dim=2, keepdim=True)
    return U * length, torch.where(length > 0, W / length, 0.0)


def _against(A: Tensor, factors: Tensor) -> Tensor:
    """Return ``X A`` for every ``X [P · S, K, M]``, the starts of a problem in one product with its ``A [P, M, L]``."""
    product = factors.reshape(len(A), -1, factors.shape[2]) @ A
    return product.view(*factors.shape[:2], A.shape[2])


def _residual(A: Tensor, U: Tensor, W: Tensor, weights: Weights) -> Tensor:
    """See ``projected_gradient``; U transposed."""
    parts = []
    for factor, target, gram, charge in (
        (U, _against(A.mT, W), W @ W.mT, weights.of_codes(W)),
        (W, _against(A, U), U @ U.mT, weights.of_dictionary(U)),
    ):
        tiny = torch.finfo(A.dtype).tiny
        slope = gradient(factor, target, gram, charge)
        parts.append(slope.norm(dim=(1, 2)) / target.norm(dim=(1, 2)).clamp_min(tiny))
    return torch.hypot(parts[0], parts[1])
