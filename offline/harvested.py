"""Vectors of a layer that a training learns from: harvested where they are not there yet, or kept in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ByteSize, Field

from concepts.errors import AlreadyExists
from offline.free import FreeConfig
from offline.store.harvest import harvest
from offline.store.reading import Store
from offline.store.settings import Dtype, HarvestSettings, Sampling
from offline.task import Task


class HarvestedConfig(FreeConfig):
    """What decides which vectors are learned from."""

    sampling: Sampling = Field("attribution", description="How positions are drawn: attribution, uniform or all.")
    positions: int | None = Field(None, ge=1, description="Positions an image; default: 72·512 / channels.")
    dtype: Dtype = Field("float16", description="Of the stored vectors: float16 or float32.")
    image_limit: int | None = Field(None, ge=1, description="Most training images, in images; default: all.")
    disk_budget: ByteSize | None = Field(None, ge=1, description="Most bytes of stored vectors, e.g. 20GB.")
    store: Path | None = Field(
        None,
        description="Folder of vectors, as `whence-bank harvest` makes it, kept afterwards; default: below the "
        "repository, removed when the banks are published. A training that was stopped goes on by the same command.",
    )

    def harvest_settings(self) -> HarvestSettings:
        """Return what to harvest."""
        return HarvestSettings(
            sampling=self.sampling,
            positions=self.positions,
            dtype=self.dtype,
            classes=self.classes,
            limit=self.image_limit,
            disk_budget=self.disk_budget,
            seed=self.seed,
            batch_size=self.batch_size,
        )


Config = TypeVar("Config", bound=HarvestedConfig)


def vectors_of(task: Task[Config], workspace: Path) -> Store:
    """Return the vectors to learn from, harvested where they are not there yet.

    Parameters
    ----------
    task
        Of the training.
    workspace
        Where they lie if the configuration names no folder.

    Raises
    ------
    AlreadyExists
        If the folder holds what was harvested otherwise.
    InvalidInput, InvalidCut, NotTrainable
        If nothing can be harvested; see ``harvest``.
    """
    config = task.config
    place = config.store or workspace / "vectors"
    try:
        return harvest(task.model, task.cut, task.training, place, config.harvest_settings(), task.report)
    except AlreadyExists as error:
        if config.store is not None:
            raise
        left = "/".join(place.parts[-5:])
        raise AlreadyExists(
            f"{error.message}, by --store; or delete {left} below the repository, which a training that was not "
            "finished has left there"
        ) from error
