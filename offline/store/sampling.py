"""Drawing positions of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.cut import Cut
from offline.images import lot


def attribution(cut: Cut, a: Tensor) -> NDArray[np.float64]:
    """Return how much each position counts for the predicted class, ``|Σ_channel G ⊙ a|`` (FaCT), ``[B, P]``.

    Parameters
    ----------
    cut
        A model, cut where the activations are from.
    a
        Activations as ``cut.trunk`` gives them, of B images.
    """
    logits, gradient_of = cut.head_forward(a)
    gradient = gradient_of(logits.argmax(1))
    with torch.no_grad():
        weights = (cut.positions(gradient) * cut.positions(a)).sum(2).abs()
    return np.asarray(weights.double().cpu().numpy(), np.float64)


def draw(weights: NDArray[np.float64], count: int, keys: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Draw positions of each image without replacement, with probability in proportion to the weights.

    An image draws the same alone and in any batch: its key and the seed decide. Where fewer positions than wanted weigh
    anything, the others are drawn alike.

    Parameters
    ----------
    weights
        ``[B, P]``, finite, not negative.
    count
        Positions an image, at most P.
    keys
        Of the B images.
    seed
        Another seed is another draw.

    Returns
    -------
    positions
        ``[B, count]``, ascending.
    """
    rows = [np.random.default_rng(lot(key, f"positions {seed}")).exponential(size=weights.shape[1]) for key in keys]
    # The smallest of exponential variables with these rates come in the order of such a draw (Efraimidis and Spirakis).
    waits = np.stack(rows)
    with np.errstate(divide="ignore", over="ignore"):
        times = np.where(weights > 0, waits / weights, np.inf)
    first = np.lexsort((waits, times))[:, :count]
    return np.sort(first, axis=1)
