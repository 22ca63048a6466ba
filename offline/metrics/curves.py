"""What happens to the prediction when concepts are taken away or given back in order of importance."""

from __future__ import annotations

import torch
from torch import Tensor


def deletion_masks(order: Tensor, steps: int) -> Tensor:
    """Return the weights of concepts when the 0, 1, … ``steps`` first ones are zeroed, image by image.

    Parameters
    ----------
    order
        What decides, largest first, ``[N, S]``; ties go to the lower index.
    steps
        With more than S the last masks zero everything.

    Returns
    -------
    float64 ``[N, steps + 1, S]``, 0 or 1. One minus it are the weights for insertion.
    """
    rank = order.argsort(dim=1, descending=True, stable=True).argsort(1)
    return (rank.unsqueeze(1) >= torch.arange(steps + 1, device=rank.device).view(1, -1, 1)).double()


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
