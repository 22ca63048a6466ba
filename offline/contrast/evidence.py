"""What each position says for the class that its image is predicted as, against all other classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from concepts.cut import Cut


class Evidence(NamedTuple):
    """Of the P positions with a place of B images."""

    vectors: Tensor
    """Activations, ``[B, P, C]``."""
    values: Tensor
    """``⟨a, ∂(log-odds)/∂a⟩``, ``[B, P]``."""

    def speaking(self, share: float) -> Tensor:
        """Return which positions speak for the class: above a share of the image's largest evidence, bool ``[B, P]``.

        None does where nothing is positive.
        """
        largest = self.values.amax(1, keepdim=True)
        return (self.values > share * largest) & (largest > 0)

    def neutral(self) -> Tensor:
        """Return which positions say nothing for the class, or speak against it, bool ``[B, P]``."""
        return self.values <= 0


def evidence(cut: Cut, a: Tensor, targets: Tensor) -> Evidence:
    """Return the evidence of positions for the log-odds of a class, ``y_t − log Σ_{k≠t} exp y_k``.

    The class's logit alone would also count what it shares with other classes. One backward pass.

    Parameters
    ----------
    a
        Activations ``[B, …]`` in the layer's layout.
    targets
        Classes t, int64 ``[B]``.
    """
    logits, gradient_of = cut.head_product(a)
    own = targets.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf).softmax(1)
    gradient = cut.positions(gradient_of((-others).scatter(1, own, 1.0)))
    positions, tokens = cut.positions(a), cut.layout.tokens
    values = (positions * gradient).sum(2)
    return Evidence(positions[:, tokens:], values[:, tokens:])
