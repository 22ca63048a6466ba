"""How often a concept decides, and how often the model is right when it does (Xplique)."""

from __future__ import annotations

import torch
from torch import Tensor


def prevalence(contributions: Tensor) -> Tensor:
    """Return the share of images whose largest contribution each concept is.

    Parameters
    ----------
    contributions
        ``[N, K]``.

    Returns
    -------
    float64 ``[K]``, adding up to 1.
    """
    return torch.nn.functional.one_hot(contributions.argmax(1), contributions.shape[1]).double().mean(0)


def reliability(contributions: Tensor, correct: Tensor) -> Tensor:
    """Return the model's accuracy on the images whose largest contribution each concept is.

    Parameters
    ----------
    contributions
        ``[N, K]``.
    correct
        Whether the model is right, bool ``[N]``.

    Returns
    -------
    float64 ``[K]``; NaN for concepts that are nowhere the largest.
    """
    groups = torch.nn.functional.one_hot(contributions.argmax(1), contributions.shape[1]).double()
    return (groups * correct.double().unsqueeze(1)).sum(0) / groups.sum(0)
