"""Where factorisations begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Start = Literal["nndsvda", "random"]

_SPARE = 10
"""Directions beyond the rank that subspace iteration carries along."""
_POWERS = 4


class Factors(NamedTuple):
    """Where P problems are, each in S places."""

    U: Tensor
    """Transposed, ``[P · S, K, N]``, so that a component is contiguous."""
    W: Tensor
    """``[P · S, K, C]``."""


def random(batch: Tensor, lengths: Sequence[int], rank: int, seeds: Sequence[Sequence[int]]) -> Factors:
    """Draw uniform numbers on the scale of the data.

    Parameters
    ----------
    batch
        ``[P, N, C]``, of which the rows after the first ``lengths[p]`` are padding.
    seeds
        ``[P][S]``: of every place. The numbers do not depend on what else is in the batch.
    """
    scale = 2 * (_mean(batch, lengths) / rank).sqrt()
    codes, dictionaries = [], []
    for length, own in zip(lengths, seeds, strict=True):
        for seed in own:
            # Drawn on the CPU in one type, so that the same seed gives the same numbers everywhere.
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.rand(rank, length, generator=generator)
            codes.append(functional.pad(drawn, (0, batch.shape[1] - length)))
            dictionaries.append(torch.rand(rank, batch.shape[2], generator=generator))
    scale = scale.repeat_interleave(len(seeds[0]), dim=0)
    return Factors(torch.stack(codes).to(batch) * scale, torch.stack(dictionaries).to(batch) * scale)


def nndsvda(batch: Tensor, lengths: Sequence[int], rank: int, seed: int) -> Factors:
    """Start from singular vectors (Boutsidis & Gallopoulos 2008), zeros filled with the mean.

    Each singular pair is split into its positive and its negative part; the heavier of the two becomes a component.
    The parameters are those of ``random``; the seed is that of the subspace iteration.
    """
    u, s, v = _leading_svd(batch, rank, seed)
    u_plus, u_minus, v_plus, v_minus = u.clamp_min(0), (-u).clamp_min(0), v.clamp_min(0), (-v).clamp_min(0)
    weight_plus = u_plus.norm(dim=2, keepdim=True) * v_plus.norm(dim=2, keepdim=True)
    weight_minus = u_minus.norm(dim=2, keepdim=True) * v_minus.norm(dim=2, keepdim=True)
    plus = weight_plus >= weight_minus
    u_part, v_part = torch.where(plus, u_plus, u_minus), torch.where(plus, v_plus, v_minus)
    strength = (s * torch.maximum(weight_plus, weight_minus)).sqrt()
    codes, dictionary = strength * functional.normalize(u_part, dim=2), strength * functional.normalize(v_part, dim=2)
    # Variant "a": a zero would be slow to leave.
    fill = _mean(batch, lengths)
    there = torch.arange(batch.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    codes = torch.where(codes > 0, codes, fill) * there.unsqueeze(1).to(batch.device)
    return Factors(codes, torch.where(dictionary > 0, dictionary, fill))


def _mean(batch: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the mean entry of each matrix without its padding, ``[P, 1, 1]``."""
    entries = torch.tensor(lengths, device=batch.device) * batch.shape[2]
    return (batch.sum(dim=(1, 2)) / entries)[:, None, None]


def _leading_svd(batch: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading singular triplets by subspace iteration (Halko et al. 2011, algorithm 4.4): Uᵀ, S, Vᵀ.

    Bases are made orthonormal on the side of the channels alone, which is the short one.
    """
    channels = batch.shape[2]
    width = min(batch.shape[1], channels, rank + _SPARE)
    probe = torch.randn(channels, width, generator=torch.Generator().manual_seed(seed)).to(batch)
    basis = torch.linalg.qr(batch.mT @ (batch @ probe)).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(batch.mT @ (batch @ basis)).Q
    image = batch @ basis
    squares, turn = torch.linalg.eigh(image.mT @ image)
    turn, s = turn.flip(2)[..., :rank], squares.flip(1)[:, :rank].clamp_min(0).sqrt().unsqueeze(2)
    return functional.normalize((image @ turn).mT, dim=2), s, (basis @ turn).mT
