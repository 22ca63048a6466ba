"""Memory of offline work on activations ten times larger than what it may take: writing, reading and training."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import measure
from concepts.preprocessing import Preprocessing
from offline.sae.settings import Reading, SaeSettings
from offline.sae.training import train
from offline.store.plan import Plan
from offline.store.reading import Store
from offline.store.shards import Rows, drafting

ALLOWANCE = 384 * 2**20
CHANNELS, POSITIONS = 512, 72
SHARD_IMAGES = 400
BATCH = 4096
SIZE = 1024, 8


def main() -> None:
    """Write a store as a harvest does, read it and train on it; compare peaks of resident memory with the allowance."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "store"
        shards = -(-10 * ALLOWANCE // (SHARD_IMAGES * POSITIONS * CHANNELS * 2))
        written = peak_over_baseline(lambda: write(path, shards))
        read = peak_over_baseline(lambda: read_epoch(path))
        trained = peak_over_baseline(lambda: train_epoch(path))
        size = Store.open(path).bytes
    rows = [
        measure.row(
            f"memory: {what} {size / 2**20:.0f} MiB of activations, peak over baseline",
            peak / 2**20,
            "MiB",
            baseline="allowance",
            baseline_value=ALLOWANCE / 2**20,
            higher_is_better=False,
            target=1.0,
        )
        for what, peak in (
            ("writing", written),
            ("reading an epoch of", read),
            ("training an SAE for an epoch on", trained),
        )
    ]
    measure.publish("memory", rows)


def write(path: Path, shards: int) -> None:
    """Write shards of random vectors, of as many images each as a harvest would."""
    images = shards * SHARD_IMAGES
    view = Preprocessing(224, 224)
    plan = Plan(
        "m", "", view, "layer", CHANNELS, "uniform", POSITIONS, POSITIONS, "float16", 0, images, "", SHARD_IMAGES
    )
    random = np.random.default_rng(0)
    with drafting(path, plan, 0) as draft:
        for number in draft.missing():
            places = plan.shard(number)
            keys = [f"class/{place:09d}.jpg" for place in places]
            vectors = random.standard_normal((len(places) * POSITIONS, CHANNELS), np.float32).astype(np.float16)
            origins = np.stack(np.meshgrid(places, range(POSITIONS), indexing="ij"), -1).reshape(-1, 2)
            draft.write(number, Rows(vectors, origins.astype(np.int32), keys, dict.fromkeys(keys, "0" * 64), {}))
        draft.finish()


def read_epoch(path: Path) -> None:
    """Read every vector once."""
    store = Store.open(path)
    read = sum(len(batch) for batch in store.batches(BATCH, seed=0, epoch=0))
    if read != len(store):
        raise RuntimeError(f"{read} vectors were read of {len(store)}")


def train_epoch(path: Path) -> None:
    """Train a dictionary on every vector once."""
    train(Store.open(path), [SaeSettings(*SIZE)], Reading(BATCH, epochs=1))


def peak_over_baseline(work: Callable[[], None]) -> int:
    """Return by how many bytes the resident memory rose above what it was, at most, while work was done."""
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    before = status("VmRSS")
    work()
    return max(0, status("VmHWM") - before)


def status(name: str) -> int:
    """Return what the system says of this process's memory, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"this system does not tell {name}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
