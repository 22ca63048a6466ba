"""Health and stability of dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

_ROWS = 2048
"""Rows of a dictionary that are compared with all at a time."""


def hoyer(dictionary: Tensor) -> float:
    """Return the mean Hoyer sparsity of the rows: 0 for constant ones, 1 for a single non-zero entry.

    ``(√C − ‖d‖₁/‖d‖₂) / (√C − 1)`` (Hoyer 2004, eq. 2); zero rows do not count.

    Parameters
    ----------
    dictionary
        ``[K, C]`` with C > 1.
    """
    rows = dictionary.double()
    rows = rows[rows.any(1)]
    root = rows.shape[1] ** 0.5
    return float(((root - rows.norm(p=1, dim=1) / rows.norm(dim=1)) / (root - 1)).mean())


def largest_cosine(dictionary: Tensor) -> float:
    """Return the largest cosine between two different rows of ``[K, C]``; 0 where there is one row only."""
    rows = functional.normalize(dictionary.float(), dim=1)
    largest = -1.0
    for first in range(0, len(rows), _ROWS):  # all cosines of a large dictionary do not fit into memory
        cosines = rows[first : first + _ROWS] @ rows[first:].T
        cosines.diagonal().fill_(-1.0)
        largest = max(largest, float(cosines.max()))
    return largest if len(rows) > 1 else 0.0


def matched_cosine(first: Tensor, second: Tensor) -> float:
    """Return the mean cosine of the rows of two dictionaries ``[K, C]``, matched one to one for the largest sum."""
    unit = [functional.normalize(dictionary.double(), dim=1) for dictionary in (first, second)]
    cosines = (unit[0] @ unit[1].T).cpu().numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return float(np.mean(cosines[rows, columns]))


def best_cosine(first: Tensor, second: Tensor) -> float:
    """Return the mean cosine of the rows of one dictionary with their nearest in another, both ways; ``[K, C]``.

    For dictionaries too large to be matched one to one; never smaller than ``matched_cosine``.
    """
    unit = [functional.normalize(dictionary.float(), dim=1) for dictionary in (first, second)]
    nearest = [(rows @ unit[1].T).max(1).values for rows in unit[0].split(_ROWS)]
    back = [(rows @ unit[0].T).max(1).values for rows in unit[1].split(_ROWS)]
    return float((torch.cat(nearest).double().mean() + torch.cat(back).double().mean()) / 2)


def stability(dictionaries: Sequence[Tensor]) -> float:
    """Return the mean matched cosine over all pairs of dictionaries (FACE: refits on 5 folds, Hungarian matching).

    The refits must have independent random starts: a shared start makes unstable methods look stable. On the same data
    only the start differs; on folds it and the data do.
    """
    return float(torch.tensor([matched_cosine(a, b) for a, b in combinations(dictionaries, 2)]).mean())
