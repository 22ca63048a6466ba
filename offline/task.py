"""What every training begins with: the model, cut; its images, split; and the classes that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from concepts import devices
from concepts.cut import Cut
from concepts.model import Model
from concepts.repository import Repository
from offline.config import TrainingConfig
from offline.images import ImageFolder, Stream, open_folder, split
from offline.progress import Reporter

Config = TypeVar("Config", bound=TrainingConfig)
Config_co = TypeVar("Config_co", bound=TrainingConfig, covariant=True)


@dataclass(frozen=True)
class Task(Generic[Config_co]):
    """What all steps of one training share."""

    model: Model
    cut: Cut
    training: ImageFolder
    held_out: ImageFolder
    config: Config_co
    report: Reporter
    skipped_images: dict[str, str] = field(default_factory=dict)
    """Why an image was left out, by key."""

    def stream(self, folder: ImageFolder, keys: Sequence[str], batch_size: int | None = None) -> Stream:
        """Return images as they are decoded."""
        preprocessing = self.model.spec.preprocessing
        return Stream(folder, keys, preprocessing, batch_size or self.config.batch_size, self.skipped_images)

    def labels(self, folder: ImageFolder, keys: Sequence[str]) -> Tensor | None:
        """Return the true classes of images; None if the folder of any does not tell."""
        names = {name: index for index, name in enumerate(self.model.spec.class_names)}
        indices = [names.get(folder.label(key) or "", -1) for key in keys]
        return None if -1 in indices else torch.tensor(indices)

    def classes(self) -> list[int]:
        """Return the classes that are wanted, all where none is named.

        Raises
        ------
        UnknownClass
            If the model does not have one.
        """
        chosen = dict.fromkeys(self.config.classes) or dict.fromkeys(self.model.spec.class_names)
        return sorted(self.model.spec.class_index(name) for name in chosen)


def open_task(repository: Repository, config: Config, report: Reporter) -> Task[Config]:
    """Load the model, cut it, and find its images.

    Raises
    ------
    UnknownModel, UnknownLayer, InvalidCut, InvalidInput
        If the configuration does not fit the model, the repository or this machine.
    """
    model = repository.load_model(config.model, devices.choose(config.device))
    cut = model.cut(config.layer)
    training = open_folder(config.images)
    if isinstance(config.held_out, float):
        training, held_out = split(training, config.held_out, config.seed)
    else:
        held_out = open_folder(config.held_out)
    return Task(model, cut, training, held_out, config, report)
