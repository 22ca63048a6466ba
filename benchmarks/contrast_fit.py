"""Fitting planes between all pairs of 1,000 classes: 512 dimensions, 200 vectors a class, one thread each.

Against 100 steps of SGD for every ordered pair, one after another (Herdt et al.'s code), extrapolated from 200 pairs.
The vectors are drawn from normal distributions with one covariance, in which every direction has another variance; the
accuracy of both on fresh vectors is noted beside the times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import measure
from concepts.contrast.planes import Planes
from concepts.preprocessing import Box
from offline.contrast.evidence import Evidence
from offline.contrast.solving import solve
from offline.contrast.statistics import Statistics
from offline.images import ImageBatch

CLASSES, CHANNELS, VECTORS = 1000, 512, 200
POSITIONS = 20
"""Of an image: the vectors come as those of ten images a class."""
BATCH = 128
STEPS, LEARNING_RATE = 100, 0.01
PAIRS = 200
SHRINKAGE = 0.5
SPREAD = 0.25
"""Standard deviation of the class means in each direction, relative to that of the vectors around them."""


def main() -> None:
    """Measure both, in turn."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 0.5, CHANNELS)
    means = SPREAD * scales * torch.randn(CLASSES, CHANNELS, generator=generator)
    train, fresh = (
        means.unsqueeze(1) + scales * torch.randn(CLASSES, VECTORS, CHANNELS, generator=generator) for _ in range(2)
    )
    pairs = [torch.randperm(CLASSES, generator=generator)[:2].tolist() for _ in range(PAIRS)]
    work: dict[str, Callable[[], object]] = {
        "planes": partial(planes_of, train),
        "separators": partial(separators, train, pairs),
    }
    seconds = measure.interleaved(work, repeats=5)
    ordered = CLASSES * (CLASSES - 1)
    row = measure.row(
        f"contrast_fit: {CLASSES} classes, {CHANNELS} dimensions, {VECTORS} vectors a class, float64 sums",
        seconds["planes"],
        "s",
        higher_is_better=False,
        baseline=f"{STEPS} SGD steps per ordered pair, one by one, from {PAIRS} of {ordered}",
        baseline_value=seconds["separators"] * ordered / PAIRS,
        target=1000.0,
    )
    planes, normals = planes_of(train), separators(train, pairs)
    stored = sum(tensor.nbytes for tensor in (planes.directions, planes.products.float(), planes.centre))
    measure.publish(
        "contrast_fit",
        [row],
        fresh_accuracy={
            "planes": accuracy(fresh, pairs, closed(planes, pairs)),
            "SGD": accuracy(fresh, pairs, normals),
        },
        stored_bytes={"directions": stored, "a normal for each unordered pair": ordered // 2 * (CHANNELS + 1) * 4},
    )


def planes_of(vectors: Tensor) -> Planes:
    """Take the vectors ``[n, N, C]`` in as they would come from images, and solve for all planes."""
    found = Statistics.empty(len(vectors), vectors.shape[2], vectors.device)
    images = vectors.unflatten(1, (-1, POSITIONS)).flatten(0, 1)
    owners = torch.arange(len(vectors)).repeat_interleave(len(images) // len(vectors))
    nothing = np.zeros((1, 1, 1, 3), np.uint8)
    for rows in torch.arange(len(images)).split(BATCH):
        keys = [str(row) for row in rows.tolist()]
        batch = ImageBatch(keys, nothing.repeat(len(rows), 0), [Box(0, 0, 1, 1)] * len(rows), keys)
        speaking = Evidence(images[rows], torch.ones(len(rows), POSITIONS))
        found.add(batch, speaking, owners[rows], (owners[rows] + 1) % len(vectors), 0.5)
    return solve(found, 1, SHRINKAGE)


def separators(vectors: Sequence[Tensor] | Tensor, pairs: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Fit a separator for each pair by gradient descent, as the published code does: normals and offsets."""
    found = []
    for first, second in pairs:
        rows = torch.cat([vectors[first], vectors[second]])
        labels = torch.cat([torch.ones(len(vectors[first])), torch.zeros(len(vectors[second]))])
        linear = nn.Linear(rows.shape[1], 1)
        optimizer = torch.optim.SGD(linear.parameters(), LEARNING_RATE)
        for _ in range(STEPS):
            loss = functional.binary_cross_entropy_with_logits(linear(rows).squeeze(1), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append((linear.weight[0].detach(), linear.bias[0].detach()))
    return found


def closed(planes: Planes, pairs: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Return the normals and offsets of some pairs."""
    first, second = torch.tensor(pairs).unbind(1)
    return list(zip(*planes.between(first, second), strict=True))


def accuracy(vectors: Tensor, pairs: Sequence[Sequence[int]], planes: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the share of vectors on their own side, mean over pairs and sides."""
    right = [
        ((sign * (vectors[side] @ normal + offset)) > 0).double().mean()
        for pair, (normal, offset) in zip(pairs, planes, strict=True)
        for side, sign in zip(pair, (1, -1), strict=True)
    ]
    return float(torch.stack(right).mean())


if __name__ == "__main__":
    main()
