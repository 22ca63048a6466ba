"""A thousand crops against a million captions of 512 dimensions, top 5, exact: speed beside a bare product, and memory.

Speed is counted in the operations that the products alone need. The baseline multiplies float32 matrices that are in
memory, in the blocks of the search, and looks at no result. A search of a vocabulary that was just opened also checks
the sha256 of every shard.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import measure
from benchmarks.memory import status
from offline.vocabulary import SHARD_CAPTIONS, Vocabulary
from offline.vocabulary.files import Plan, drafting
from offline.vocabulary.search import BLOCK_CAPTIONS, Nearest

CAPTIONS, WIDTH, QUERIES, K = 1_000_000, 512, 1000, 5
REPEATS = 5
CHECKED = 8
"""Queries whose captions are looked for again, in float64."""

RAM_MIB = 2048


def main() -> None:
    """Measure rates and peaks of resident memory; check some of what is found."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "vocabulary"
        write(path)
        torch.manual_seed(0)
        queries = functional.normalize(torch.randn(QUERIES, WIDTH), dim=1)
        vocabulary = Vocabulary.open(path)
        with Peak() as peak:
            found = vocabulary.nearest(queries, K)
        check(vocabulary, queries[:CHECKED], found)
        block, products = torch.randn(BLOCK_CAPTIONS, WIDTH), torch.empty(QUERIES, BLOCK_CAPTIONS)
        seconds = measure.interleaved(
            {
                "product": lambda: product(queries, block, products),
                "search": lambda: vocabulary.nearest(queries, K),
                "first search": lambda: Vocabulary.open(path).nearest(queries, K),
            },
            REPEATS,
        )
    rate = {name: 2e-9 * QUERIES * CAPTIONS * WIDTH / time for name, time in seconds.items()}
    rows = [
        measure.row(
            f"vocabulary_search: {QUERIES} × {CAPTIONS:,} × {WIDTH}, top {K}{more}",
            rate[name],
            "GFLOP/s",
            baseline="float32 product alone",
            baseline_value=rate["product"],
            target=0.5,
        )
        for name, more in (("search", ""), ("first search", ", just opened"))
    ]
    memory = measure.row(
        "vocabulary_search: peak resident memory of the process, mapped files included",
        peak.all / 2**20,
        "MiB",
        baseline="allowance",
        baseline_value=RAM_MIB,
        higher_is_better=False,
        target=1.0,
    )
    measure.publish(
        "vocabulary_search", [*rows, memory], peak_without_mapped_files_mib=round(peak.anonymous / 2**20, 1)
    )


def write(path: Path) -> None:
    """Write a vocabulary of random embeddings."""
    with drafting(path, Plan("", WIDTH, "", SHARD_CAPTIONS)) as draft:
        starts = range(0, CAPTIONS, SHARD_CAPTIONS)
        for number, first in enumerate(starts):
            indices = range(first, min(first + SHARD_CAPTIONS, CAPTIONS))
            rows = np.random.default_rng(number).standard_normal((len(indices), WIDTH), np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            draft.write(number, [f"caption {index}" for index in indices], rows)
        draft.finish("random", len(starts), {})


def product(queries: Tensor, block: Tensor, products: Tensor) -> None:
    """Multiply as often as a search does."""
    for first in range(0, CAPTIONS, BLOCK_CAPTIONS):
        count = min(BLOCK_CAPTIONS, CAPTIONS - first)
        torch.mm(queries, block[:count].T, out=products[:, :count])


def check(vocabulary: Vocabulary, queries: Tensor, found: Nearest) -> None:
    """Raise if a plain search in float64 finds other captions."""
    rows = [np.load(file, mmap_mode="r") for file in sorted(vocabulary.path.glob("*.embeddings.npy"))]
    cosines = np.concatenate([shard.astype(np.float64) @ queries.double().numpy().T for shard in rows])
    wanted = np.argsort(-cosines, axis=0, kind="stable")[:K].T
    if found.captions[: len(queries)].tolist() != wanted.tolist():
        raise RuntimeError("the captions are not the nearest ones")


class Peak:
    """Peaks of resident memory, in bytes, while work is done."""

    all = 0
    anonymous = 0
    """Without mapped files, as seen every few milliseconds."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._watcher.join()
        self.all = status("VmHWM")

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.anonymous = max(self.anonymous, status("RssAnon"))


if __name__ == "__main__":
    main()
