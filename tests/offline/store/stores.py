"""Stores of known vectors, written without a model, and what a folder holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from concepts.preprocessing import Preprocessing
from offline.store.plan import Plan
from offline.store.reading import Store
from offline.store.shards import Rows, drafting


def numbered(path: Path, sizes: list[int], channels: int = 3, dtype: str = "float32", **how: int) -> Store:
    """Write a store with shards of some sizes; the first channel tells the vectors apart, from 0 on."""
    view = Preprocessing(8, 8)
    plan = Plan("m", "0" * 64, view, "layer", channels, "all", 1, 1, dtype, 0, len(sizes), "", shard_images=1)
    first = 0
    with drafting(path, plan, 0) as draft:
        for number, size in enumerate(sizes):
            vectors = np.random.default_rng(number).normal(size=(size, channels)).astype(dtype)
            vectors[:, 0] = np.arange(first, first + size)
            origins = np.stack([np.full(size, number), np.arange(size)], 1).astype(np.int32)
            draft.write(number, Rows(vectors, origins, [f"{number}.png"], {f"{number}.png": "0" * 64}, {}))
            first += size
        draft.finish()
    return Store.open(path, **how)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def every_row(store: Store) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Return all vectors and origins, as they lie."""
    shards = [store.shard(number) for number in range(len(store.rows))]
    return np.concatenate([s.vectors for s in shards]).astype(float), np.concatenate([s.origins for s in shards])
