"""What trainers of banks whose concepts belong to no class share: judging, exemplars, publication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from concepts.bank import Bank, Concept
from concepts.codec import Codec
from concepts.errors import InvalidInput
from concepts.repository import Repository
from offline import exemplars, localise, passes
from offline.config import JudgingConfig
from offline.encoders import Encoder, open_encoder
from offline.exemplars import Excerpt
from offline.gallery import Gallery, most_active
from offline.images import fingerprint, shuffled
from offline.judging import Consistency, judge
from offline.progress import Reporter
from offline.task import Task, open_task


class FreeConfig(JudgingConfig):
    """What decides how banks with many concepts are shown."""

    exemplar_concepts: int = Field(
        2048, ge=0, description="Most concepts that get exemplars: those active on most held-out images."
    )
    exemplar_images: int = Field(5000, ge=1, description="Most training images to choose exemplars from.")
    exemplar_side: int | None = Field(
        None, ge=1, description="Side of an exemplar in pixels of the model's view; default: half the view."
    )


Config = TypeVar("Config", bound=FreeConfig)


@dataclass(frozen=True)
class Measured:
    """What held-out images say of a bank's concepts."""

    metrics: dict[str, Any]
    statistics: list[dict[str, float]]
    """Of each concept."""
    active_images: Tensor
    """On how many images each concept is active, ``[K]``."""


@dataclass(frozen=True)
class Judged:
    """What was found out about a bank's concepts."""

    metrics: dict[str, Any]
    statistics: list[dict[str, float]]
    """Of each concept."""
    excerpts: list[list[Excerpt]]
    """Of each concept, best first."""


def prepare(repository: Repository, config: Config, report: Reporter) -> tuple[Task[Config], Encoder | None]:
    """Open all that training and judging need, so that what is wrong shows before the work.

    Raises
    ------
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the repository or this machine.
    """
    task = open_task(repository, config, report)
    task.classes()
    encoder = None if config.encoder is None else open_encoder(config.encoder, repository, task.model.device)
    return task, encoder


def judge_free(task: Task[Config], encoder: Encoder | None, codec: Codec, dictionary: Tensor) -> Judged:
    """Measure a bank on held-out images, and choose its exemplars from training images; see ``measure_free``."""
    measured = measure_free(task, encoder, codec, dictionary)
    return Judged(measured.metrics, measured.statistics, _excerpts(task, codec, measured.active_images))


def measure_free(task: Task[JudgingConfig], encoder: Encoder | None, codec: Codec, dictionary: Tensor) -> Measured:
    """Measure a bank on held-out images.

    Parameters
    ----------
    task, encoder
        From ``prepare``.
    codec
        Of the bank, on the model's device.
    dictionary
        What its components point along, ``[K, C]``.

    Raises
    ------
    InvalidInput
        If there is no held-out image to judge by.
    """
    config, concepts = task.config, len(dictionary)
    task.report("judging", 0, 1)
    keys = shuffled(task.held_out.keys, config.seed)
    quota = dict.fromkeys(task.classes(), config.held_out_per_class)
    looks = None if encoder is None else Consistency(encoder, task.cut.layout, config.encoder_images)
    stands_in = codec.substitutes and task.cut.dynamic
    stream = task.stream(task.held_out, keys)
    explained = passes.explain(task.model, task.cut, codec, stream, quota, substitute=stands_in)
    judgement = judge(task.cut, codec, concepts, explained, looks)
    if not judgement.images:
        raise InvalidInput(
            "no held-out image is predicted as a class that is wanted, so that nothing can be measured: give other "
            "held-out images, or leave out --classes"
        )
    labels = task.labels(task.held_out, judgement.keys)
    metrics: dict[str, Any] = {"mean": judgement.metrics(dictionary, labels)}
    statistics = judgement.statistics(labels)
    if looks is not None:
        scores = looks.scores(most_active(judgement.activity.active_images, concepts), config.seed)
        metrics["mean"] |= _mean_consistency(scores, judgement.size)
        for concept, score in scores.items():
            statistics[concept]["consistency"] = score
    measured = localise.localise_held_out(task, codec, concepts, keys, config.truth_images)
    metrics |= {} if measured is None else {"localisation": measured}
    metrics["held_out_fingerprint"] = fingerprint(judgement.digests)
    task.report("judging", 1, 1)
    return Measured(metrics, statistics, judgement.activity.active_images)


def publish_free(
    repository: Repository,
    task: Task[Config],
    judged: Judged,
    *,
    name: str,
    tensors: Mapping[str, Tensor],
    configuration: Mapping[str, Any],
    data_fingerprint: str,
    kind: str = "sae",
    labels: Sequence[str] | None = None,
) -> Bank:
    """Publish a bank with its pictures.

    Parameters
    ----------
    repository, task, judged
        Where, and from ``judge_free``.
    name
        Of the bank.
    tensors
        As of the kind.
    configuration
        What the configuration does not say.
    data_fingerprint
        Of the training images.
    kind
        What reads the tensors.
    labels
        Of the concepts, where they have names.
    """
    config, spec = task.config, task.model.spec
    task.report("publishing", 0, 1)
    drawn = exemplars.draw(task.training, judged.excerpts)
    records = tuple(
        Concept(index, "" if labels is None else labels[index], statistics=statistics, exemplars=shown)
        for index, (statistics, shown) in enumerate(zip(judged.statistics, drawn.exemplars, strict=True))
    )
    bank = Bank(
        kind=kind,
        model=config.model,
        layer=config.layer,
        name=name,
        weights_digest=spec.weights_digest,
        channels=task.cut.layout.channels,
        concepts=records,
        tensors=tensors,
        metrics=judged.metrics,
        configuration={**config.record(), **configuration, "device": task.model.device.type},
        data_fingerprint=data_fingerprint,
        preprocessing=spec.preprocessing.to_json(),
    )
    bank = repository.publish(bank, drawn.pictures)
    task.report("publishing", 1, 1)
    return bank


def _mean_consistency(scores: Mapping[int, float], importance: Tensor) -> dict[str, float]:
    """Return the mean over concepts, and over contributions: answers list what contributes most."""
    if not scores:
        return {}
    values, weights = torch.tensor(list(scores.values()), dtype=torch.float64), importance[list(scores)]
    found = {"consistency": float(values.mean())}
    if bool(weights.any()):
        found["consistency_of_contributions"] = float(values @ weights / weights.sum())
    return found


def _excerpts(task: Task[Config], codec: Codec, active_images: Tensor) -> list[list[Excerpt]]:
    """Return what excites the concepts that are active most often."""
    config, view = task.config, task.model.spec.preprocessing
    side = config.exemplar_side or min(view.height, view.width) // 2
    gallery = Gallery(len(active_images), config.exemplars, task.cut.layout, view, side)
    keys = shuffled(task.training.keys, config.seed)[: config.exemplar_images] if config.exemplars else []
    done = 0
    for batch, a in passes.activations(task.model, task.cut, task.stream(task.training, keys)):
        with torch.no_grad():
            nobody = torch.zeros(len(a), dtype=torch.int64, device=a.device)
            codes = codec.encode(task.cut.positions(a), nobody)
        gallery.add(batch.keys, batch.boxes, codes)
        done += len(batch.keys)
        task.report("choosing exemplars", min(done, len(keys) - 1), len(keys))
    task.report("choosing exemplars", max(len(keys), 1), max(len(keys), 1))
    return gallery.excerpts(most_active(active_images, config.exemplar_concepts))
