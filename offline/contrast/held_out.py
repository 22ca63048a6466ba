"""On which side of the planes held-out positions lie, and how far from them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from concepts.contrast.planes import Planes
from concepts.errors import InvalidInput
from offline import passes
from offline.contrast.config import ContrastConfig
from offline.contrast.evidence import evidence
from offline.images import shuffled
from offline.task import Task

_ELEMENTS = 2**23
"""Most distances that are held at a time: 64 MiB in float64."""


@dataclass(frozen=True)
class Sides:
    """What held-out images say of all planes between n classes."""

    accuracy: Tensor
    """Share of positions that speak for either class on its side, mean of both classes, float32 ``[n, n]``; NaN where
    there is no plane, or no position of one class."""
    margin: Tensor
    """Their mean distance, positive on their own side, in units of the mean activation norm; likewise."""
    members: dict[int, list[str]]
    """Keys of the images that are predicted as each class."""
    digests: dict[str, str]
    """sha256 of each of these images."""


class _Tally:
    """Sums over the positions that speak for each class i, of what they are to the planes between i and each j."""

    def __init__(self, planes: Planes) -> None:
        self._planes = planes
        zeros = torch.zeros_like(planes.products, dtype=torch.float64)
        self.count, self.right, self.distance = zeros[0].clone(), zeros, zeros.clone()

    def add(self, vectors: Tensor, targets: Tensor) -> None:
        """Take in vectors ``[N, C]``, each of which speaks for its class, int64 ``[N]``."""
        for some in torch.arange(len(vectors), device=vectors.device).split(max(_ELEMENTS // len(self.count), 1)):
            projected = self._planes.projected(vectors[some])
            for target in targets[some].unique().tolist():
                distances = self._planes.distances(projected[targets[some] == target], target)
                self.count[target] += len(distances)
                self.right[target] += (distances > 0).sum(0)
                self.distance[target] += distances.sum(0)

    def mean(self, total: Tensor) -> Tensor:
        """Return the mean of both classes' means, float32 ``[n, n]``; NaN where there is none."""
        own = total / self.count.unsqueeze(1)
        both = (own + own.T) / 2
        return both.masked_fill(~self._planes.weights.exists, torch.nan).float().cpu()


def measure(task: Task[ContrastConfig], planes: Planes, unit: float, learned: Set[str] = frozenset()) -> Sides:
    """Measure all planes in one pass over held-out images.

    Parameters
    ----------
    task
        Whose held-out images serve.
    planes
        On the model's device.
    unit
        Mean norm of the layer's activations.
    learned
        Digests of the training images: those that are there again are left out.

    Raises
    ------
    InvalidInput
        If no held-out image is predicted as a class that has planes.
    """
    config, cut = task.config, task.cut
    known = planes.known.nonzero().squeeze(1).tolist()
    left, tally = dict.fromkeys(known, config.held_out_per_class), _Tally(planes)
    members: dict[int, list[str]] = {}
    digests: dict[str, str] = {}
    keys, done = shuffled(task.held_out.keys, config.seed), 0
    for batch, a in passes.activations(task.model, cut, task.stream(task.held_out, keys)):
        with torch.no_grad():
            logits = cut.head(a)
        owners = passes.predicted(batch, logits, task.skipped_images)
        for row, digest in enumerate(batch.digests):
            if digest in learned:
                owners[row] = -1  # no class
                task.skipped_images[batch.keys[row]] = "It is a training image, and cannot be held out."
        rows = passes.take(owners, left)
        if rows:
            targets = logits[rows].argmax(1)
            found = evidence(cut, a[rows], targets)
            speaking = found.speaking(config.evidence)
            tally.add(found.vectors[speaking], targets.repeat_interleave(speaking.sum(1)))
            for row, target in zip(rows, targets.tolist(), strict=True):
                members.setdefault(target, []).append(batch.keys[row])
                digests[batch.keys[row]] = batch.digests[row]
        done += len(batch.keys)
        task.report("measuring planes", min(done, len(keys) - 1), len(keys))
        if not any(left.values()):
            break
    task.report("measuring planes", len(keys), len(keys))
    if not members:
        raise InvalidInput(
            "no held-out image that is not a training image is predicted as a class that has planes, so that nothing "
            "can be measured: give other held-out images, or leave out --classes"
        )
    return Sides(tally.mean(tally.right), tally.mean(tally.distance / unit), members, digests)
