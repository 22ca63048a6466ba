"""The representations of many images, and which of their features are highly active (FALCON, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from concepts.kinds.subspace import representations
from concepts.preprocessing import Box
from offline import passes
from offline.config import TrainingConfig
from offline.images import shuffled
from offline.task import Task


@dataclass(frozen=True, eq=False)
class Probe:
    """What is kept of N images."""

    keys: list[str]
    boxes: list[Box]
    """Where in each image the model's view lies."""
    digests: list[str]
    """sha256 of each file."""
    representations: Tensor
    """float32 ``[N, C]``, rows of norm 1; see ``concepts.kinds.subspace``."""
    lengths: Tensor
    """Norms before that, ``[N]``."""

    @cached_property
    def mean(self) -> float:
        """Of all entries of the representations."""
        return float(self.representations.mean(dtype=torch.float64))

    @cached_property
    def std(self) -> float:
        """Standard deviation of all entries of the representations."""
        norm = torch.linalg.vector_norm(self.representations, dtype=torch.float64)
        return float((norm.square() / self.representations.numel() - self.mean**2).clamp_min(0).sqrt())

    def threshold(self, deviations: float) -> float:
        """Return from where on an entry is so many standard deviations above the mean; a float32."""
        return float(np.float32(self.mean + deviations * self.std))

    def highly_active(self, threshold: float) -> csr_array:
        """Return which entries reach a threshold, 0 or 1, ``[N, C]``."""
        rows, columns = (self.representations >= threshold).nonzero(as_tuple=True)
        ones = np.ones(len(rows), np.int32)
        return csr_array((ones, (rows.numpy(), columns.numpy())), shape=tuple(self.representations.shape))

    def strengths(self, images: Tensor, features: Tensor) -> Tensor:
        """Return a group's mean code in some images, int64 ``[n]``: the mean of its features, ``[n]``."""
        return self.representations[images][:, features].mean(1) * self.lengths[images]


def probe(task: Task[TrainingConfig], most: int) -> Probe:
    """Look at training images once: at all of them, or at those that are predicted as a class that is wanted.

    Parameters
    ----------
    task
        The model, cut where the features are.
    most
        Images to look at.
    """
    keys = shuffled(task.training.keys, task.config.seed)[:most]
    wanted = torch.tensor(task.classes(), device=task.model.device)
    kept = Probe([], [], [], torch.zeros(0, task.cut.layout.channels), torch.zeros(0))
    rows, lengths, done = [kept.representations], [kept.lengths], 0
    for batch, a in passes.activations(task.model, task.cut, task.stream(task.training, keys)):
        with torch.no_grad():
            if task.config.classes:
                chosen = torch.isin(task.cut.head(a).argmax(1), wanted)
                a, batch = a[chosen], batch.rows(chosen.nonzero().squeeze(1).tolist())
            positions = task.cut.positions(a)
            rows.append(representations(positions).cpu())
            lengths.append(positions.mean(1, dtype=torch.float64).norm(dim=1).float().cpu())
        kept.keys.extend(batch.keys)
        kept.boxes.extend(batch.boxes)
        kept.digests.extend(batch.digests)
        done += len(batch.keys)
        task.report("looking at images", min(done, len(keys) - 1), len(keys))
    task.report("looking at images", len(keys), len(keys))
    return Probe(kept.keys, kept.boxes, kept.digests, torch.cat(rows), torch.cat(lengths))
