"""Class prototypes (Herdt et al., 2025): what speaks for a class, by NMF of activations weighed by attribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field

from concepts.errors import NotTrainable
from concepts.repository import Repository
from offline import collage, passes
from offline.attribution import Attribution, Place, Rule, Smoothing
from offline.nearest import excerpt
from offline.per_class import factorising
from offline.per_class.config import PerClassConfig
from offline.per_class.lesson import Lesson
from offline.per_class.pipeline import train_classes
from offline.progress import Reporter
from offline.refusals import negative_activations
from offline.task import Task
from offline.trainers import Outcome, Trainer


class PrototypesConfig(PerClassConfig):
    """All that decides a bank of prototypes."""

    name: str = Field("prototypes", description="Name of the bank; model/layer/name is its reference.")
    concepts: int = Field(6, ge=1, description="Prototypes a class (the rank of the factorisation).")
    images_per_class: int = Field(60, ge=1, description="Most training images of a class, in images.")
    attribution: Rule | None = Field(
        None, description="deeplift or gradient (gradient × activation); default: deeplift where it works."
    )
    noise_samples: int = Field(20, ge=0, description="Noisy copies that attributions are averaged over; 0: no noise.")
    noise: float = Field(
        0.25, ge=0, description="Standard deviation of the noise, relative to that of each image's own values."
    )
    noise_at: Place = Field("input", description="input or layer: there, the model up to it runs once an image.")
    probe_images: int = Field(50_000, ge=1, description="Most training images to look for pictures of prototypes in.")


class Prototypes:
    """Factorises the positions of a class's images, each weighed by how much it speaks for the class."""

    name = "prototypes"

    def __init__(self, task: Task[PrototypesConfig]) -> None:
        config = task.config
        if task.cut.layout.order == "bc":
            raise NotTrainable(
                f"layer {task.cut.layer!r} has no positions, and prototypes are places in images: choose another layer "
                "of `whence-bank layers`",
                layer=task.cut.layer,
            )
        smoothing = Smoothing(config.noise_samples, config.noise, config.noise_at, config.seed)
        self._task, self._attribution = task, Attribution(task.cut, config.attribution, smoothing)
        self.resolved = {"attribution": self._attribution.rule}

    def learn(self, target: int, members: Sequence[str]) -> Lesson:
        """See ``Method.learn``."""
        task, cut, config = self._task, self._task.cut, self._task.config
        keys: list[str] = []
        digests: dict[str, str] = {}
        kept = []
        for batch, a in passes.activations(task.model, cut, task.stream(task.training, members)):
            if bool((a < 0).any()):
                raise negative_activations(task.model, cut.layer)
            targets = torch.full((len(a),), target, device=a.device)
            parts = self._attribution(task.model.inputs(batch.views), a, targets)
            weights = cut.positions(parts).relu().mean(2, keepdim=True)
            kept.append((cut.positions(a) * weights)[:, cut.layout.tokens :])
            keys += batch.keys
            digests |= zip(batch.keys, batch.digests, strict=True)
        if not any(bool(part.any()) for part in kept):
            raise NotTrainable(
                f"nothing at layer {cut.layer!r} speaks for it: the attributions of its images are nowhere positive; "
                "choose another layer"
            )
        rows = torch.cat(kept).flatten(0, 1).double()
        found = factorising.factorise(rows, config)
        codes, dictionary = found.codes[0], found.dictionary[0]
        used = dictionary.any(1) & codes.any(0)
        return Lesson(
            dictionary=dictionary[used].float().cpu(),
            excerpts=[[] for _ in range(int(used.sum()))],  # found when all classes are learned, in one pass
            keys=keys,
            digests=digests,
            metrics=factorising.metrics(rows, len(rows) // len(keys), found, config),
        )


def show(task: Task[PrototypesConfig], lessons: dict[int, Lesson]) -> dict[int, Lesson]:
    """Find the pictures of all prototypes, and test them."""
    config, view = task.config, task.model.spec.preprocessing
    dictionaries = {target: lesson.dictionary for target, lesson in lessons.items()}
    tested = collage.measure(task, dictionaries, task.training, config.probe_images, config.exemplars)
    return {
        target: replace(
            lesson,
            excerpts=[
                [excerpt(place, task.cut.layout, view) for place in places[: config.exemplars]]
                for places in tested.found.nearest[target]
            ],
            metrics={**lesson.metrics, **tested.metrics[target]},
        )
        for target, lesson in lessons.items()
    }


def train(repository: Repository, config: PrototypesConfig, report: Reporter) -> Outcome:
    """Learn and publish one bank with the prototypes of all requested classes; see ``train_classes``."""
    return train_classes(repository, config, report, Prototypes, show)


TRAINER = Trainer("prototypes", "Learn prototypes of each class by NMF of what speaks for it.", PrototypesConfig, train)
