"""Judging a bank with concepts of each class on held-out images: one pass, then every metric that applies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from concepts.codec import Codec
from concepts.cut import Cut
from concepts.kinds.nmf import NmfCodec
from offline import localise, passes
from offline.config import JudgingConfig
from offline.encoders import Encoder
from offline.images import shuffled
from offline.judging import Consistency
from offline.metrics import curves, dictionaries, fidelity, sparsity, usage
from offline.metrics.reconstruction import ReconstructionError
from offline.passes import Explained, masked_targets
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
    """Measure a bank on held-out images, class by predicted class.

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
    quota = dict.fromkeys(classes, config.held_out_per_class)
    explained = passes.explain(task.model, task.cut, codec, task.stream(task.held_out, keys), quota)
    order = {target: concepts.importance for target, concepts in classes.items()}
    looks = None if encoder is None else Consistency(encoder, task.cut.layout, config.encoder_images)
    evidence = collect(task.cut, codec, explained, order, looks)
    metrics = {names[target]: dict(concepts.metrics) for target, concepts in classes.items()}
    statistics = {}
    for target, seen in evidence.items():
        labels = task.labels(task.held_out, seen.keys)
        metrics[names[target]] |= class_metrics(seen, order[target], classes[target].dictionary, labels)
        statistics[target] = concept_statistics(seen, labels)
    if looks is not None and evidence:
        _add_consistency(looks, classes, names, metrics, statistics, config.seed)
    result: dict[str, Any] = {"mean": mean_metrics(metrics.values()), "classes": metrics}
    count = sum(len(concepts.dictionary) for concepts in classes.values())
    measured = localise.localise_held_out(task, codec, count, keys, config.truth_images)
    result |= {} if measured is None else {"localisation": measured}
    task.report("evaluating", 1, 1)
    return Evaluation(result, statistics)


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


@dataclass
class Evidence:
    """What was seen on the held-out images of one class; N images, K concepts. Grows batch by batch."""

    concepts: int
    positions: int
    error: ReconstructionError = field(default_factory=ReconstructionError)
    keys: list[str] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        """Take in tensors ``[R, …]`` by name."""
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value.cpu())

    def __getitem__(self, name: str) -> Tensor:
        """Return all rows of a name, ``[N, …]``."""
        return torch.cat(self.rows[name])


def collect(
    cut: Cut,
    codec: Codec,
    images: Iterable[Explained],
    importance: Mapping[int, Tensor],
    looks: Consistency | None = None,
) -> dict[int, Evidence]:
    """Look at held-out images, class by predicted class.

    Parameters
    ----------
    cut, codec
        Where the model is cut, and the bank's codec.
    images
        Explained batches.
    importance
        Of each class's concepts, ``[K]``: the order of deletion and insertion.
    looks
        Sees the images, too.
    """
    found: dict[int, Evidence] = {}
    for batch in images:
        if looks is not None:
            looks.add(batch)
        with torch.no_grad():
            reconstructed = cut.head(batch.reconstruction)
        reconstruction = cut.positions(batch.reconstruction)
        deletion = _deletion_masks(batch, importance)
        # Empty slots have no code, so that inserting them changes nothing.
        masks = torch.cat([deletion, 1 - deletion], dim=1)
        _, kept = masked_targets(cut, codec, batch.codes, masks, batch.targets)
        active = batch.codes.active()
        positions = cut.positions(batch.a)
        for target in batch.targets.unique().tolist():
            rows = (batch.targets == target).nonzero().squeeze(1)
            k = len(importance[target])
            evidence = found.setdefault(target, Evidence(k, positions.shape[1]))
            evidence.keys += [batch.keys[row] for row in rows.tolist()]
            evidence.error.add(positions[rows], reconstruction[rows])
            evidence.add(
                logits=batch.logits[rows],
                reconstructed=reconstructed[rows],
                contributions=batch.contributions[rows, :k],
                active=active[rows, :k],
                deletion=kept[rows, : k + 1],
                insertion=kept[rows, deletion.shape[1] : deletion.shape[1] + k + 1],
            )
    return found


def class_metrics(
    evidence: Evidence, importance: Tensor, dictionary: Tensor, labels: Tensor | None
) -> dict[str, float]:
    """Return the metrics of one class's concepts by name (methods section 6).

    Parameters
    ----------
    evidence
        From ``collect``.
    importance
        ``[K]``.
    dictionary
        ``[K, C]``.
    labels
        True classes of the images, int64 ``[N]``, or None where they are not known.
    """
    logits, reconstructed, active = evidence["logits"], evidence["reconstructed"], evidence["active"]
    known = {}
    if labels is not None:
        known["accuracy"] = fidelity.accuracy(logits, labels)
        known["accuracy_reconstructed"] = fidelity.accuracy(reconstructed, labels)
    return {
        "images": float(len(logits)),
        "relative_error": evidence.error.relative_error(),
        "mse": evidence.error.mse(),
        "variance_explained": evidence.error.variance_explained(),
        "kl": float(fidelity.kl_divergence(logits, reconstructed).mean()),
        "top1_agreement": fidelity.agreement(logits, reconstructed),
        **known,
        "deletion_aopc": curves.deletion_aopc(evidence["deletion"].double().mean(0)),
        "insertion_auc": curves.insertion_auc(evidence["insertion"].double().mean(0)),
        "gini": sparsity.gini(importance),
        "code_density": sparsity.density(active, evidence.positions),
        "l0_position": sparsity.l0_per_position(active, evidence.positions),
        "l0_image": sparsity.l0_per_image(active),
        "concepts_for_80": float(sparsity.concepts_for_share(evidence["contributions"]).double().mean()),
        "alive_share": sparsity.alive_share(active),
        "dead_share": 1.0 - sparsity.alive_share(active),
        "always_on_share": sparsity.always_on_share(active),
        "hoyer": dictionaries.hoyer(dictionary),
        "largest_cosine": dictionaries.largest_cosine(dictionary),
    }


def concept_statistics(evidence: Evidence, labels: Tensor | None) -> list[dict[str, float]]:
    """Return statistics of each concept of a class on its held-out images; parameters as of ``class_metrics``."""
    contributions = evidence["contributions"]
    columns = {
        "active_share": sparsity.active_share(evidence["active"]),
        "prevalence": usage.prevalence(contributions),
    }
    if labels is not None:
        columns["reliability"] = usage.reliability(contributions, evidence["logits"].argmax(1) == labels)
    return [
        {name: float(column[k]) for name, column in columns.items() if not column[k].isnan()}
        for k in range(evidence.concepts)
    ]


def mean_metrics(classes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the unweighted mean over classes of every metric that all of them have."""
    rows = list(classes)
    shared = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared if name != "images"}


def _deletion_masks(batch: Explained, importance: Mapping[int, Tensor]) -> Tensor:
    """Return each image's masks ``[R, S + 1, S]``; the empty slots of a class with fewer concepts come last."""
    slots = batch.codes.ids.shape[1]
    masks = {}
    for target in batch.targets.unique().tolist():
        padded = torch.full((slots,), -1.0, dtype=torch.float64)
        padded[: len(importance[target])] = importance[target]
        masks[target] = curves.deletion_masks(padded)
    return torch.stack([masks[target] for target in batch.targets.tolist()]).to(batch.a.device)
