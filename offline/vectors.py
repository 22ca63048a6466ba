"""Activation vectors to learn from, wherever they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Vectors(Protocol):
    """N vectors of C channels, in an order that only a seed and the epoch decide."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Of the vectors, ``[C]``."""

    @property
    def mean_square(self) -> float:
        """Mean over the vectors of ‖a‖²."""

    def __len__(self) -> int:
        """Return N."""

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[Tensor]:
        """Yield every vector once, float32 ``[n, C]`` in the CPU's memory; the last batch may be smaller.

        Parameters
        ----------
        batch_size
            Vectors a batch, of all parts together.
        seed, epoch
            They decide the order.
        start
            Batch to begin with; those before it are not read.
        part, parts
            This reader is given the rows ``part::parts`` of each batch, as one of several devices.
        """
