"""How often a concept decides, and how often the model is right when it does (Xplique)."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(contributions: Tensor, ids: Tensor) -> Tensor:
    """Return the concept that contributes most to each image, ``argmax_k c_k``.

    Parameters
    ----------
    contributions
        ``[N, S]``.
    ids
        Whose they are; −1: of no concept, int64 ``[N, S]``.

    Returns
    -------
    int64 ``[N]``; −1 for images without any concept.
    """
    best = contributions.double().masked_fill(ids < 0, -torch.inf).argmax(1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


def prevalence(largest: Tensor, concepts: int) -> Tensor:
    """Return the share of images whose largest contribution each concept is.

    Parameters
    ----------
    largest
        From the function of that name, ``[N]``.
    concepts
        K.

    Returns
    -------
    float64 ``[K]``, adding up to the share of images that have any concept.
    """
    return torch.bincount(largest[largest >= 0], minlength=concepts).double() / len(largest)


def reliability(largest: Tensor, correct: Tensor, concepts: int) -> Tensor:
    """Return the model's accuracy on the images whose largest contribution each concept is.

    Parameters
    ----------
    largest, concepts
        As of ``prevalence``.
    correct
        Whether the model is right, bool ``[N]``.

    Returns
    -------
    float64 ``[K]``; NaN for concepts that are nowhere the largest.
    """
    right = torch.bincount(largest[correct & (largest >= 0)], minlength=concepts).double()
    return right / torch.bincount(largest[largest >= 0], minlength=concepts)
