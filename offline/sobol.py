"""Total Sobol indices of concepts: how much of a logit's variance goes when concepts are randomly dimmed."""

from __future__ import annotations

import math

import torch
from scipy.stats import qmc
from torch import Tensor


def designs(concepts: int, n: int) -> Tensor:
    """Return the masks of Jansen's estimator: matrix A, then A with column i taken from B, for each i.

    A and B are the two halves of an unscrambled Sobol sequence of ``2K`` dimensions. B itself is never evaluated.

    Parameters
    ----------
    concepts
        K.
    n
        Designs; a power of two keeps the sequence balanced.

    Returns
    -------
    float64 ``[K + 1, n, K]``, in [0, 1).
    """
    exponent = math.ceil(math.log2(max(n, 1)))
    points = torch.from_numpy(qmc.Sobol(2 * concepts, scramble=False).random_base2(exponent)[:n])
    a, b = points[:, :concepts], points[:, concepts:]
    mixed = a.repeat(concepts, 1, 1)
    each = torch.arange(concepts)
    mixed[each, :, each] = b.T
    return torch.cat([a.unsqueeze(0), mixed])


def jansen(outputs: Tensor) -> Tensor:
    """Return total Sobol indices from the outputs at ``designs``.

    ``S_Ti = Σ_j (f(A)_j − f(C⁽ⁱ⁾)_j)² / (2 n Var f(A))`` (Jansen 1999, eq. 9; CRAFT, eq. 3).

    Parameters
    ----------
    outputs
        ``[…, K + 1, n]``: the logit at each design.

    Returns
    -------
    ``[…, K]``, ≥ 0; zero where the output does not vary.
    """
    base, mixed = outputs[..., :1, :], outputs[..., 1:, :]
    variance = base.var(dim=-1, correction=0)
    squares = (base - mixed).square().mean(dim=-1) / 2
    return torch.where(variance > 0, squares / variance.clamp_min(torch.finfo(outputs.dtype).tiny), 0.0)


def closed_form(contributions: Tensor) -> Tensor:
    """Return total Sobol indices of a head that is affine in the activation.

    There the logit is ``constant + Σ m_i c_i`` with independent masks of equal variance, so ``S_Ti = c_i² / Σ_j c_j²``.

    Parameters
    ----------
    contributions
        ``c``, ``[…, K]``.
    """
    squares = contributions.square()
    total = squares.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, squares / total.clamp_min(torch.finfo(squares.dtype).tiny), 0.0)
