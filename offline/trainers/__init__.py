"""Trainers of banks. Each is one module of this package that ends with a ``TRAINER``; nothing else knows it by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from concepts.bank import Bank
from concepts.repository import Repository
from offline.config import TrainingConfig
from offline.progress import Reporter


@dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    banks: tuple[Bank, ...]
    """As published, one or more."""
    skipped_classes: Mapping[str, str] = field(default_factory=dict)
    """Why a class has no concepts, by name."""
    skipped_images: Mapping[str, str] = field(default_factory=dict)
    """Why an image was left out, by key."""

    @property
    def bank(self) -> Bank:
        """The first bank."""
        return self.banks[0]


@dataclass(frozen=True)
class Trainer:
    """A way to learn banks."""

    name: str
    """The sub-command."""
    summary: str
    """One line of help."""
    config: type[TrainingConfig]
    train: Callable[[Repository, Any, Reporter], Outcome]
    """Learn and publish banks; the configuration is of the type above."""


def trainers() -> list[Trainer]:
    """Return all trainers, by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return sorted((module.TRAINER for module in modules), key=lambda trainer: trainer.name)
