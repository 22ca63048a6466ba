"""Total Sobol indices of 25 concepts on the logit of one class, beside CRAFT's loop over images."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import measure
from concepts.cut import Cut
from concepts.kinds.nmf import NmfCodec
from concepts.mixtures import mixture_head
from offline import sobol
from offline.importance import total_indices
from offline.passes import Explained

CONCEPTS, DESIGNS = 25, 32
BATCH = 64
"""Rows in one pass of the head: what the authors' code does unless told otherwise."""
CLASS = 7
TARGET = 5.0


class Case(NamedTuple):
    """A head to measure."""

    head: str
    network: str
    layer: str
    images: int
    """As many as are measured; the time of 100 follows from theirs."""
    repeats: int = 3
    designs: int = DESIGNS
    """As many as are measured; where fewer, the time of all follows from theirs: both sides run in proportion."""
    target: float | None = TARGET


CASES = (
    Case("affine (pool, linear)", "resnet50", "layer4", images=2),
    Case("pool, then layer norm and linear", "convnext_tiny", "features", images=4),
    Case("three linear with ReLU", "vgg16", "features", images=1),
    Case("layer norm and the class token's linear", "vit_b_16", "encoder.layers.encoder_layer_11", images=2),
    Case("three residual blocks", "resnet50", "layer3", images=1, designs=4, target=None),
)


def main() -> None:
    """Measure every head, on one thread and in processor time: what else runs on the machine then matters least."""
    torch.set_num_threads(1)
    rows, notes = [], {}
    for case in CASES:
        row, preparation = measured(case)
        rows.append(row)
        notes[row.name] = {"images": case.images, "designs": case.designs, "preparation_s": preparation}
        print(row.name, row.ratio, flush=True)
    measure.publish("sobol", rows, threads=1, measured_on=notes)


def network(name: str) -> nn.Module:
    """Return a network with random weights, large enough for its non-linear parts to bend."""
    torch.manual_seed(0)
    module: nn.Module = getattr(torchvision.models, name)()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=2 / math.sqrt(layer.in_features))
            nn.init.normal_(layer.bias)
    return module.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def measured(case: Case) -> tuple[measure.Row, float]:
    """Measure one head on both sides, and say how many seconds it took to find its parts, once for all images."""
    cut = Cut(network(case.network), case.layer, torch.rand(2, 3, 224, 224))
    is_affine = cut.facts.form == "affine"
    start = time.process_time()
    if not is_affine:
        mixture_head(cut)
    preparation = time.process_time() - start
    batch, codec, dictionary = explained(cut, case.images)

    def ours() -> Tensor:
        found = batch
        if is_affine:  # else contributions are not needed
            gradient = cut.positions(cut.affine_gradient(batch.targets))
            found = replace(batch, contributions=codec.contributions(batch.codes, gradient).total())
        return total_indices(cut, codec, found, case.designs).mean(0)

    def authors() -> Tensor:
        return craft(cut, batch.codes.values, dictionary, case.designs)

    (indices, expected), (our_time, their_time) = in_turn([ours, authors], case.repeats)
    difference = float((indices - expected).abs().max())
    # The closed form is exact, an estimate from 32 designs is coarse.
    if not difference <= (0.2 if is_affine else 1e-3):
        raise RuntimeError(f"the two sides differ by {difference}")
    unit_ms = 1e3 * DESIGNS / case.designs / case.images
    row = measure.row(
        f"sobol: {CONCEPTS} concepts, {case.head} ({case.network})",
        unit_ms * our_time,
        "ms of processor time an image",
        higher_is_better=False,
        baseline="CRAFT's loop: each image alone, A, B and C evaluated",
        baseline_value=unit_ms * their_time,
        target=case.target,
    )
    return row, round(preparation, 2)


def in_turn(work: Sequence[Callable[[], Tensor]], repeats: int) -> tuple[list[Tensor], list[float]]:
    """Return the answers, and the median seconds of processor time; the first run warms up if there are several."""
    answers: list[Tensor] = []
    times: list[list[float]] = []
    for _ in range(repeats + (repeats > 1)):
        answers, spent = [], []
        for run in work:
            start = time.process_time()
            answers.append(run())
            spent.append(time.process_time() - start)
        times.append(spent)
    return answers, [statistics.median(side) for side in zip(*times[-repeats:], strict=True)]


def explained(cut: Cut, images: int) -> tuple[Explained, NmfCodec, Tensor]:
    """Return images with codes of random concepts: a third of them active at a position."""
    generator = torch.Generator().manual_seed(1)
    dictionary = torch.rand(CONCEPTS, cut.layout.channels, generator=generator)
    codec = NmfCodec(dictionary, [CLASS] * CONCEPTS)
    values = (torch.randn(images, cut.layout.positions, CONCEPTS, generator=generator) - 0.4).clamp_min(0)
    targets = torch.full((images,), CLASS)
    codes = codec.encode(torch.zeros(images, 1, cut.layout.channels), targets).with_values(values)
    nothing = torch.empty(0)
    return Explained([], nothing.numpy(), nothing, nothing, nothing, targets, codes, nothing), codec, dictionary


def craft(cut: Cut, codes: Tensor, dictionary: Tensor, n: int) -> Tensor:
    """Estimate importance as CRAFT's authors do (section 3.3 and appendix of the paper).

    Parameters
    ----------
    codes
        ``[R, P, K]``.
    dictionary
        ``[K, C]``.
    n
        Designs.
    """
    designs = sobol.designs(CONCEPTS, n).float()
    b = torch.stack([designs[1 + k, :, k] for k in range(CONCEPTS)], 1)
    masks = torch.cat([designs[0], b, designs[1:].flatten(0, 1)])
    found = []
    for image in codes:
        dimmed = image.unsqueeze(0) * masks.unsqueeze(1)
        decoded = (dimmed.view(-1, CONCEPTS) @ dictionary).view(*dimmed.shape[:-1], -1)
        with torch.no_grad():
            answers = [cut.head(rows)[:, CLASS] for rows in cut.unpositions(decoded).split(BATCH)]
        outputs = torch.cat(answers).double()
        outputs = torch.cat([outputs[:n], outputs[2 * n :]]).view(CONCEPTS + 1, n)  # B is not used
        found.append(sobol.jansen(outputs))
    return torch.stack(found).mean(0)


if __name__ == "__main__":
    main()
