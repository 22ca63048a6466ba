"""Non-negative least squares of many rows at once, exact, from the normal equations.

Each row solves ``min_{z ≥ 0} ½ zᵀQz − bᵀz`` with ``Q = D Dᵀ`` and ``b = D a`` (methods: NMF codes). K is small, so the
data enter only through the K×K Gram matrix. Accelerated projected gradient steps find nearly the right active sets in
a few large matrix products; block principal pivoting (Kim & Park, "Fast nonnegative matrix factorization: an
active-set-like method", SIAM J. Sci. Comput. 2011, algorithm 2) then ends on the exact one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KKT_TOLERANCE = 1e-9
"""Largest violation of the optimality conditions, relative to ``max |b|`` of the row, at which a row is done."""

_GRADIENT_STEPS = 64
"""A step costs a hundredth of an exchange, and every exchange that it saves is one of all rows that are left."""

_FULL_EXCHANGES = 3
_MAX_PIVOTS = 200
_MAX_ELEMENTS = 2**23
"""Of the Gram matrices gathered at once, one a row: bounds the memory to some hundred MB."""


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
    gram, b = gram.double(), b.double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    absent = diagonal <= 0
    # Unit diagonal: the scale of atoms does not matter to the active set, and a tiny ridge settles duplicates.
    root = diagonal.masked_fill(absent, 1.0).sqrt()
    scaled = gram / (root.unsqueeze(1) * root.unsqueeze(2))
    scaled.diagonal(dim1=1, dim2=2).fill_(1.0 + 1e-12)
    # An absent atom with a right-hand side of zero keeps the code zero.
    c = (b / root.unsqueeze(1)).masked_fill(absent.unsqueeze(1), 0.0)
    z = _pivot(scaled, c, _projected_gradient(scaled, c) > 0)
    return Solution(z / root.unsqueeze(1), _violation(scaled, c, z))


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
    size = max(_MAX_ELEMENTS // (k * k), 1)
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
        now, right, matrix = passive[open_rows], c[open_rows], q[group[open_rows]]
        z = _restricted_solve(matrix, right, now)
        solution[open_rows] = z.clamp_min(0.0)
        y = torch.bmm(matrix, z.unsqueeze(2)).squeeze(2) - right
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


def _restricted_solve(matrix: Tensor, right: Tensor, passive: Tensor) -> Tensor:
    """Solve each row's equations on its passive set; zero elsewhere."""
    both = passive.unsqueeze(1) & passive.unsqueeze(2)
    restricted = torch.where(both, matrix, 0.0)
    restricted.diagonal(dim1=1, dim2=2).masked_fill_(~passive, 1.0)
    factor, _ = torch.linalg.cholesky_ex(restricted)
    return torch.cholesky_solve(torch.where(passive, right, 0.0).unsqueeze(2), factor).squeeze(2)
