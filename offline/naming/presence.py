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
    return _spread(codes, codes.total(), concepts).cpu()


@torch.no_grad()
def of_windows(codec: Codec, windows: Tensor, concepts: int, device: torch.device) -> Tensor:
    """Return the largest codes over windows, ``[N, V, C]`` to ``[N, K]``, where concepts belong to classes.

    Every image is coded for every class: windows in place of positions, which are many times as many.
    """
    found = torch.zeros(len(windows), concepts)
    rows = max(_WINDOWS // windows.shape[1], 1)
    for first in range(0, len(windows), rows):
        some = windows[first : first + rows].to(device)
        for owner in sorted(codec.classes() or {0}):
            codes = codec.encode(some, torch.full((len(some),), owner, device=device))
            found[first : first + rows] += _spread(codes, codes.peak(), concepts).cpu()
    return found


def _spread(codes: Codes, values: Tensor, concepts: int) -> Tensor:
    """Give every concept of a bank its value, ``[B, S]`` to ``[B, K]``; 0 where an image does not have it."""
    nothing = values.new_zeros(len(values), concepts + 1)
    return nothing.scatter_(1, codes.ids.masked_fill(codes.ids == EMPTY, concepts), values)[:, :concepts]
