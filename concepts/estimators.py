"""Contributions of concepts to a logit (methods section 0), by the three estimators."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.codec import Codec, Codes
from concepts.cut import Cut

INTEGRATION_TOLERANCE = 0.01
"""Relative integration error at which no further head passes are made."""

_INTEGRATION_STEPS = (4, 8, 16, 32, 64, 128)
"""Halves of the numbers of intervals that are tried."""

_ABLATION_ROWS = 256


class Contributions(NamedTuple):
    """What each concept, and what the bank leaves out, contributes to the target's logit."""

    total: Tensor
    """``[B, S]``."""
    maps: Codes | None
    """By position, summing to ``total``; None where the estimator says nothing about positions."""
    unexplained: Tensor | None
    """``[B]``; None for banks that do not reconstruct."""
    integration_error: Tensor | None = None
    """``[B]``."""


def from_gradient(codec: Codec, codes: Codes, gradient: Tensor, remainder: Tensor | None) -> Contributions:
    """Return ``m_k = ⟨G, comp_k⟩`` and its sums; all tensors ``[B, P, C]``, remainder ``a − â`` or None."""
    maps = codec.contributions(codes, gradient)
    unexplained = None if remainder is None else (gradient * remainder).sum((1, 2))
    return Contributions(maps.total(), maps, unexplained)


def integrated(
    cut: Cut, codec: Codec, codes: Codes, a: Tensor, reconstruction: Tensor, targets: Tensor, logits: Tensor
) -> Contributions:
    """Integrate the gradient along the codes: ``a_s = a − (1 − s)·â`` for s from 0 to 1.

    The contributions add up to ``h(a)_t − h(a − â)_t`` for any head, up to the integration error; Simpson's intervals
    are halved until it is under 1 % or 256 are used, for each image by itself. No head pass is made twice.

    Parameters
    ----------
    a, reconstruction
        ``[B, …]`` in the layer's layout.
    targets
        int64 ``[B]``.
    logits
        ``[B, n_classes]``, of ``a``.
    """
    with torch.no_grad():
        without = _at(cut.head(a - reconstruction), targets)
    difference = _at(logits, targets) - without
    rows = torch.arange(len(a), device=a.device)

    def mean_at(nodes: NDArray[np.float64]) -> Tensor:
        return _mean_gradient(cut, a[rows], reconstruction[rows], targets[rows], nodes)

    first = _INTEGRATION_STEPS[0]
    trapezoid = (mean_at(np.array([0.0, 1.0])) + (first - 1) * mean_at(np.arange(1, first) / first)) / first
    gradient = torch.empty_like(a)
    for steps in _INTEGRATION_STEPS:
        middle = mean_at((np.arange(steps) + 0.5) / steps)
        gradient[rows] = (trapezoid[rows] + 2 * middle) / 3  # Simpson's rule from trapezoids and midpoints
        trapezoid[rows] = (trapezoid[rows] + middle) / 2
        maps = codec.contributions(codes, cut.positions(gradient))
        error = (maps.total().sum(1) - difference).abs() / difference.abs().clamp_min(1e-6)
        # An image that is done keeps its gradient: its answer does not depend on how hard its neighbours are.
        rows = (error >= INTEGRATION_TOLERANCE).nonzero().squeeze(1)
        if not len(rows):
            break
    # What is left of the logit when all components are gone belongs to the remainder and the constant.
    unexplained = without - cut.facts.constant[targets]
    return Contributions(maps.total(), maps, unexplained, error)


def ablation(
    cut: Cut, codec: Codec, codes: Codes, a: Tensor, remainder: Tensor | None, targets: Tensor, logits: Tensor
) -> Contributions:
    """Return ``h(a)_t − h(a − comp_k)_t`` for every concept with a code, in batched head passes.

    Parameters
    ----------
    a
        ``[B, …]`` in the layer's layout.
    remainder
        ``a − â`` in the same layout, or None.
    """
    present = _at(logits, targets)
    rows, slots = codes.active().nonzero(as_tuple=True)
    total = codes.values.new_zeros(codes.ids.shape)
    for chunk in range(0, len(rows), _ABLATION_ROWS):
        row, slot = rows[chunk : chunk + _ABLATION_ROWS], slots[chunk : chunk + _ABLATION_ROWS]
        weights = torch.nn.functional.one_hot(slot, codes.ids.shape[1]).to(codes.values.dtype)
        with torch.no_grad():
            component = cut.unpositions(codec.combine(codes.rows(row), weights)).to(a.dtype)
            ablated = cut.head(a[row] - component)
        total[row, slot] = present[row] - _at(ablated, targets[row])
    unexplained = None
    if remainder is not None:
        with torch.no_grad():
            unexplained = present - _at(cut.head(a - remainder), targets)
    return Contributions(total, None, unexplained)


def _mean_gradient(cut: Cut, a: Tensor, reconstruction: Tensor, targets: Tensor, nodes: NDArray[np.float64]) -> Tensor:
    """Return the mean of the gradients at ``a − (1 − s)·â`` over the nodes s."""
    total = torch.zeros_like(a)
    for node in nodes.tolist():
        total += cut.head_gradient(a - (1.0 - node) * reconstruction, targets)[1]
    return total / len(nodes)


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets.view(-1, 1)).squeeze(1)
