"""Harvesting a layer: run the trunk on every image once, and keep some of its positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.cut import Cut
from concepts.errors import InvalidCut, InvalidInput
from concepts.model import Model
from offline.images import ImageBatch, ImageFolder, Stream
from offline.progress import Reporter, silent
from offline.store import sampling
from offline.store.plan import Plan, make_plan, planned_bytes
from offline.store.reading import Store
from offline.store.settings import HarvestSettings
from offline.store.shards import Rows, drafting

_STAGE = "harvesting"


def harvest(
    model: Model,
    cut: Cut,
    folder: ImageFolder,
    path: Path,
    settings: HarvestSettings,
    report: Reporter = silent,
) -> Store:
    """Store activation vectors of a layer, or go on where an earlier harvest stopped.

    Work that was ended at any instant goes on by the same call, and the store becomes the same to the last byte, as far
    as the device computes the same again. Images that cannot be decoded, or whose activations are NaN or infinite, are
    left out with a reason. A store that is complete is opened, and no image is read.

    Parameters
    ----------
    model
        The model.
    cut
        It, cut at the layer.
    folder
        The images.
    path
        Folder of the store; made where there is none.
    settings
        What to harvest; the batch size alone may be another one when going on.
    report
        Hears of progress, in images.

    Raises
    ------
    AlreadyExists
        If the folder holds something else, or what was harvested otherwise, or another process writes into it.
    InvalidInput
        If a class has no images, the disk or its budget are too small, or values are beyond float16.
    InvalidCut
        If the activations are not of one shape.
    NotTrainable
        If no image gave any vector.
    """
    plan, keys = make_plan(model, cut, folder, settings)
    needed = planned_bytes(plan.positions, plan.channels, keys, settings)
    with drafting(path, plan, needed) as draft:
        if not draft.complete:
            draft.check_room()
            harvester = _Harvester(model, cut, folder, plan, settings.batch_size)
            for number in draft.missing():
                places = plan.shard(number)
                report(_STAGE, places.start, len(keys))
                draft.write(number, harvester.rows(keys, places, lambda done: report(_STAGE, done, len(keys))))
            draft.finish()
    report(_STAGE, len(keys), len(keys))
    return Store.open(path)


@dataclass(frozen=True)
class _Harvester:
    """Turns images into vectors."""

    model: Model
    cut: Cut
    folder: ImageFolder
    plan: Plan
    batch_size: int

    def rows(self, keys: Sequence[str], places: range, done: Callable[[int], None]) -> Rows:
        """Return the vectors of the images at some places in the order of visit."""
        chosen = keys[places.start : places.stop]
        place = dict(zip(chosen, places, strict=True))
        found = _Found()
        for batch in Stream(self.folder, chosen, self.model.spec.preprocessing, self.batch_size, found.skipped):
            self._take(batch, place, found)
            done(place[batch.keys[-1]])
        vectors, origins = (np.empty((0, self.plan.channels), self.plan.dtype), np.empty((0, 2), np.int32))
        if found.vectors:
            vectors, origins = np.concatenate(found.vectors), np.concatenate(found.origins)
        return Rows(vectors, origins, chosen, found.digests, found.skipped)

    def _take(self, batch: ImageBatch, place: dict[str, int], found: _Found) -> None:
        """Draw positions of the images of a batch, and keep their vectors."""
        with torch.no_grad():
            a = self.cut.trunk(self.model.inputs(batch.views))
        layout = self.cut.layout
        if self.cut.positions(a).shape[1:] != (layout.positions, layout.channels):
            raise InvalidCut(
                f"layer {self.cut.layer!r} answers with activations of shape {list(a.shape[1:])} here, and of "
                f"{list(self.cut.shape)} elsewhere: vectors must be of one width",
                layer=self.cut.layer,
            )
        weights = self._weights(a)
        finite = a.flatten(1).isfinite().all(1).cpu().numpy()
        sound = finite & np.isfinite(weights).all(1)
        for row in np.flatnonzero(~sound):
            what = "attributions" if finite[row] else "activations"
            found.skipped[batch.keys[row]] = f"The model answers with {what} that are NaN or infinite."
        kept = np.flatnonzero(sound)
        if not len(kept):
            return
        names = [batch.keys[row] for row in kept]
        positions = sampling.draw(weights[kept], self.plan.positions, names, self.plan.seed)
        found.vectors.append(self._vectors(a, kept, positions))
        images = np.repeat([place[name] for name in names], self.plan.positions)
        found.origins.append(np.stack([images, positions.ravel()], 1).astype(np.int32))
        found.digests.update((batch.keys[row], batch.digests[row]) for row in kept)

    def _weights(self, a: Tensor) -> NDArray[np.float64]:
        """Return how likely each position is drawn, ``[B, P]``."""
        if self.plan.sampling == "attribution":
            return sampling.attribution(self.cut, a)
        return np.ones((len(a), self.cut.layout.positions))

    def _vectors(self, a: Tensor, images: NDArray[Any], positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return the vectors at positions ``[R, n]`` of some images, ``[R · n, C]``, in the store's type."""
        rows = torch.from_numpy(images).to(a.device).unsqueeze(1)
        vectors = self.cut.positions(a)[rows, torch.from_numpy(positions).to(a.device)].flatten(0, 1)
        vectors = vectors.to(getattr(torch, self.plan.dtype))
        if not bool(vectors.isfinite().all()):
            raise InvalidInput(
                f"layer {self.cut.layer!r} has values beyond what float16 can hold (65504): harvest it as float32, "
                "into another folder",
                layer=self.cut.layer,
            )
        return np.asarray(vectors.cpu().numpy())


@dataclass
class _Found:
    """What images gave so far."""

    vectors: list[NDArray[Any]] = field(default_factory=list)
    origins: list[NDArray[np.int32]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
