"""The concepts of one class, as they are learned, kept while others are, and found again after a stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from concepts.preprocessing import Box
from concepts.storage import LocalStorage
from offline.exemplars import Excerpt
from offline.importance import Importance


@dataclass(frozen=True)
class Lesson:
    """The K concepts of one class."""

    dictionary: Tensor
    """float32 ``[K, C]``, ≥ 0, rows of unit length, on the CPU."""
    excerpts: list[list[Excerpt]]
    """Of each concept, what excites it most, best first."""
    keys: list[str]
    """The training images, those to measure importance on first."""
    digests: Mapping[str, str]
    """sha256 of each of these, by key."""
    metrics: Mapping[str, float]
    """Of the learning itself."""
    importance: Importance | None = None

    def ranked(self, importance: Importance) -> Lesson:
        """Return the concepts in order of their total Sobol indices, largest first."""
        order = importance.total_sobol.argsort(descending=True, stable=True)
        return replace(
            self,
            dictionary=self.dictionary[order],
            excerpts=[self.excerpts[concept] for concept in order.tolist()],
            importance=replace(
                importance,
                total_sobol=importance.total_sobol[order],
                contribution=importance.contribution[order],
            ),
        )

    def measured(self) -> Importance:
        """Return the importance, which a ranked lesson has."""
        if self.importance is None:
            raise ValueError("the lesson is not ranked yet")
        return self.importance


class Lessons:
    """Finished lessons of one training in a folder, so that a training that was stopped learns no class twice.

    Parameters
    ----------
    folder
        Of this training alone; made when the first lesson is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, LocalStorage(folder)

    def keep(self, target: int, lesson: Lesson) -> None:
        """Write the ranked lesson of a class, whole or not at all."""
        importance = lesson.measured()
        tensors = {
            "dictionary": lesson.dictionary.contiguous(),
            "total_sobol": importance.total_sobol.contiguous(),
            "contribution": importance.contribution.contiguous(),
        }
        rest = {
            "excerpts": [[tuple(excerpt) for excerpt in excerpts] for excerpts in lesson.excerpts],
            "keys": lesson.keys,
            "digests": dict(lesson.digests),
            "metrics": dict(lesson.metrics),
            "images": importance.images,
        }
        self._files.write(_name(target), safetensors.torch.save(tensors, {"lesson": json.dumps(rest)}))

    def find(self, target: int) -> Lesson | None:
        """Return the lesson of a class as it was kept, to the last bit; None where there is none that can be read."""
        try:
            with safe_open(self._folder / _name(target), framework="pt") as stored:
                rest: dict[str, Any] = json.loads(stored.metadata()["lesson"])
                tensors = {name: stored.get_tensor(name) for name in ("dictionary", "total_sobol", "contribution")}
        except (FileNotFoundError, SafetensorError):
            return None
        return Lesson(
            dictionary=tensors["dictionary"],
            excerpts=[[_excerpt(*record) for record in records] for records in rest["excerpts"]],
            keys=rest["keys"],
            digests=rest["digests"],
            metrics=rest["metrics"],
            importance=Importance(tensors["total_sobol"], tensors["contribution"], rest["images"]),
        )


def _name(target: int) -> str:
    return f"{target:05d}.safetensors"


def _excerpt(key: str, box: list[float], activation: float) -> Excerpt:
    return Excerpt(key, Box(*box), activation)
