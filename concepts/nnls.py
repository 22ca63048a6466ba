"""Non-negative least squares of many rows at once, exact, from the normal equations.

Each row solves ``min_{z ≥ 0} ½ zᵀQz − bᵀz`` with ``Q = D Dᵀ`` and ``b = D a`` (methods: NMF codes). K is small, so the
data enter only through the K×K Gram matrix. Accelerated projected gradient steps find nearly the right active sets in
a few large matrix products; block principal pivoting (Kim & Park, "Fast nonnegative matrix factorization: an
active-set-like method", SIAM J. Sci. Comput. 2011, algorithm 2) then ends on the exact one.

On its active set S (atoms with a code above zero) the solution is ``z_S = Q_S⁻¹ D_S a``, zero elsewhere. Where the
active set stays as it is, that is all there is to differentiate (implicit differentiation).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

KKT_TOLERANCE = 1e-9
"""Largest violation of the optimality conditions, relative to ``max |b|`` of the row, at which a row is done."""

_GRADIENT_STEPS = 64
"""A step costs a hundredth of an exchange, and every exchange that it saves is one of all rows that are left."""

_FULL_EXCHANGES = 3
_MAX_PIVOTS = 200
_MAX_ELEMENTS = 2**23
"""Of the equations gathered at once, one system a row: bounds the memory to some hundred MB."""


_SMALL = 32
"""Up to so many atoms, equations are not made fewer where few are passive: that costs more than it saves."""


class Solution(NamedTuple):
    """Codes and how nearly optimal they are."""

    codes: Tensor
    """``[G, N, K]``, float64, ≥ 0."""
    violation: Tensor
    """``[G, N]``: the row's largest ``|min(z, Qz − b)|`` relative to its ``max |b|``, atoms scaled to length one."""


def solve(gram: Tensor, b: Tensor) -> Solution:
    """Solve every row of every group exactly.

    Parameters
    ----------
    gram
        ``[G, K, K]``, symmetric positive semidefinite: one Gram matrix a group. A zero row (an atom that is not
        there) gets the code zero.
    b
        ``[G, N, K]``: right-hand sides, N rows a group.

    Returns
    -------
    Solution
        In float64, on the device of ``b``. Rows with duplicate atoms have many solutions; one of them is returned.
    """
    scaled, root, absent = _scaled(gram.double())
    # An absent atom with a right-hand side of zero keeps the code zero.
    c = (b.double() / root.unsqueeze(1)).masked_fill(absent.unsqueeze(1), 0.0)
    z = _pivot(scaled, c, _projected_gradient(scaled, c) > 0)
    return Solution(z / root.unsqueeze(1), _violation(scaled, c, z))


def codes(a: Tensor, dictionary: Tensor) -> Tensor:
    """Return the codes of activations on a dictionary, differentiable with respect to both.

    Parameters
    ----------
    a
        ``[G, N, C]``: N rows a group.
    dictionary
        ``[G, K, C]``: one dictionary a group; an atom of zeros is absent.

    Returns
    -------
    ``[G, N, K]``, float64. Gradients hold the active sets as they are: exact but at rows where one changes.
    """
    return cast(Tensor, _Codes.apply(a, dictionary))


def adjoint(gram: Tensor, active: Tensor, upstream: Tensor) -> Tensor:
    """Return ``u`` with ``Q_S u_S = g_S`` and zero outside the active set S: gradients g of codes, brought to ``b``.

    Parameters
    ----------
    gram
        ``[G, K, K]``, as of ``solve``.
    active
        bool ``[G, N, K]``: where the codes of the solution are above zero.
    upstream
        ``[G, N, L, K]``: L gradients with respect to the codes of each row.

    Returns
    -------
    ``[G, N, L, K]``, float64; ``u D`` are the gradients with respect to the activation.
    """
    scaled, root, _ = _scaled(gram.double())
    right = upstream.double() / root.view(len(root), 1, 1, -1)
    groups, rows, _, k = upstream.shape
    group = torch.arange(groups, device=gram.device).repeat_interleave(rows)
    size = _rows_at_once(k)
    chunks = zip(group.split(size), active.flatten(0, 1).split(size), right.flatten(0, 1).split(size), strict=True)
    found = [_restricted_solve(scaled, of, g.mT, passive).mT for of, passive, g in chunks]
    return torch.cat(found).view_as(right) / root.view(len(root), 1, 1, -1)


class _Codes(torch.autograd.Function):
    """The solution, with ``∂z_S/∂a = Q_S⁻¹ D_S`` and, from the same equations, its slope in the dictionary."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, dictionary: Tensor) -> Tensor:
        d = dictionary.double()
        z = solve(d @ d.mT, a.double() @ d.mT).codes
        ctx.save_for_backward(a, dictionary, z)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        a, dictionary, z = ctx.saved_tensors
        d = dictionary.double()
        u = adjoint(d @ d.mT, z > 0, upstream.unsqueeze(2)).squeeze(2)
        at_a = u @ d
        # dz_S = Q_S⁻¹ (dD r − D dDᵀ z) with the residual r = a − zD.
        at_dictionary = u.mT @ (a.double() - z @ d) - z.mT @ at_a
        return at_a.to(a.dtype), at_dictionary.to(dictionary.dtype)


def _scaled(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Gram matrices of atoms of length one, the lengths ``[G, K]``, and which atoms are absent.

    The scale of atoms does not matter to the active set, and a tiny ridge settles duplicates.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    absent = diagonal <= 0
    root = diagonal.masked_fill(absent, 1.0).sqrt()
    scaled = gram / (root.unsqueeze(1) * root.unsqueeze(2))
    scaled.diagonal(dim1=1, dim2=2).fill_(1.0 + 1e-12)
    return scaled, root, absent


def _rows_at_once(k: int) -> int:
    return max(_MAX_ELEMENTS // (k * k), 1)


def _violation(q: Tensor, c: Tensor, z: Tensor) -> Tensor:
    """Return ``[G, N]``: how far each row is from ``z ≥ 0, Qz − c ≥ 0, z·(Qz − c) = 0``."""
    residual = torch.minimum(z, z @ q - c).abs().amax(2)
    return residual / c.abs().amax(2).clamp_min(1e-300)


def _projected_gradient(q: Tensor, c: Tensor) -> Tensor:
    """Return a near-solution by Nesterov's accelerated projected gradient, fixed steps."""
    step = 1.0 / q.abs().sum(2).amax(1).clamp_min(1e-12).view(-1, 1, 1)
    kernel = torch.eye(q.shape[1], dtype=q.dtype, device=q.device) - step * q
    shift = step * c
    z = y = shift.clamp_min(0.0)
    momentum = 1.0
    for _ in range(_GRADIENT_STEPS):
        following = torch.baddbmm(shift, y, kernel).clamp_min_(0.0)
        next_momentum = (1.0 + (1.0 + 4.0 * momentum * momentum) ** 0.5) / 2.0
        y = torch.lerp(z, following, 1.0 + (momentum - 1.0) / next_momentum)
        z, momentum = following, next_momentum
    return z


def _pivot(q: Tensor, c: Tensor, passive: Tensor) -> Tensor:
    """Exchange infeasible variables between the passive and the active set until every row is optimal."""
    groups, rows, k = c.shape
    group = torch.arange(groups, device=c.device).repeat_interleave(rows)
    size = _rows_at_once(k)
    chunks = zip(group.split(size), c.reshape(-1, k).split(size), passive.reshape(-1, k).split(size), strict=True)
    return torch.cat([_pivot_rows(q, *chunk) for chunk in chunks]).view(groups, rows, k)


def _pivot_rows(q: Tensor, group: Tensor, c: Tensor, passive: Tensor) -> Tensor:
    """Do it for rows ``[R, K]`` of any groups, int64 ``[R]``; edits ``passive``."""
    k = c.shape[1]
    solution = torch.zeros_like(c)
    open_rows = torch.arange(len(c), device=c.device)
    fewest = torch.full((len(c),), k + 1, device=c.device)
    patience = torch.full((len(c),), _FULL_EXCHANGES, device=c.device)
    for _ in range(_MAX_PIVOTS):
        if not len(open_rows):
            break
        now, right, owner = passive[open_rows], c[open_rows], group[open_rows]
        z = _restricted_solve(q, owner, right.unsqueeze(2), now).squeeze(2)
        solution[open_rows] = z.clamp_min(0.0)
        y = _product(q, owner, z, now) - right
        slack = KKT_TOLERANCE * right.abs().amax(1, keepdim=True)
        infeasible = torch.where(now, z < -slack, y < -slack)
        count = infeasible.sum(1)
        fewer = count < fewest[open_rows]
        fewest[open_rows] = torch.where(fewer, count, fewest[open_rows])
        left = torch.where(fewer, _FULL_EXCHANGES, patience[open_rows] - 1)
        patience[open_rows] = left
        # Kim & Park's backup rule: where full exchanges stop helping, exchange the last infeasible variable alone.
        last = torch.zeros_like(infeasible).scatter_(1, _last_true(infeasible).unsqueeze(1), True)
        exchange = torch.where((left >= 0).unsqueeze(1), infeasible, infeasible & last)
        passive[open_rows] = now ^ exchange
        open_rows = open_rows[count > 0]
    return solution


def _last_true(mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(1).clamp_min(0)


def _restricted_solve(q: Tensor, group: Tensor, right: Tensor, passive: Tensor) -> Tensor:
    """Solve each row's equations, ``[R, K, L]`` of them, on its passive set; zero elsewhere."""
    if len(q[0]) <= _SMALL:
        return _masked_solve(q[group], right, passive)
    place = _places(passive)
    matrix = q[group.view(-1, 1, 1), place.unsqueeze(2), place.unsqueeze(1)]
    at = place.unsqueeze(2).expand(-1, -1, right.shape[2])
    found = _masked_solve(matrix, right.gather(1, at), passive.gather(1, place))
    return torch.zeros_like(right).scatter_(1, at, found)


def _product(q: Tensor, group: Tensor, z: Tensor, passive: Tensor) -> Tensor:
    """Return each row's ``Qz``, ``[R, K]``, for z that is zero outside its passive set."""
    if len(q) == 1:
        return z @ q[0]
    if len(q[0]) <= _SMALL:
        return torch.bmm(z.unsqueeze(1), q[group]).squeeze(1)
    place = _places(passive)
    return torch.bmm(z.gather(1, place).unsqueeze(1), q[group.unsqueeze(1), place]).squeeze(1)


def _places(passive: Tensor) -> Tensor:
    """Return the passive atoms of every row, int64 ``[R, W]`` for the largest number W, filled up with others."""
    width = max(int(passive.sum(1).amax()), 1) if len(passive) else 1
    return passive.byte().argsort(dim=1, descending=True, stable=True)[:, :width]


def _masked_solve(matrix: Tensor, right: Tensor, passive: Tensor) -> Tensor:
    """Do it by equations that leave the others at zero."""
    both = passive.unsqueeze(1) & passive.unsqueeze(2)
    restricted = torch.where(both, matrix, 0.0)
    restricted.diagonal(dim1=1, dim2=2).masked_fill_(~passive, 1.0)
    factor, _ = torch.linalg.cholesky_ex(restricted)
    return torch.cholesky_solve(torch.where(passive.unsqueeze(2), right, 0.0), factor)
