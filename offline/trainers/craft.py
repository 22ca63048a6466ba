"""CRAFT banks (Fel et al., CVPR 2023, arXiv 2211.10154): concepts of each class by NMF of crops' activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from concepts.bank import Bank
from concepts.repository import Repository
from offline.parts import PartsConfig, Splitting
from offline.per_class import factorising
from offline.per_class.crops import Cropping
from offline.per_class.lesson import Lesson
from offline.per_class.pipeline import train_classes
from offline.progress import Reporter
from offline.task import Task
from offline.trainers import Outcome, Trainer


class CraftConfig(PartsConfig):
    """All that decides a CRAFT bank."""

    name: str = Field("craft", description="Name of the bank; model/layer/name is its reference.")


class Craft:
    """Factorises the mean activations of a class's crops."""

    name = "craft"

    def __init__(self, task: Task[CraftConfig]) -> None:
        self._task, self._cropping = task, Cropping.of(task)
        self.resolved = self._cropping.resolved
        self._splitting = Splitting(self._cropping, task.config) if task.config.parts_layer else None

    def learn(self, target: int, members: Sequence[str]) -> Lesson:
        """See ``Method.learn``."""
        del target
        config = self._task.config
        crops = self._cropping.cut(members, lambda positions: positions.mean(1))
        rows = crops.vectors.double()
        found = factorising.factorise(rows, config)
        codes, dictionary = found.codes[0], found.dictionary[0]
        used = dictionary.any(1) & codes.any(0)
        return Lesson(
            dictionary=dictionary[used].float().cpu(),
            excerpts=self._cropping.excerpts(crops, codes[:, used].float().cpu()),
            keys=crops.keys,
            digests=crops.digests,
            metrics=factorising.metrics(rows, self._cropping.grid.count, found, config),
        )

    def with_parts(self, lessons: Mapping[int, Lesson], bank: Bank) -> tuple[Bank, Mapping[str, bytes]]:
        """Return the bank with the parts of its concepts, and their pictures, where they are wanted."""
        return (bank, {}) if self._splitting is None else self._splitting.split(lessons, bank)


def train(repository: Repository, config: CraftConfig, report: Reporter) -> Outcome:
    """Learn and publish one bank with the concepts of all requested classes; see ``train_classes``."""
    return train_classes(repository, config, report, Craft, extend=Craft.with_parts)


TRAINER = Trainer("craft", "Learn concepts of each class by NMF of crops (CRAFT).", CraftConfig, train)
