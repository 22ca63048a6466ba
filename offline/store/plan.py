"""What a store is to hold, decided before the first image is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import ByteSize

from concepts.cut import Cut
from concepts.errors import CorruptData, InvalidInput, InvalidModel
from concepts.model import Model
from concepts.preprocessing import Preprocessing
from offline.images import ImageFolder, shuffled
from offline.store.settings import Dtype, HarvestSettings, Sampling

SCHEMA = 1

_ORIGIN_BYTES = 8
_FIELD_WORDS = {"images_digest": "images", "shard_images": "images a shard"}


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a store, but for the images' own."""

    model: str
    weights_digest: str
    preprocessing: Preprocessing
    layer: str
    channels: int
    sampling: Sampling
    positions: int
    """An image."""
    positions_wanted: int
    """More than ``positions`` where these did not fit the disk budget."""
    dtype: Dtype
    seed: int
    images: int
    images_digest: str
    """sha256 over their keys, in order of visit."""
    shard_images: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector."""
        return self.channels * _item_bytes(self.dtype)

    @property
    def shards(self) -> int:
        """How many shards the images make."""
        return -(-self.images // self.shard_images)

    def shard(self, number: int) -> range:
        """Return the images of a shard, by their places in the order of visit."""
        return range(number * self.shard_images, min((number + 1) * self.shard_images, self.images))

    def difference(self, other: Plan) -> str | None:
        """Say in what another plan differs from this one, or None."""
        for name in (field.name for field in fields(self)):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                return f"{_FIELD_WORDS.get(name, name.replace('_', ' '))} {mine!r}, not {others!r}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which ``from_json`` rebuilds it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Rebuild from ``to_json``'s object; ``CorruptData`` if something is missing or of another schema."""
        try:
            found = dict(value)
            if found.pop("schema") != SCHEMA:
                raise CorruptData(f"the store has schema {value['schema']!r}; this version reads schema {SCHEMA}")
            return cls(**found | {"preprocessing": Preprocessing.from_json(found["preprocessing"])})
        except (KeyError, TypeError, ValueError, InvalidModel) as error:
            raise CorruptData(f"the plan of the store cannot be read: {error}") from error


def make_plan(model: Model, cut: Cut, folder: ImageFolder, settings: HarvestSettings) -> tuple[Plan, list[str]]:
    """Decide what to harvest; return it with the images' keys in order of visit.

    Raises
    ------
    InvalidInput
        If a class has no images, or not even one position an image fits the disk budget.
    """
    keys = shuffled(_members(folder, settings.classes), settings.seed)[: settings.limit]
    available, channels = cut.layout.positions, cut.layout.channels
    wanted = available if settings.sampling == "all" else settings.positions or max(1, 72 * 512 // channels)
    wanted = min(wanted, available)
    positions = _within(settings.disk_budget, wanted, channels, keys, settings)
    sampling = "uniform" if settings.sampling == "all" and positions < wanted else settings.sampling
    row_bytes = channels * _item_bytes(settings.dtype) + _ORIGIN_BYTES
    plan = Plan(
        model=model.spec.name,
        weights_digest=model.spec.weights_digest,
        preprocessing=model.spec.preprocessing,
        layer=cut.layer,
        channels=channels,
        sampling=sampling,
        positions=positions,
        positions_wanted=wanted,
        dtype=settings.dtype,
        seed=settings.seed,
        images=len(keys),
        images_digest=hashlib.sha256("\0".join(keys).encode()).hexdigest(),
        shard_images=max(1, settings.shard_size // (positions * row_bytes)),
    )
    return plan, keys


def planned_bytes(positions: int, channels: int, keys: Sequence[str], settings: HarvestSettings) -> int:
    """Return what a store takes on disk, at most, in bytes."""
    image = positions * (channels * _item_bytes(settings.dtype) + _ORIGIN_BYTES)
    names = sum(2 * len(json.dumps(key, ensure_ascii=False).encode()) + 80 for key in keys)
    shards = -(-len(keys) // max(1, settings.shard_size // image))
    # Sums are numbers of 26 characters; beside them, headers, sizes and digests.
    return len(keys) * image + names + shards * (26 * channels + 1200) + 26 * channels + 4096


def _within(budget: int | None, wanted: int, channels: int, keys: Sequence[str], settings: HarvestSettings) -> int:
    """Return how many positions an image fit the budget, at most ``wanted``."""
    if budget is None or planned_bytes(wanted, channels, keys, settings) <= budget:
        return wanted
    least = planned_bytes(1, channels, keys, settings)
    if least > budget:
        raise InvalidInput(
            f"one position an image takes {least} bytes ({in_words(least)}), the disk budget is {in_words(budget)}: "
            "raise it, or limit the images"
        )
    fits, too_many = 1, wanted
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if planned_bytes(middle, channels, keys, settings) <= budget:
            fits = middle
        else:
            too_many = middle
    return fits


def _members(folder: ImageFolder, classes: Sequence[str]) -> Sequence[str]:
    """Return the images in the folders of some classes, or all."""
    if not classes:
        return folder.keys
    labels = [folder.label(key) for key in folder.keys]
    for name in classes:
        if name not in labels:
            present = ", ".join(sorted({label for label in labels if label})[:10]) or "none"
            raise InvalidInput(f"there are no images of class {name!r}; folders of classes that hold some: {present}")
    return [key for key, label in zip(folder.keys, labels, strict=True) if label in classes]


def in_words(size: int) -> str:
    """Return a number of bytes for people: ``1.3GB``."""
    return ByteSize(size).human_readable(decimal=True)


def _item_bytes(dtype: Dtype) -> int:
    return 2 if dtype == "float16" else 4
