"""Non-negative matrix factorisation, many at once: ``min ½‖A − UW‖²`` over ``U, W ≥ 0``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from concepts.errors import NotTrainable

Start = Literal["nndsvda", "random"]

_INNER_SWEEPS = 2
"""Sweeps per Gram matrix: products with A cost more than sweeps (Gillis & Glineur 2012, section 4)."""
_CHECK_EVERY = 10
"""Iterations between two looks at the projected gradient."""


class Factorisation(NamedTuple):
    """Result of ``factorise``; B problems of N rows, C columns and K components."""

    codes: Tensor
    """``U``, ``[B, N, K]``, ≥ 0."""
    dictionary: Tensor
    """``W``, ``[B, K, C]``, ≥ 0; rows have unit length, or are zero where a component is not needed."""
    objective: Tensor
    """``½‖A − UW‖²``, ``[B]``."""
    residual: Tensor
    """Relative norm of the projected gradient at the end, ``[B]`` (see ``projected_gradient``)."""
    iterations: Tensor
    """Alternations done, int64 ``[B]``."""


def factorise(
    rows: Tensor,
    rank: int,
    *,
    start: Start = "nndsvda",
    seed: int = 0,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
) -> Factorisation:
    """Factorise non-negative matrices by hierarchical alternating least squares.

    Each component of ``U`` and ``W`` in turn gets its exact minimiser with the others fixed (Cichocki & Phan 2009,
    eq. 18); extrapolation with restarts (Ang & Gillis 2019) makes that several times faster. A problem stops by
    itself when its projected gradient is small, whatever its batch mates do: the answer is that of the problem alone.

    Parameters
    ----------
    rows
        ``A``, ``[B, N, C]`` or ``[N, C]``, ≥ 0, float32 or float64; the arithmetic is done in this type.
    rank
        K, the number of components; at most ``min(N, C)``.
    start
        ``"nndsvda"``: from the leading singular vectors; ``"random"``: uniform numbers on the scale of the data.
    seed
        Of all random numbers; problem b of a batch draws its own.
    tolerance
        On the relative norm of the projected gradient.
    max_iterations
        Alternations after which a problem is left as it is.

    Raises
    ------
    NotTrainable
        If ``A`` has negative or non-finite entries, is all zero, or the rank does not fit it.
    """
    batch = rows if rows.ndim == 3 else rows[None]
    _validate(batch, rank)
    state = _State.begin(batch, *_start(batch, rank, start, seed))
    done = _State.begin(batch, state.U, state.W)
    residual = torch.full((len(batch),), torch.inf, dtype=batch.dtype, device=batch.device)
    iterations = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    active = torch.arange(len(batch), device=batch.device)
    for iteration in range(1, max_iterations + 1):
        state.advance()
        if iteration % _CHECK_EVERY == 0 or iteration == max_iterations:
            residual[active] = state.residual()
            iterations[active] = iteration
            done.U[active], done.W[active] = state.U, state.W
            unfinished = residual[active] > tolerance
            active, state = active[unfinished], state.select(unfinished)
            if not len(active):
                break
    return _result(batch, done, residual, iterations)


def best_of(
    rows: Tensor,
    rank: int,
    *,
    random_starts: int = 4,
    seed: int = 0,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
) -> Factorisation:
    """Factorise one matrix from the singular vectors and from random starts, and return the best.

    The problem is not convex: different starts end in different places, the singular vectors not always in the best.

    Parameters
    ----------
    rows
        ``A``, ``[N, C]``; the rest as of ``factorise``.
    random_starts
        How many beside the one from the singular vectors.

    Returns
    -------
    Factorisation
        Of a batch of one.
    """
    runs = [factorise(rows, rank, seed=seed, tolerance=tolerance, max_iterations=max_iterations)]
    if random_starts:
        batch = rows.expand(random_starts, -1, -1)
        runs.append(
            factorise(batch, rank, start="random", seed=seed, tolerance=tolerance, max_iterations=max_iterations)
        )
    together = Factorisation(*(torch.cat(parts) for parts in zip(*runs, strict=True)))
    best = int(together.objective.argmin())
    return Factorisation(*(part[best : best + 1] for part in together))


def projected_gradient(rows: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    """Return how far each factorisation is from a stationary point, ``[B]``.

    The gradient of ``½‖A − UW‖²`` with the parts that push against the bounds set to zero (Lin 2007, eq. 21), for U
    and for W, each relative to its gradient's part that does not depend on the factor itself (``‖AWᵀ‖``, ``‖UᵀA‖``):
    a pure number, unchanged when A or a pair of components is scaled.

    Parameters
    ----------
    rows, codes, dictionary
        ``A [B, N, C]``, ``U [B, N, K]``, ``W [B, K, C]``.
    """
    AWt, UtA = rows @ dictionary.mT, codes.mT @ rows
    parts = []
    for factor, constant, gradient in (
        (codes, AWt, codes @ (dictionary @ dictionary.mT) - AWt),
        (dictionary, UtA, (codes.mT @ codes) @ dictionary - UtA),
    ):
        projected = torch.where(factor > 0, gradient, gradient.clamp(max=0))
        parts.append(projected.norm(dim=(1, 2)) / constant.norm(dim=(1, 2)).clamp_min(torch.finfo(rows.dtype).tiny))
    return torch.hypot(parts[0], parts[1])


@dataclass
class _State:
    """Factors of several problems on their way, extrapolated as in Ang & Gillis 2019 (algorithm 2)."""

    A: Tensor
    U: Tensor
    """Transposed: ``[B, K, N]``, so that a component is contiguous."""
    W: Tensor
    U_ahead: Tensor
    W_ahead: Tensor
    error: Tensor
    momentum: Tensor
    limit: Tensor

    @classmethod
    def begin(cls, A: Tensor, U: Tensor, W: Tensor) -> _State:
        ones = torch.ones(len(A), 1, 1, dtype=A.dtype, device=A.device)
        return cls(A, U.clone(), W.clone(), U, W, ones * torch.inf, ones * 0.5, ones)

    def advance(self) -> None:
        """Update both factors from their extrapolated places; where that raised the error, forget the momentum."""
        U = _sweep(self.U_ahead, self.W_ahead @ self.A.mT, self.W_ahead @ self.W_ahead.mT)
        U_ahead = (U + self.momentum * (U - self.U)).clamp_min(0)
        UA, UU = U_ahead @ self.A, U_ahead @ U_ahead.mT
        W = _sweep(self.W_ahead, UA, UU)
        W_ahead = (W + self.momentum * (W - self.W)).clamp_min(0)
        # ‖A − UW‖² less ‖A‖²
        error = ((UU @ W - 2 * UA) * W).sum(dim=(1, 2), keepdim=True)
        worse = error > self.error
        self.limit = torch.where(worse, self.momentum, (1.01 * self.limit).clamp_max(1.0))
        self.momentum = torch.where(worse, self.momentum / 1.5, torch.minimum(1.05 * self.momentum, self.limit))
        self.error = error
        self.U_ahead, self.W_ahead = torch.where(worse, U, U_ahead), torch.where(worse, W, W_ahead)
        self.U, self.W = U, W

    def residual(self) -> Tensor:
        return projected_gradient(self.A, self.U.mT, self.W)

    def select(self, which: Tensor) -> _State:
        """Return the problems that a boolean mask keeps."""
        if bool(which.all()):
            return self
        return _State(*(getattr(self, field.name)[which] for field in fields(self)))


def _result(batch: Tensor, state: _State, residual: Tensor, iterations: Tensor) -> Factorisation:
    length = state.W.norm(dim=2, keepdim=True)
    codes = (state.U * length).mT.contiguous()
    dictionary = torch.where(length > 0, state.W / length, 0.0)
    objective = 0.5 * (batch - codes @ dictionary).square().sum(dim=(1, 2))
    return Factorisation(codes, dictionary, objective, residual, iterations)


def _validate(batch: Tensor, rank: int) -> None:
    size = min(batch.shape[1:])
    if rank < 1 or rank > size:
        raise NotTrainable(
            f"{rank} concepts do not fit {batch.shape[1]} vectors of {batch.shape[2]} channels: ask for 1 to {size}"
        )
    if not torch.isfinite(batch).all():
        raise NotTrainable("activations have NaN or infinite entries: check the model and its preprocessing")
    if (batch < 0).any():
        raise NotTrainable("activations have negative entries, which no non-negative factorisation can make")
    if not batch.any(dim=2).any(dim=1).all():
        raise NotTrainable("activations are all zero: nothing can be learned from them")


def _sweep(factor: Tensor, target: Tensor, gram: Tensor) -> Tensor:
    """Update a factor's rows ``[B, K, M]`` one by one, given ``gram [B, K, K]`` and ``target [B, K, M]``."""
    factor = factor.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2).unsqueeze(2)
    # A component whose partner is zero has no effect: any value minimises, so it keeps its own.
    inverse = torch.where(diagonal > torch.finfo(gram.dtype).tiny, 1.0 / diagonal, 0.0)
    target = target * inverse
    others = gram * inverse - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for _ in range(_INNER_SWEEPS):
        for k in range(factor.shape[1]):
            here = slice(k, k + 1)
            factor[:, here] = torch.baddbmm(target[:, here], others[:, here], factor, alpha=-1).clamp_min_(0)
    return factor


def _start(batch: Tensor, rank: int, start: Start, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``Uᵀ [B, K, N]`` and ``W [B, K, C]`` to begin with."""
    B, N, C = batch.shape
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + b) for b in range(B)]

    def draw(*shape: int, normal: bool = False) -> Tensor:
        # Drawn on the CPU, so that the same seed gives the same numbers on every device.
        numbers = [(torch.randn if normal else torch.rand)(shape, generator=g, dtype=batch.dtype) for g in generators]
        return torch.stack(numbers).to(batch.device)

    if start == "random":
        scale = (batch.mean(dim=(1, 2)) / rank).sqrt()[:, None, None] * 2
        return draw(rank, N) * scale, draw(rank, C) * scale
    width = min(N, C, rank + 10)
    return _nndsvda(batch, rank, draw(C, width, normal=True))


def _nndsvda(batch: Tensor, rank: int, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Start from singular vectors (Boutsidis & Gallopoulos 2008), zeros filled with the mean.

    Each singular pair is split into its positive and its negative part; the heavier of the two becomes a component.
    """
    U, S, Vt = _leading_svd(batch, probe)
    u, s, v = U[..., :rank].mT, S[:, :rank, None], Vt[:, :rank]
    u_plus, u_minus, v_plus, v_minus = u.clamp_min(0), (-u).clamp_min(0), v.clamp_min(0), (-v).clamp_min(0)
    weight_plus = u_plus.norm(dim=2, keepdim=True) * v_plus.norm(dim=2, keepdim=True)
    weight_minus = u_minus.norm(dim=2, keepdim=True) * v_minus.norm(dim=2, keepdim=True)
    plus = weight_plus >= weight_minus
    u_part, v_part = torch.where(plus, u_plus, u_minus), torch.where(plus, v_plus, v_minus)
    strength = (s * torch.maximum(weight_plus, weight_minus)).sqrt()
    tiny = torch.finfo(batch.dtype).tiny
    codes = strength * u_part / u_part.norm(dim=2, keepdim=True).clamp_min(tiny)
    dictionary = strength * v_part / v_part.norm(dim=2, keepdim=True).clamp_min(tiny)
    mean = batch.mean(dim=(1, 2))[:, None, None]
    # Variant "a": a zero would be slow to leave. The mean of A is a product; each factor takes its root's share.
    fill = (mean / rank).sqrt()
    return torch.where(codes > 0, codes, fill), torch.where(dictionary > 0, dictionary, fill)


def _leading_svd(batch: Tensor, probe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading singular triplets: randomised subspace iteration (Halko et al. 2011, algorithms 4.4, 5.1)."""
    basis = torch.linalg.qr(batch @ probe).Q
    for _ in range(4):
        basis = torch.linalg.qr(batch.mT @ basis).Q
        basis = torch.linalg.qr(batch @ basis).Q
    U, S, Vt = torch.linalg.svd(basis.mT @ batch, full_matrices=False)
    return basis @ U, S, Vt
