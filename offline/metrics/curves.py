"""What happens to the prediction when concepts are taken away or given back in order of importance."""

from __future__ import annotations

import torch
from torch import Tensor


def deletion_masks(importance: Tensor) -> Tensor:
    """Return the weights of concepts when the 0, 1, … K most important are zeroed.

    Parameters
    ----------
    importance
        ``[K]``; ties go to the lower index.

    Returns
    -------
    float64 ``[K + 1, K]``, 0 or 1. One minus it are the weights for insertion.
    """
    rank = torch.empty(len(importance), dtype=torch.int64)
    rank[importance.cpu().argsort(descending=True, stable=True)] = torch.arange(len(importance))
    return (rank.unsqueeze(0) >= torch.arange(len(importance) + 1).unsqueeze(1)).double()


def deletion_aopc(accuracies: Tensor) -> float:
    """Return the area over the perturbation curve of C-Deletion, ``Σ_{i=0..K} (acc_0 − acc_i) / (K + 2)``.

    Normalised as in the code of FACE's authors (arXiv 2510.11675), which divides by K + 2; at most K / (K + 2).

    Parameters
    ----------
    accuracies
        ``acc_i`` with the i most important concepts zeroed, ``[K + 1]``.
    """
    return float((accuracies[0] - accuracies).sum() / (len(accuracies) + 1))


def insertion_auc(accuracies: Tensor) -> float:
    """Return the area under the C-Insertion curve by the trapezoid rule, divided by K; at most 1 (FACE).

    Parameters
    ----------
    accuracies
        Accuracy with only the i most important concepts, ``[K + 1]``.
    """
    return float(torch.trapezoid(accuracies) / (len(accuracies) - 1))
