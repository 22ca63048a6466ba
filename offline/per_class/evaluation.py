"""Judging a bank with concepts of each class on held-out images: one pass, then every metric that applies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from concepts.codec import Codec
from concepts.cut import Cut
from concepts.kinds.nmf import NmfCodec
from offline import localise, passes
from offline.config import JudgingConfig
from offline.encoders import Encoder
from offline.images import fingerprint, shuffled
from offline.judging import Consistency, Judgement
from offline.passes import Explained
from offline.task import Task


@dataclass(frozen=True)
class ClassConcepts:
    """The K concepts of one class, most important first."""

    dictionary: Tensor
    """``[K, C]``."""
    importance: Tensor
    """Total Sobol indices, ``[K]``."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What is known of them already."""


@dataclass(frozen=True)
class Evaluation:
    """What held-out images say of a bank."""

    metrics: dict[str, Any]
    """``classes``, their ``mean``, and ``localisation`` where the truth is known."""
    statistics: dict[int, list[dict[str, float]]]
    """Of each class's concepts; none of a class that is not predicted."""


def codec_of(classes: Mapping[int, ClassConcepts], device: torch.device) -> Codec:
    """Return the codec of the concepts of some classes, in order."""
    dictionary = torch.cat([concepts.dictionary for concepts in classes.values()])
    owners = [target for target, concepts in classes.items() for _ in range(len(concepts.dictionary))]
    return NmfCodec(dictionary, owners).to(device)


def evaluate(task: Task[JudgingConfig], classes: Mapping[int, ClassConcepts], encoder: Encoder | None) -> Evaluation:
    """Measure a bank on held-out images that are predicted as classes that are wanted, class by class.

    Parameters
    ----------
    task
        The model, its images, and how much is to be measured.
    classes
        The concepts of each class, in the order of the bank.
    encoder
        What judges consistency; None: it is not measured.
    """
    config, names = task.config, task.model.spec.class_names
    task.report("evaluating", 0, 1)
    codec = codec_of(classes, task.model.device)
    keys = shuffled(task.held_out.keys, config.seed)
    quota = {target: config.held_out_per_class for target in task.classes() if target in classes}
    explained = passes.explain(task.model, task.cut, codec, task.stream(task.held_out, keys), quota)
    looks = None if encoder is None else Consistency(encoder, task.cut.layout, config.encoder_images)
    judged = judge_classes(task.cut, codec, explained, classes, looks)
    metrics = {names[target]: dict(concepts.metrics) for target, concepts in classes.items()}
    statistics = {}
    for target, judgement in judged.items():
        labels = task.labels(task.held_out, judgement.keys)
        metrics[names[target]] |= judgement.metrics(classes[target].dictionary, labels)
        statistics[target] = judgement.statistics(labels)
    if looks is not None and judged:
        _add_consistency(looks, classes, names, metrics, statistics, config.seed)
    result: dict[str, Any] = {"mean": mean_metrics(metrics.values()), "classes": metrics}
    count = sum(len(concepts.dictionary) for concepts in classes.values())
    measured = localise.localise_held_out(task, codec, count, keys, config.truth_images)
    result |= {} if measured is None else {"localisation": measured}
    seen = {key: digest for judgement in judged.values() for key, digest in judgement.digests.items()}
    result["held_out_fingerprint"] = fingerprint(seen)
    task.report("evaluating", 1, 1)
    return Evaluation(result, statistics)


def judge_classes(
    cut: Cut,
    codec: Codec,
    images: Iterable[Explained],
    classes: Mapping[int, ClassConcepts],
    looks: Consistency | None = None,
) -> dict[int, Judgement]:
    """Look at held-out images, class by predicted class.

    Parameters
    ----------
    cut, codec
        Where the model is cut, and the bank's codec.
    images
        Explained batches.
    classes
        As of ``evaluate``.
    looks
        Sees the images, too.
    """
    sizes = [len(concepts.dictionary) for concepts in classes.values()]
    firsts = dict(zip(classes, accumulate(sizes, initial=0), strict=False))
    found: dict[int, Judgement] = {}
    for batch in images:
        if looks is not None:
            looks.add(batch)
        for target in batch.targets.unique().tolist():
            importance = classes[target].importance
            if target not in found:
                found[target] = Judgement(len(importance), cut.layout.positions, importance, firsts[target])
            found[target].add(cut, codec, _rows(batch, batch.targets == target))
    return found


def _add_consistency(
    looks: Consistency,
    classes: Mapping[int, ClassConcepts],
    names: Sequence[str],
    metrics: Mapping[str, dict[str, float]],
    statistics: Mapping[int, list[dict[str, float]]],
    seed: int,
) -> None:
    """Put every concept's consistency with its statistics, and the mean with its class's metrics."""
    first = 0
    for target, concepts in classes.items():
        ids = range(first, first := first + len(concepts.dictionary))
        scores = looks.scores(ids, seed) if target in statistics else {}
        for concept, score in scores.items():
            statistics[target][concept - ids.start]["consistency"] = score
        if scores:
            metrics[names[target]]["consistency"] = sum(scores.values()) / len(scores)


def mean_metrics(classes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the unweighted mean of every metric that all classes have; what no image shows says nothing of a bank.

    Classes that no held-out image is predicted as are left out, unless there are no others.
    """
    rows = list(classes)
    rows = [row for row in rows if "images" in row] or rows
    shared = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared if name != "images"}


def _rows(batch: Explained, chosen: Tensor) -> Explained:
    """Return chosen images of a batch, bool ``[R]``."""
    rows = chosen.nonzero().squeeze(1)
    return Explained(
        keys=[batch.keys[row] for row in rows.tolist()],
        views=batch.views[rows.cpu().numpy()],
        a=batch.a[rows],
        reconstruction=batch.reconstruction[rows],
        logits=batch.logits[rows],
        targets=batch.targets[rows],
        codes=batch.codes.rows(rows),
        contributions=batch.contributions[rows],
    )
