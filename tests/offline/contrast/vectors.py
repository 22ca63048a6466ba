"""Vectors of known classes, and the sums over them that planes are solved from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from offline.contrast.evidence import Evidence
from offline.contrast.statistics import Statistics
from offline.images import ImageBatch

Rows = NDArray[np.float64]


def drawn(
    classes: int, channels: int, per_class: int = 40, neutral: int = 100, seed: int = 0
) -> tuple[list[Rows], Rows]:
    """Return vectors of each class ``[N, C]``, and neutral ones: correlated, each class with a mean of its own."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(channels, channels))

    def rows(count: int, mean: Rows) -> Rows:
        return generator.normal(size=(count, channels)) @ mixing + mean

    own = [rows(per_class + c, 4 * generator.normal(size=channels)) for c in range(classes)]
    return own, rows(neutral, np.ones(channels))


def statistics(own: Sequence[Rows], neutral: Rows) -> Statistics:
    """Return the sums over such vectors; every vector of a class is an image, and neutral ones are of the first."""
    channels = neutral.shape[1] if neutral.size else own[0].shape[1]
    found = Statistics.empty(len(own), channels, torch.device("cpu"))
    for target, rows in enumerate(own):
        for place, row in enumerate(rows):
            vectors, values = [row], [1.0]
            if target == place == 0:
                vectors, values = [row, *neutral], [1.0] + [-1.0] * len(neutral)
            key = f"{target}/{place}"
            batch = ImageBatch([key], np.zeros((1, 1, 1, 3), np.uint8), [], [key])
            evidence = Evidence(torch.tensor(np.array([vectors])), torch.tensor([values]))
            found.add(batch, evidence, torch.tensor([target]), torch.tensor([(target + 1) % len(own)]), 0.5)
    return found
