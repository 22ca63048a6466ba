"""Matrices of crops (CRAFT, section 3.1): what a class is factorised from, and which crops excite a concept most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from concepts.cut import Cut
from concepts.errors import InvalidInput
from concepts.model import Model
from concepts.preprocessing import Box
from offline import exemplars
from offline.crops import CropGrid
from offline.exemplars import Excerpt
from offline.per_class.config import PerClassConfig
from offline.refusals import negative_activations
from offline.task import Task


class CropConfig(PerClassConfig):
    """What decides how images are cut into crops."""

    patch_size: int | None = Field(
        None, ge=2, description="Side of a crop, in pixels of the model's view; default: 64, or half the view if less."
    )
    enlarge: bool | None = Field(
        None, description="Enlarge crops to the model's input size; default: only where it takes no other size."
    )


@dataclass(frozen=True)
class Crops:
    """The crops of a class's images; N crops."""

    vectors: Tensor
    """What was taken of their activations, ``[N, …]``, image by image."""
    keys: list[str]
    """Of the images."""
    boxes: list[Box]
    """Where in each image its view lies."""
    digests: dict[str, str]


@dataclass(frozen=True)
class Cropping:
    """How the images of a task are cut."""

    task: Task[CropConfig]
    grid: CropGrid

    @classmethod
    def of(cls, task: Task[CropConfig]) -> Cropping:
        """Choose crops for a task.

        Raises
        ------
        InvalidInput
            If the patches do not fit the model.
        """
        config, view = task.config, task.model.spec.preprocessing
        patch_size = config.patch_size or min(64, min(view.height, view.width) // 2)
        return cls(task, _grid(task.model, task.cut, patch_size, config.enlarge))

    @property
    def resolved(self) -> dict[str, Any]:
        """What was left to it, as it chose it."""
        return {"patch_size": self.grid.patch_size, "enlarge": self.grid.enlarge}

    def cut(self, keys: Sequence[str], taken: Callable[[Tensor], Tensor]) -> Crops:
        """Return the crops of images.

        Parameters
        ----------
        keys
            Of the images.
        taken
            From activations of crops at their places in the image, float32 ``[n, P, C]`` ≥ 0, to what is kept of them.

        Raises
        ------
        NotTrainable
            If an activation is negative.
        """
        task, kept = self.task, []
        crops = Crops(torch.empty(0), [], [], {})
        for batch in task.stream(task.training, keys, max(1, task.config.batch_size // self.grid.count)):
            with torch.no_grad():
                a = task.cut.trunk(self.grid.crops(task.model.inputs(batch.views)))
            if bool((a < 0).any()):
                raise negative_activations(task.model, task.cut.layer)
            kept.append(taken(task.cut.positions(a)[:, task.cut.layout.tokens :]))
            crops.keys.extend(batch.keys)
            crops.boxes.extend(batch.boxes)
            crops.digests.update(zip(batch.keys, batch.digests, strict=True))
        return replace(crops, vectors=torch.cat(kept))

    def excerpts(self, crops: Crops, codes: Tensor) -> list[list[Excerpt]]:
        """Return the crops that excite each concept most, by codes ``[N, K]``."""
        return [
            [Excerpt(crops.keys[c.image], self.grid.box(c.crop, crops.boxes[c.image]), c.activation) for c in best]
            for best in exemplars.choose(codes, self.grid.count, self.task.config.exemplars)
        ]


def _grid(model: Model, cut: Cut, patch_size: int, enlarge: bool | None) -> CropGrid:
    """Choose how crops go in: as they are where the model takes them so, enlarged elsewhere.

    CRAFT enlarges them. Then a concept is learned at a scale that the images to explain do not have, and its codes
    reconstruct them badly: on CIFAR-10 (ResNet-20, layer3) the model keeps its prediction on 76 % of held-out images,
    against 99 % with crops as they are.
    """
    view = model.spec.preprocessing
    grid = CropGrid.of(view, patch_size, enlarge=bool(enlarge))
    blank = torch.zeros(1, view.channels, view.height, view.width, device=model.device)
    try:
        cut.trunk(grid.crops(blank))
    except (RuntimeError, AssertionError) as error:  # torchvision's transformers assert their input size
        if enlarge is None:
            return replace(grid, enlarge=True)
        raise InvalidInput(
            f"model {model.spec.name!r} cannot take crops of {patch_size} pixels as they are: leave out --no-enlarge"
        ) from error
    return grid
