"""What planes are solved from: sums over the vectors of all classes, in one pass over training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from offline import passes
from offline.contrast.config import ContrastConfig
from offline.contrast.evidence import Evidence, evidence
from offline.images import ImageBatch, shuffled
from offline.task import Task

_ELEMENTS = 2**24
"""Most numbers of activations that are held in float64 at a time: 128 MiB."""


@dataclass
class Statistics:
    """Sums over vectors: of n classes, and neutral ones; C channels. All float64 that is not said to be else."""

    counts: Tensor
    """Vectors of each class, ``[n]``."""
    sums: Tensor
    """Of the vectors of each class, ``[n, C]``."""
    neutral_count: Tensor
    neutral_sum: Tensor
    """``[C]``."""
    squares: Tensor
    """``Σ a aᵀ`` over all of these vectors, ``[C, C]``."""
    norms: Tensor
    """Sum of the norms at all positions, and how many there are, ``[2]``."""
    runners_up: Tensor
    """How often the second most probable class was j where i was the first, int64 ``[n, n]``."""
    predicted: Tensor
    """Images of each class that were looked at, int64 ``[n]``."""
    signed: bool = False
    """Whether an activation was negative."""
    keys: dict[int, list[str]] = field(default_factory=dict)
    """Of the images of each class that gave vectors."""
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, classes: int, channels: int, device: torch.device) -> Statistics:
        """Return sums over nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            counts=zeros(classes),
            sums=zeros(classes, channels),
            neutral_count=zeros(),
            neutral_sum=zeros(channels),
            squares=zeros(channels, channels),
            norms=zeros(2),
            runners_up=torch.zeros(classes, classes, dtype=torch.int64, device=device),
            predicted=torch.zeros(classes, dtype=torch.int64, device=device),
        )

    @property
    def images(self) -> Tensor:
        """Images of each class that gave vectors, int64 ``[n]``."""
        return torch.tensor([len(self.keys.get(target, ())) for target in range(len(self.counts))])

    @property
    def unit(self) -> float:
        """Mean norm of the activations."""
        return float(self.norms[0] / self.norms[1])

    def add(self, batch: ImageBatch, found: Evidence, targets: Tensor, runners_up: Tensor, share: float) -> None:
        """Take in images; those that nothing speaks for in give nothing.

        Parameters
        ----------
        batch, found, targets
            The images, the evidence of their positions, and their classes, int64 ``[B]``.
        runners_up
            Their second most probable classes, int64 ``[B]``.
        share
            As of ``Evidence.speaking``.
        """
        self.predicted += torch.bincount(targets, minlength=len(self.predicted))
        speaking = found.speaking(share)
        rows = speaking.any(1).nonzero().squeeze(1)
        size = max(_ELEMENTS // found.vectors[0].numel(), 1)
        for some in rows.split(size):
            self._sum(found.vectors[some].double(), speaking[some], found.neutral()[some], targets[some])
        pairs = targets[rows] * len(self.counts) + runners_up[rows]
        self.runners_up += torch.bincount(pairs, minlength=self.runners_up.numel()).view_as(self.runners_up)
        self.signed |= bool((found.vectors < 0).any())
        for row, target in zip(rows.tolist(), targets[rows].tolist(), strict=True):
            self.keys.setdefault(target, []).append(batch.keys[row])
            self.digests[batch.keys[row]] = batch.digests[row]

    def _sum(self, vectors: Tensor, speaking: Tensor, neutral: Tensor, targets: Tensor) -> None:
        # Products with zeros and ones, and not additions at indices: these have no fixed order on GPUs.
        membership = functional.one_hot(targets, len(self.counts)).double().T
        own = (speaking.double().unsqueeze(1) @ vectors).squeeze(1)
        self.sums += membership @ own
        self.counts += membership @ speaking.sum(1).double()
        self.neutral_sum += (neutral.double().unsqueeze(1) @ vectors).sum((0, 1))
        self.neutral_count += neutral.sum()
        used = vectors[speaking | neutral]
        self.squares += used.T @ used
        norms = torch.linalg.vector_norm(vectors, dim=2)
        self.norms += torch.stack([norms.sum(), norms.new_tensor(norms.numel())])


def gather(task: Task[ContrastConfig], wanted: Sequence[int]) -> Statistics:
    """Sum over training images in an order that only the seed decides, until all classes have had their share.

    Parameters
    ----------
    task
        The model, cut, and its images.
    wanted
        Classes whose images to take; runners-up are of these, too.
    """
    config, cut = task.config, task.cut
    found = Statistics.empty(cut.n_classes, cut.layout.channels, task.model.device)
    left = dict.fromkeys(wanted, config.images_per_class)
    unwanted = torch.ones(cut.n_classes, dtype=torch.bool, device=task.model.device)
    unwanted[list(wanted)] = False
    keys, done = shuffled(task.training.keys, config.seed), 0
    for batch, a in passes.activations(task.model, cut, task.stream(task.training, keys)):
        with torch.no_grad():
            logits = cut.head(a)
        rows = passes.take(passes.predicted(batch, logits, task.skipped_images), left)
        if rows:
            targets = logits[rows].argmax(1)
            others = logits[rows].masked_fill(unwanted, -torch.inf).scatter(1, targets.unsqueeze(1), -torch.inf)
            spoken = evidence(cut, a[rows], targets)
            found.add(batch.rows(rows), spoken, targets, others.argmax(1), config.evidence)
        done += len(batch.keys)
        task.report("gathering vectors", min(done, len(keys) - 1), len(keys))
        if not any(left.values()):
            break
    task.report("gathering vectors", len(keys), len(keys))
    return found
