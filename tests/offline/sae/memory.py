"""Vectors in memory, and worlds whose dictionary is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from offline.sae.dictionary import Dictionary


@dataclass
class MemoryVectors:
    """A tensor ``[N, C]`` as vectors to learn from."""

    rows: Tensor

    @property
    def channels(self) -> int:
        return self.rows.shape[1]

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        return self.rows.double().mean(0).numpy()

    @cached_property
    def mean_square(self) -> float:
        return float(self.rows.double().square().sum(1).mean())

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[Tensor]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for batch in order.split(batch_size)[start:]:
            yield self.rows[batch[part::parts]]


def known_world(n: int = 8192, *, atoms: int = 32, channels: int = 48, active: int = 3, seed: int = 0):
    """Return vectors that are sums of few nearly orthogonal unit atoms, and the atoms ``[K, C]``."""
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.linalg.qr(torch.randn(channels, atoms, generator=g)).Q.T
    dictionary = torch.nn.functional.normalize(dictionary + 0.05 * torch.randn(atoms, channels, generator=g), dim=1)
    chosen = torch.rand(n, atoms, generator=g).topk(active, dim=1).indices
    codes = torch.zeros(n, atoms).scatter_(1, chosen, 0.5 + torch.rand(n, active, generator=g))
    return MemoryVectors(codes @ dictionary), dictionary


def matched_cosine(found: Tensor, truth: Tensor) -> float:
    """Return the mean cosine of the true atoms with the found rows, matched one to one."""
    cosines = torch.nn.functional.normalize(found, dim=1) @ truth.T
    rows, columns = linear_sum_assignment(-cosines.numpy())
    return float(cosines[rows, columns].mean())


def dense_codes(dictionary: Dictionary, vectors: torch.Tensor) -> torch.Tensor:
    """Return the codes of vectors, every latent computed."""
    centred = vectors if dictionary.decoder_bias is None else vectors - dictionary.decoder_bias
    pre = centred @ dictionary.encoder.T
    if dictionary.encoder_bias is not None:
        pre = pre + dictionary.encoder_bias
    codes = pre.clamp_min(0)
    if dictionary.threshold is not None:
        return torch.where(pre > dictionary.threshold, codes, 0)
    best = codes.topk(dictionary.k, dim=1)
    return torch.zeros_like(codes).scatter_(1, best.indices, best.values)


def decoded(dictionary: Dictionary, codes: torch.Tensor) -> torch.Tensor:
    """Return the reconstructions of codes."""
    product = codes @ dictionary.decoder
    return product if dictionary.decoder_bias is None else product + dictionary.decoder_bias
