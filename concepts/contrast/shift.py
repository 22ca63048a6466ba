"""At which shift along a normal an image turns into another class: ``a' = ReLU(a − s·n̂)`` (Herdt et al., 2025)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from concepts.cut import Cut

LARGEST = 8.0
"""Largest shift that is tried, in units of the layer's mean activation norm."""

_COARSE = (0.0, *(LARGEST * 2.0**-k for k in reversed(range(8))))
"""Shifts that every image is tried at: zero, and doubled from 1/16."""

_ROUNDS, _POINTS = 2, 5
"""How often, and by how many points, the interval in which an image turns is divided."""

_ELEMENTS = 2**23
"""Most numbers of shifted activations held at a time: 32 MiB in float32."""


class Shifted(NamedTuple):
    """What became of R images, at T shifts each."""

    flip: Tensor
    """Smallest shift found at which the other class has a probability above 0.5, float64 ``[R]``; infinity where none
    has."""
    shifts: Tensor
    """That were tried, ascending, float64 ``[R, T]``; those of an image end with NaN where it took fewer."""
    probabilities: Tensor
    """Of target and other class there, float64 ``[R, T, 2]``."""


@torch.no_grad()
def search(cut: Cut, a: Tensor, normals: Tensor, targets: Tensor, others: Tensor, unit: float) -> Shifted:
    """Shift all positions, class tokens too, away from the target's side until the other class has won.

    The shifts double from 1/16 to 8 units; then the first interval at whose end the other class has won is divided,
    twice, in six. So a flip is known to within 3 %, or 1/500 of a unit, if it is the first: what turns back in between
    is not seen.

    Parameters
    ----------
    cut
        Where.
    a
        Activations ``[R, …]`` in the layer's layout.
    normals
        Unit normals towards the target, ``[R, C]``.
    targets, others
        Classes, int64 ``[R]``.
    unit
        Mean norm of the layer's activations: shifts are in its multiples.
    """
    coarse = torch.tensor(_COARSE, dtype=torch.float64, device=a.device).expand(len(a), -1)
    shifts, found = coarse, _probabilities(cut, a, normals, targets, others, coarse * unit)
    flip = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
    for _ in range(_ROUNDS):
        turned = found[..., 1] > 0.5
        first = turned.long().argmax(1)
        rows = (turned.any(1) & (first > 0)).nonzero().squeeze(1)
        if not len(rows):
            break
        high = shifts[rows].gather(1, first[rows].unsqueeze(1))
        low = shifts[rows].gather(1, first[rows].unsqueeze(1) - 1)
        inner = low + (high - low) * torch.arange(1, _POINTS + 1, device=a.device) / (_POINTS + 1)
        more = _probabilities(cut, a[rows], normals[rows], targets[rows], others[rows], inner * unit)
        shifts, found = _merged(shifts, found, rows, inner, more)
    turned = found[..., 1] > 0.5
    rows = turned.any(1).nonzero().squeeze(1)
    flip[rows] = shifts[rows].gather(1, turned[rows].long().argmax(1, keepdim=True)).squeeze(1)
    return Shifted(flip, shifts, found)


def _merged(shifts: Tensor, found: Tensor, rows: Tensor, inner: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Sort new points of some rows in; the others get NaN at the end."""
    padding = shifts.new_full((len(shifts), inner.shape[1]), torch.nan)
    padding[rows] = inner
    values = found.new_full((len(found), inner.shape[1], 2), torch.nan)
    values[rows] = more
    shifts, order = torch.cat([shifts, padding], dim=1).sort(dim=1, stable=True)  # NaN comes last
    found = torch.cat([found, values], dim=1).gather(1, order.unsqueeze(2).expand(-1, -1, 2))
    return shifts, found


def _probabilities(cut: Cut, a: Tensor, normals: Tensor, targets: Tensor, others: Tensor, shifts: Tensor) -> Tensor:
    """Return the probabilities of both classes at shifts ``[R, T]`` in the activation's own units, ``[R, T, 2]``.

    They are zero where the model answers with NaN or infinity, as it may where a shift leaves nothing.
    """
    size = max(_ELEMENTS // max(shifts.shape[1] * a[0].numel(), 1), 1)
    found = []
    for rows in torch.arange(len(a), device=a.device).split(size):
        logits = cut.head(shifted(cut, a[rows], normals[rows], shifts[rows]))
        probability = logits.double().softmax(1).nan_to_num(0.0).unflatten(0, (len(rows), -1))
        classes = torch.stack([targets[rows], others[rows]], dim=1).unsqueeze(1)
        found.append(probability.gather(2, classes.expand(-1, shifts.shape[1], -1)))
    return torch.cat(found)


def shifted(cut: Cut, a: Tensor, normals: Tensor, shifts: Tensor) -> Tensor:
    """Return ``a' = ReLU(a − s·n̂)`` at all positions, without ReLU where the layer has none.

    Parameters
    ----------
    a
        ``[R, …]`` in the layer's layout.
    normals
        ``[R, C]``.
    shifts
        Several of each image, in the activation's own units, ``[R, T]``.

    Returns
    -------
    ``[R · T, …]``, image by image.
    """
    moved = cut.positions(a).unsqueeze(1) - (shifts.to(a.dtype).unsqueeze(2) * normals.unsqueeze(1)).unsqueeze(2)
    moved = moved.clamp_min_(0) if cut.non_negative else moved
    return cut.unpositions(moved.flatten(0, 1))
