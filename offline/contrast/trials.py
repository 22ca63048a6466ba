"""Whether planes decide: images of one class are shifted towards another, and lose the positions that speak for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from concepts.contrast import shift
from concepts.contrast.planes import Planes
from offline import passes
from offline.contrast.config import ContrastConfig
from offline.task import Task

STEPS = 10
"""Of the masking test: so many tenths of the positions are taken away."""

_ELEMENTS = 2**24
"""Most numbers of activations that are held at a time, those of one image at least: 64 MiB in float32."""


@dataclass(frozen=True)
class Curves:
    """Mean probabilities of both classes with 0, 1/``STEPS``, … 1 of the positions set to zero; means over pairs."""

    target: tuple[float, ...]
    """Of i, the positions that lie farthest on its side first."""
    other: tuple[float, ...]
    """Of j, likewise."""
    target_random: tuple[float, ...]
    """Of i, in random order."""
    other_random: tuple[float, ...]


@dataclass(frozen=True)
class Trials:
    """What became of held-out images, by ordered pair of n classes."""

    swap_rate: Tensor
    """Share of the images of i that a shift along the normal turns into j, float32 ``[n, n]``; NaN: not tested."""
    swap_shift: Tensor
    """Median of these shifts, in units of the mean activation norm; NaN where none turned."""
    image_accuracy: float | None
    """Share of the images of i whose positions lie, in the mean, on the side of i; mean over pairs."""
    curves: Curves | None
    """Of the masking test; None, as the one before, if no pair could be tested."""


class _Tested(NamedTuple):
    """B images of a class, each against m others."""

    flips: Tensor
    """``[B, m]``."""
    sides: Tensor
    """Whether the mean distance of the positions is positive, ``[B, m]``."""
    masked: Tensor
    """Probabilities of both classes, positions going in order of distance, ``[B, m, STEPS + 1, 2]``."""
    masked_randomly: Tensor
    """Likewise in random order, of the class and all others, ``[B, STEPS + 1, 1 + m]``."""

    def curves(self) -> Tensor:
        """Return the means over images, in the order of the fields of ``Curves``, ``[m, STEPS + 1, 4]``."""
        random = self.masked_randomly.mean(0)
        others = random[:, 1:].T
        return torch.cat([self.masked.mean(0), torch.stack([random[:, 0].expand_as(others), others], dim=2)], dim=2)


def run(
    task: Task[ContrastConfig],
    planes: Planes,
    unit: float,
    pairs: Mapping[int, Sequence[int]],
    members: Mapping[int, Sequence[str]],
) -> Trials:
    """Shift and mask held-out images, class by class.

    Parameters
    ----------
    task
        Whose held-out images serve.
    planes, unit
        The planes, on the model's device, and the mean norm of the layer's activations.
    pairs
        By class i, the classes j that it is tested against.
    members
        Keys of the held-out images that are predicted as each class.
    """
    rate = torch.full(planes.products.shape, torch.nan)
    median, right, curves = rate.clone(), [], []
    for step, (target, others) in enumerate(pairs.items()):
        task.report("shifting and masking", step, len(pairs))
        keys = list(members.get(target, ()))[: task.config.test_images]
        chance = torch.Generator().manual_seed((task.config.seed << 16) + target)
        parts = [
            _test(task, a, planes, unit, target, others, chance)
            for _, a in passes.activations(task.model, task.cut, task.stream(task.held_out, keys))
        ]
        if not parts:
            continue
        found = _Tested(*(torch.cat(part) for part in zip(*parts, strict=True)))
        for place, other in enumerate(others):
            flips = found.flips[:, place]
            turned = flips[flips.isfinite()]
            rate[target, other] = len(turned) / len(flips)
            median[target, other] = turned.quantile(0.5) if len(turned) else torch.nan
        right.append(found.sides.double().mean(0))
        curves.append(found.curves())
    task.report("shifting and masking", len(pairs), len(pairs))
    if not curves:
        return Trials(rate, median, None, None)
    means = torch.cat(curves).mean(0)
    return Trials(
        rate, median, float(torch.cat(right).mean()), Curves(*(tuple(means[:, column].tolist()) for column in range(4)))
    )


@torch.no_grad()
def _test(
    task: Task[ContrastConfig],
    a: Tensor,
    planes: Planes,
    unit: float,
    target: int,
    others: Sequence[int],
    chance: torch.Generator,
) -> _Tested:
    """Test images ``[B, …]`` of a class against others; the answer is on the CPU."""
    cut, tokens = task.cut, task.cut.layout.tokens
    every = torch.tensor(others, device=a.device)
    normals, offsets = planes.between(torch.full_like(every, target), every)
    flips, sides, masked = [], [], []
    for some in torch.arange(len(a) * len(others), device=a.device).split(max(_ELEMENTS // a[0].numel(), 1)):
        own, place = a[some // len(others)], some % len(others)
        classes = torch.stack([torch.full_like(place, target), every[place]], dim=1)
        flips.append(shift.search(cut, own, normals[place], classes[:, 0], classes[:, 1], unit).flip)
        distances = (cut.positions(own)[:, tokens:] @ normals[place].unsqueeze(2)).squeeze(2)
        distances += offsets[place].unsqueeze(1)
        sides.append(distances.mean(1) > 0)
        masked.append(_masked(task, own, distances, classes))
    order = torch.rand(len(a), cut.layout.positions - tokens, generator=chance).to(a.device)
    classes = torch.cat([every.new_tensor([target]), every]).expand(len(a), -1)
    shape = (len(a), len(others))
    return _Tested(
        torch.cat(flips).unflatten(0, shape).cpu(),
        torch.cat(sides).unflatten(0, shape).cpu(),
        torch.cat(masked).unflatten(0, shape).cpu(),
        _masked(task, a, order, classes).cpu(),
    )


def _masked(task: Task[ContrastConfig], a: Tensor, order: Tensor, classes: Tensor) -> Tensor:
    """Return probabilities of classes ``[R, k]`` as positions go, those with the largest ``order [R, P]`` first.

    ``[R, STEPS + 1, k]``; zero where the model answers with NaN or infinity, as it may where nothing is left.
    """
    cut, tokens = task.cut, task.cut.layout.tokens
    rank = order.argsort(dim=1, descending=True, stable=True).argsort(1)
    gone = torch.linspace(0, order.shape[1], STEPS + 1, dtype=torch.float64, device=a.device).round()
    keep = rank.unsqueeze(1) >= gone.view(1, -1, 1)
    row = torch.arange(len(a), device=a.device).repeat_interleave(STEPS + 1)
    positions, masks, found = cut.positions(a), keep.flatten(0, 1).unsqueeze(2), []
    for rows in torch.arange(len(row), device=a.device).split(max(_ELEMENTS // a[0].numel(), 1)):
        left = positions[row[rows]].clone()
        left[:, tokens:] *= masks[rows]
        probability = cut.head(cut.unpositions(left)).double().softmax(1).nan_to_num(0.0)
        found.append(probability.gather(1, classes[row[rows]]))
    return torch.cat(found).view(len(a), STEPS + 1, -1)
