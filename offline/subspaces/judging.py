"""What held-out images say of groups of features: how many have some, and what these carry of the prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from concepts.codec import EMPTY, Codec, DenseCodes
from concepts.errors import InvalidInput
from offline import localise, passes
from offline.config import JudgingConfig
from offline.encoders import Encoder
from offline.gallery import most_active
from offline.images import fingerprint, shuffled
from offline.judging import Consistency, Tally
from offline.metrics import fidelity
from offline.passes import Explained
from offline.task import Task


@dataclass
class Judgement(Tally):
    """What was seen of K groups, which do not reconstruct."""

    carried: list[Tensor] = field(default_factory=list)
    """Share of ``⟨G, a⟩`` that active groups carry, of each image; NaN where that is nothing."""
    active: list[Tensor] = field(default_factory=list)
    """Whether any group is active, of each image."""

    def add(self, batch: Explained, carried: Tensor) -> None:
        """Take in a batch, and the carried share of its images."""
        self.count(batch)
        self.carried.append(carried.cpu().double())
        self.active.append((batch.codes.ids != EMPTY).any(1).cpu())

    def metrics(self, labels: Tensor | None) -> dict[str, float]:
        """Return the metrics by name (methods section 6, as far as it applies); parameters as of ``statistics``."""
        known = {} if labels is None else {"accuracy": fidelity.accuracy(torch.cat(self.predicted), labels)}
        found = {
            "images": float(self.images),
            **known,
            "active_share": float(torch.cat(self.active).double().mean()),
            # The median: where the layer as a whole says next to nothing, single shares are without bounds.
            "carried_share": float(torch.cat(self.carried).nanquantile(0.5)),
            **self.use(),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Measured:
    """What held-out images say of a bank's groups."""

    metrics: dict[str, Any]
    statistics: list[dict[str, float]]
    """Of each group."""


def measure(task: Task[JudgingConfig], encoder: Encoder | None, codec: Codec, groups: int) -> Measured:
    """Measure groups on held-out images.

    Parameters
    ----------
    task
        Of the training.
    encoder
        Judges consistency, where there is one.
    codec
        Of the bank, on the model's device.
    groups
        How many it holds.

    Raises
    ------
    InvalidInput
        If there is no held-out image to judge by.
    """
    config = task.config
    task.report("judging", 0, 1)
    keys = shuffled(task.held_out.keys, config.seed)
    looks = None if encoder is None else Consistency(encoder, task.cut.layout, config.encoder_images)
    judgement = Judgement(groups, task.cut.layout.positions)
    for batch, carried in _explained(task, codec, keys):
        judgement.add(batch, carried)
        if looks is not None:
            looks.add(batch)
    if not judgement.images:
        raise InvalidInput(
            "no held-out image is predicted as a class that is wanted, so that nothing can be measured: give other "
            "held-out images, or leave out --classes"
        )
    labels = task.labels(task.held_out, judgement.keys)
    metrics: dict[str, Any] = {"mean": judgement.metrics(labels)}
    statistics = judgement.statistics(labels)
    if looks is not None:
        scores = looks.scores(most_active(judgement.activity.active_images, groups), config.seed)
        metrics["mean"] |= {"consistency": fmean(scores.values())} if scores else {}
        for group, score in scores.items():
            statistics[group]["consistency"] = score
    measured = localise.localise_held_out(task, codec, groups, keys, config.truth_images)
    metrics |= {} if measured is None else {"localisation": measured}
    metrics["held_out_fingerprint"] = fingerprint(judgement.digests)
    task.report("judging", 1, 1)
    return Measured(metrics, statistics)


def _explained(task: Task[JudgingConfig], codec: Codec, keys: Sequence[str]) -> Iterator[tuple[Explained, Tensor]]:
    """Yield held-out images, explained for their predicted classes, with the share that active groups carry."""
    cut = task.cut
    quota = dict.fromkeys(task.classes(), task.config.held_out_per_class)
    for batch, a in passes.activations(task.model, cut, task.stream(task.held_out, keys)):
        logits, gradient_of = cut.head_forward(a)
        targets = logits.argmax(1)
        rows = passes.take(targets.tolist(), quota)
        if rows:
            gradient = cut.positions(gradient_of(targets)[rows])
            a, logits, targets = a[rows], logits[rows], targets[rows]
            positions = cut.positions(a)
            with torch.no_grad():
                codes = codec.encode(positions, targets)
                together = codec.combine(codes)
                contributions = codec.contributions(codes, gradient).total()
                carried = (gradient * together).sum((1, 2)) / (gradient * positions).sum((1, 2))
            kept, plain = batch.rows(rows), DenseCodes(codes.values, codes.ids)  # without the activation
            reconstruction = cut.unpositions(together)
            yield Explained(kept.keys, kept.views, a, reconstruction, logits, targets, plain, contributions), carried
        if not any(quota.values()):
            return
