"""How much of each concept is in images: the largest code over the positions or windows of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from concepts.codec import EMPTY, Codec, Codes

_WINDOWS = 2**16
"""Windows that are coded at a time."""


@torch.no_grad()
def of_positions(codec: Codec, positions: Tensor, concepts: int) -> Tensor:
    """Return the sums of codes over positions, ``[B, P, C]`` to ``[B, K]``, where concepts belong to no class."""
    nobody = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
    codes = codec.encode(positions, nobody)
    found = torch.zeros(len(positions), concepts + 1)
    _put(found, codes, codes.total())
    return found[:, :concepts]


@torch.no_grad()
def of_windows(codec: Codec, windows: Tensor, concepts: int, device: torch.device) -> Tensor:
    """Return the largest codes over windows, ``[N, V, C]`` to ``[N, K]``, where concepts belong to classes.

    Every image is coded for every class: windows in place of positions, which are many times as many.
    """
    found = torch.zeros(len(windows), concepts + 1)
    rows = max(_WINDOWS // windows.shape[1], 1)
    for first in range(0, len(windows), rows):
        some = windows[first : first + rows].to(device)
        for owner in sorted(codec.classes() or {0}):
            codes = codec.encode(some, torch.full((len(some),), owner, device=device))
            _put(found[first : first + rows], codes, codes.peak())
    return found[:, :concepts]


def _put(found: Tensor, codes: Codes, values: Tensor) -> None:
    """Write the values of concepts, ``[B, S]``, where they belong in ``[B, K + 1]``; the last column takes the rest."""
    found.scatter_(1, codes.ids.masked_fill(codes.ids == EMPTY, found.shape[1] - 1).cpu(), values.float().cpu())
