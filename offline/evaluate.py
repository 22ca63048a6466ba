"""Measuring a published bank anew, on any images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from concepts import devices
from concepts.bank import Bank
from concepts.errors import InvalidInput, UnsupportedOption
from concepts.repository import Repository
from offline.config import LARGEST_SEED, JudgingConfig
from offline.encoders import Encoder, open_encoder
from offline.free import measure_free
from offline.images import ImageFolder, open_folder, split
from offline.locations import Location
from offline.per_class.evaluation import ClassConcepts, evaluate
from offline.progress import Reporter
from offline.task import Task

AS_TRAINED = ("seed", "held_out_per_class", "truth_images", "encoder_images")
"""What is taken from a bank's own configuration where nothing else is asked for."""


class EvaluationSettings(BaseModel):
    """What decides how a bank is measured; the command's options are made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    images: Location = Field(description="Folder of images: <class>/*.jpg, or flat; also s3://bucket/… or gs://…")
    held_out_alone: bool = Field(
        False,
        description="Of the folder that the bank was trained on, take only what the training held out (--held-out "
        "FRACTION).",
    )
    classes: tuple[str, ...] = Field(
        (), description="Classes whose images to take, by prediction; default: those of the training."
    )
    held_out_per_class: int | None = Field(
        None, ge=1, description="Most images of a class, in images; default: as in training."
    )
    encoder: str | None = Field(
        None,
        description="Encoder that judges consistency: MODEL/LAYER of the repository, or hub:dinov2_vits14; default: "
        "consistency is not measured.",
    )
    truth_images: int | None = Field(
        None, ge=1, description="Most images to compare with known attributes; default: as in training."
    )
    encoder_images: int | None = Field(
        None, ge=2, description="Most images that the encoder sees; default: as in training."
    )
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="Of everything that is drawn; default: that of the training."
    )
    batch_size: int = Field(128, ge=1, description="Images a forward pass.")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class Evaluated:
    """What images say of a bank."""

    bank: Bank
    metrics: Mapping[str, Any]
    """As a bank stores them, without what only its training can say."""
    statistics: tuple[Mapping[str, float], ...]
    """Of each concept; nothing of those of a class that is not seen."""
    unseen: tuple[str, ...]
    """Classes of the bank that were asked for, and that no image is predicted as."""
    skipped_images: Mapping[str, str]
    """Why an image was left out, by key."""

    def to_json(self) -> dict[str, Any]:
        """Return all of it but the bank's own content."""
        return {
            "bank": self.bank.reference,
            "digest": self.bank.digest,
            "metrics": self.metrics,
            "concepts": [{"id": number, **known} for number, known in enumerate(self.statistics)],
            "unseen_classes": self.unseen,
            "skipped_images": self.skipped_images,
        }


def evaluate_bank(repository: Repository, reference: str, settings: EvaluationSettings, report: Reporter) -> Evaluated:
    """Measure a bank on images; on those that its training held out, the metrics are the stored ones.

    Raises
    ------
    UnknownBank, CorruptData, WeightsMismatch
        If there is no such bank, or it cannot be used any more.
    UnsupportedOption
        If its concepts do not add up to a reconstruction, so that the metrics are not defined.
    UnknownModel, UnknownLayer, UnknownClass, InvalidInput
        If the settings do not fit the bank, the images or this machine, or no image can be measured.
    """
    bank = repository.load(repository.resolve(reference))
    codec = bank.codec()
    if not codec.reconstructs:
        raise UnsupportedOption(
            f"the concepts of {bank.reference} do not add up to a reconstruction, which all these metrics need: "
            "name a bank of kind nmf or sae",
            bank=bank.reference,
        )
    task = _task(repository, bank, settings, report)
    encoder = None if settings.encoder is None else open_encoder(settings.encoder, repository, task.model.device)
    if codec.per_class:
        return _evaluate_classes(task, bank, encoder)
    measured = measure_free(task, encoder, codec.to(task.model.device), _atoms(bank))
    return Evaluated(bank, measured.metrics, tuple(measured.statistics), (), task.skipped_images)


def classes_of(bank: Bank, class_names: Sequence[str]) -> list[str]:
    """Return the names of the classes that a bank explains: those that it has concepts of, or all of the model's."""
    members = _members(bank)
    return [name for index, name in enumerate(class_names) if not members or index in members]


def _task(repository: Repository, bank: Bank, settings: EvaluationSettings, report: Reporter) -> Task[JudgingConfig]:
    """Return the task of measuring: as in the bank's training, but for what is asked for."""
    asked = settings.model_dump(exclude={"images", "held_out_alone"}, exclude_none=True)
    trained = {name: bank.configuration[name] for name in AS_TRAINED if name in bank.configuration}
    if not settings.classes:
        asked["classes"] = tuple(bank.configuration.get("classes", ()))
    config = JudgingConfig(
        model=bank.model, layer=bank.layer, name=bank.name, images=settings.images, **(trained | asked)
    )
    model = repository.load_model(bank.model, devices.choose(config.device))
    folder = open_folder(settings.images)
    folder = _held_out(folder, bank) if settings.held_out_alone else folder
    return Task(model, model.cut(bank.layer), folder, folder, config, report)


def _held_out(folder: ImageFolder, bank: Bank) -> ImageFolder:
    """Return the images that the training held out of a folder."""
    fraction = bank.configuration.get("held_out")
    if not isinstance(fraction, float):
        raise InvalidInput(
            f"bank {bank.reference} was not trained on a folder of which a fraction was held out: give the folder of "
            "its held-out images, without --held-out-alone"
        )
    return split(folder, fraction, bank.configuration["seed"])[1]


def _evaluate_classes(task: Task[JudgingConfig], bank: Bank, encoder: Encoder | None) -> Evaluated:
    """Measure a bank with concepts of each class."""
    names, members = task.model.spec.class_names, _members(bank)
    asked = [target for target in task.classes() if target in members]
    evaluation = evaluate(task, _classes(bank, members), encoder)
    if not evaluation.statistics:
        raise InvalidInput(
            f"none of the images is predicted as a class that is asked for and has concepts in bank {bank.reference}: "
            "give other images, or leave out --classes"
        )
    statistics: list[Mapping[str, float]] = [{}] * len(bank.concepts)
    for target, rows in evaluation.statistics.items():
        for concept, row in zip(members[target], rows, strict=True):
            statistics[concept] = row
    seen = {name: row for name, row in evaluation.metrics["classes"].items() if row}
    unseen = tuple(names[target] for target in asked if names[target] not in seen)
    metrics = {**evaluation.metrics, "classes": seen}
    return Evaluated(bank, metrics, tuple(statistics), unseen, task.skipped_images)


def _members(bank: Bank) -> dict[int, list[int]]:
    """Return the concepts of each class."""
    members: dict[int, list[int]] = {}
    for concept in bank.concepts:
        if concept.class_index is not None:
            members.setdefault(concept.class_index, []).append(concept.id)
    return members


def _classes(bank: Bank, members: Mapping[int, Sequence[int]]) -> dict[int, ClassConcepts]:
    """Return the concepts of each class as they were trained."""
    atoms = _atoms(bank)
    try:
        importance = torch.tensor([c.statistics["importance"] for c in bank.concepts], dtype=torch.float64)
    except KeyError as error:
        raise UnsupportedOption(
            f"bank {bank.reference} does not say how important its concepts are, which decides in which order they are "
            "taken away: train it anew",
            bank=bank.reference,
        ) from error
    return {target: ClassConcepts(atoms[ids], importance[ids]) for target, ids in members.items()}


def _atoms(bank: Bank) -> Tensor:
    """Return what the components of a bank's concepts point along, ``[K, C]``."""
    return bank.tensors["decoder" if "decoder" in bank.tensors else "dictionary"].float()
