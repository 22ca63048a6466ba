"""Reading a store: every vector once an epoch, in random order, with memory that does not grow with the store."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, groupby
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.errors import CorruptData, InvalidInput, NotFound, WeightsMismatch
from concepts.model import ModelSpec
from offline.images import lot
from offline.store.permutation import permuted
from offline.store.plan import Plan
from offline.store.shards import PLAN, STORE, origins_file, read_json, record_file, size_of, vectors_file

BLOCK_ROWS = 16
"""Rows that are read together. Those of a shard are in random order: neighbours have nothing in common but that."""

WINDOW_BYTES = 32 * 2**20
"""Bytes of blocks that are read, and shuffled row by row, at a time."""

T = TypeVar("T")


class Shard(NamedTuple):
    """A part of a store, mapped from its files."""

    vectors: NDArray[Any]
    """``[n, C]``, float16 or float32."""
    origins: NDArray[np.int32]
    """``[n, 2]``: the image of each row, by its place in the order of visit, and its position."""
    keys: dict[int, str]
    """The images of the shard, by their places."""


@dataclass(frozen=True)
class Store:
    """A finished store of activation vectors; it is ``Vectors``."""

    path: Path
    plan: Plan
    rows: tuple[int, ...]
    """Of each shard."""
    mean: NDArray[np.float64]
    """Of the vectors, ``[C]``."""
    mean_square: float
    """Mean over the vectors of ‖a‖²."""
    images: int
    """How many gave vectors."""
    data_fingerprint: str
    """One sha256 over the images that gave vectors; see ``images.fingerprint``."""
    skipped: Mapping[str, str]
    """Why an image gave none, by key."""
    files: Mapping[str, Mapping[str, Any]]
    """Bytes and sha256 of each file."""
    block_rows: int = BLOCK_ROWS
    window_bytes: int = WINDOW_BYTES

    @classmethod
    def open(cls, path: Path, *, block_rows: int = BLOCK_ROWS, window_bytes: int = WINDOW_BYTES) -> Store:
        """Open a store; the size of every file is checked.

        Parameters
        ----------
        path
            Its folder.
        block_rows
            Vectors that are read together: fewer mix better, more are faster from slow disks. It changes the order.
        window_bytes
            How much is read, and shuffled vector by vector, at a time. It changes the order.

        Raises
        ------
        NotFound
            If there is no store, or its harvest is not finished.
        CorruptData
            If a file is not as long as it was, or cannot be read.
        """
        if not (path / STORE).is_file():
            started = (path / PLAN).is_file()
            raise NotFound(
                "the harvest of the store is not finished: the same command goes on"
                if started
                else "there is no store in that folder: make one by `whence-bank harvest`"
            )
        value = read_json(path, STORE)
        try:
            store = cls(
                path=path,
                plan=Plan.from_json(value["plan"]),
                rows=tuple(value["rows"]),
                mean=np.asarray(value["mean"], np.float64),
                mean_square=float(value["mean_square"]),
                images=int(value["images"]),
                data_fingerprint=value["data_fingerprint"],
                skipped=value["skipped"],
                files=value["files"],
                block_rows=block_rows,
                window_bytes=window_bytes,
            )
            sizes = {name: int(facts["bytes"]) for name, facts in store.files.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptData(f"{STORE} cannot be read: {error}") from error
        for name, size in sizes.items():
            if size_of(path / name) != size:
                raise CorruptData(f"{name} of the store has {size_of(path / name)} bytes, not {size}: harvest it anew")
        return store

    @property
    def channels(self) -> int:
        """C."""
        return self.plan.channels

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(facts["bytes"] for facts in self.files.values())

    def __len__(self) -> int:
        return sum(self.rows)

    def check(self, spec: ModelSpec, layer: str, channels: int) -> None:
        """Check that the vectors are from a layer of a model.

        Raises
        ------
        WeightsMismatch
            If they are from other weights.
        InvalidInput
            If they are from another layer, of another width, or from images that were prepared otherwise.
        """
        plan, weights = self.plan, spec.weights_digest
        if plan.weights_digest != weights:
            raise WeightsMismatch(
                f"the store is from weights {plan.weights_digest} of model {plan.model!r}, model {spec.name!r} has "
                f"{weights}: harvest it anew"
            )
        for what, stored, wanted in (
            ("layer", plan.layer, layer),
            ("channels", plan.channels, channels),
            ("preprocessing", plan.preprocessing, spec.preprocessing),
        ):
            if stored != wanted:
                raise InvalidInput(f"the store is from {what} {stored!r}, wanted is {wanted!r}: harvest it anew")

    def verify(self) -> None:
        """Check every byte.

        Raises
        ------
        CorruptData
            If a file is not what was written.
        """
        for name, facts in self.files.items():
            with (self.path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != facts["sha256"]:
                raise CorruptData(f"{name} of the store has digest {digest}, not {facts['sha256']}: harvest it anew")

    def shard(self, number: int) -> Shard:
        """Map a shard into memory."""
        record = read_json(self.path, record_file(number))
        return Shard(
            np.load(self.path / vectors_file(number), mmap_mode="r", allow_pickle=False),
            np.load(self.path / origins_file(number), mmap_mode="r", allow_pickle=False),
            dict(zip(self.plan.shard(number), record["keys"], strict=True)),
        )

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[Tensor]:
        """Yield every vector once, in an order that seed and epoch decide; see ``Vectors.batches``.

        Blocks of ``block_rows`` neighbours come in a random order over the whole store, and the rows of the blocks of a
        window are shuffled. The next batch is read while one is used: two windows and at most three batches are in
        memory.

        Raises
        ------
        InvalidInput
            If the numbers make no sense.
        CorruptData
            While reading, if a file is shorter than it was.
        """
        if batch_size < 1 or start < 0 or not 0 <= part < parts:
            raise InvalidInput(f"there is no part {part} of {parts} of batches of {batch_size} from {start} on")
        return _ahead(self._batches(batch_size, seed, epoch, start, part, parts))

    def _batches(self, batch_size: int, seed: int, epoch: int, start: int, part: int, parts: int) -> Iterator[Tensor]:
        left = len(self) - start * batch_size
        size = seen = filled = 0
        for rows in self._windows(seed, epoch, start * batch_size):
            at = 0
            while at < len(rows):
                if seen == size:  # the last one is full
                    size, seen, filled = min(batch_size, left), 0, 0
                    batch = _empty(len(range(part, size, parts)), self.channels)
                taken = min(size - seen, len(rows) - at)
                mine = torch.from_numpy(rows[at + (part - seen) % parts : at + taken : parts])
                batch[filled : filled + len(mine)] = mine
                at, seen, filled = at + taken, seen + taken, filled + len(mine)
                if seen == size:
                    left -= size
                    yield batch

    def _windows(self, seed: int, epoch: int, skip: int) -> Iterator[NDArray[Any]]:
        """Yield the rows of an epoch in order, a window at a time, without the first ``skip``; valid until the next."""
        total = len(self)
        blocks = -(-total // self.block_rows)
        width = max(1, self.window_bytes // (self.block_rows * self.plan.row_bytes))
        key = lot(f"{epoch}", f"blocks {seed}")
        read, shuffled = (np.empty((min(width * self.block_rows, total), self.channels), self.plan.dtype) for _ in "ab")
        for first in range(0, blocks, width):
            places = np.arange(first, min(first + width, blocks))
            starts = np.sort(permuted(places, blocks, key)) * self.block_rows
            count = int(np.minimum(starts + self.block_rows, total).sum() - starts.sum())
            if skip < count:
                order = np.random.default_rng((seed, epoch, first)).permutation(count)[skip:]
                self._read(starts, read)
                yield np.take(read, order, axis=0, out=shuffled[: len(order)], mode="clip")  # the others buffer
            skip = max(0, skip - count)

    def _read(self, starts: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Read blocks one after another into ``[n, C]``; ``starts`` ascend."""
        target, width, at = rows.data.cast("B"), self.plan.row_bytes, 0
        for number, ranges in groupby(self._ranges(starts), lambda found: found[0]):
            name = vectors_file(number)
            header = self.files[name]["bytes"] - self.rows[number] * width
            with (self.path / name).open("rb", buffering=0) as file:
                for _, first, last in ranges:
                    end = at + (last - first) * width
                    if os.preadv(file.fileno(), [target[at:end]], header + first * width) != end - at:
                        raise CorruptData(f"{name} of the store is shorter than it was: harvest it anew")
                    at = end

    def _ranges(self, starts: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield where the rows of blocks are: shard, first and last row in it, the last exclusive."""
        ends = list(accumulate(self.rows))
        for start in starts.tolist():
            end = min(start + self.block_rows, ends[-1])
            while start < end:
                number = bisect_right(ends, start)
                stop = min(end, ends[number])
                before = ends[number] - self.rows[number]
                yield number, start - before, stop - before
                start = stop


def _empty(rows: int, channels: int) -> Tensor:
    """Return room for a batch, straight from the system.

    An allocator keeps blocks of this size when they are freed by another thread, many times what is in use.
    """
    if not rows:
        return torch.empty(0, channels)
    return torch.frombuffer(mmap(-1, 4 * rows * channels), dtype=torch.float32).view(rows, channels)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items while a thread makes the next one."""
    with ThreadPoolExecutor(1, thread_name_prefix="vectors") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
