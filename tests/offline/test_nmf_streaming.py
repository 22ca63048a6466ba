"""NMF of vectors that are read pass by pass: as good as in memory, and in memory that does not grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from concepts.errors import NotTrainable
from concepts.preprocessing import Preprocessing
from offline.images import Stream, open_folder
from offline.nmf import Penalties, best_of, factorise_stream, projected_gradient
from offline.store.plan import Plan
from offline.store.reading import Store
from offline.store.shards import Rows, drafting
from tests.offline.worlds import MODEL, cifar, repository

PENALTIES = Penalties(codes_l1=0.05, dictionary_l1=0.05, l2=0.05)


def stored(path: Path, rows: np.ndarray, shard: int = 2000) -> Store:
    """Write rows as a store."""
    parts = [rows[first : first + shard] for first in range(0, len(rows), shard)]
    view = Preprocessing(8, 8)
    plan = Plan("m", "0" * 64, view, "l", rows.shape[1], "all", 1, 1, "float32", 0, len(parts), "", shard_images=1)
    with drafting(path, plan, 0) as draft:
        for number, part in enumerate(parts):
            origins = np.stack([np.full(len(part), number), np.arange(len(part))], 1).astype(np.int32)
            name = f"{number}.png"
            draft.write(number, Rows(part.astype(np.float32), origins, [name], {name: "0" * 64}, {}))
        draft.finish()
    return Store.open(path)


@pytest.fixture(scope="module")
def positions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Tensor]:
    """Every position of some real images, in a store and in memory."""
    root = tmp_path_factory.mktemp("streaming")
    model = repository(root / "repository").load_model(MODEL)
    cut, folder = model.cut("layer3"), open_folder(cifar() / "test")
    (batch,) = Stream(folder, folder.keys[::15], model.spec.preprocessing, 100, {})
    with torch.no_grad():
        rows = cut.positions(cut.trunk(model.inputs(batch.views))).flatten(0, 1)
    rows[::50] = 0
    return stored(root / "store", rows.numpy()), rows.double()


@pytest.mark.parametrize("penalties", [None, PENALTIES])
def test_it_reaches_what_is_reached_in_memory(positions, penalties):
    store, rows = positions
    inside = best_of(rows, 12, penalties=penalties, tolerance=1e-4)
    found = factorise_stream(store, 12, sample=2000, batch_size=1000, penalties=penalties)
    assert found.residual <= 1e-3
    assert 1 < found.passes < 30
    assert found.objective <= 1.01 * float(inside.objective)
    assert bool((found.dictionary >= 0).all())
    torch.testing.assert_close(found.dictionary.norm(dim=1), torch.ones(12, dtype=torch.float64))


def test_what_it_tells_is_what_holds_in_memory(positions):
    store, rows = positions
    found = factorise_stream(store, 8, sample=1000, batch_size=1000)
    from scipy.optimize import nnls

    atoms = found.dictionary.T.numpy()
    codes = torch.from_numpy(np.stack([nnls(atoms, row)[0] for row in rows.numpy()]))
    error = 0.5 * (rows - codes @ found.dictionary).square().sum()
    assert found.objective == pytest.approx(float(error), rel=1e-6)
    residual = projected_gradient(rows[None], codes[None], found.dictionary[None])
    assert found.residual == pytest.approx(float(residual), rel=1e-3)


@pytest.mark.parametrize("penalties", [None, PENALTIES])
def test_passes_go_down_to_a_stationary_point(positions, penalties):
    store, _ = positions
    heard: list[tuple[int, float, float]] = []
    how = {"sample": 500, "batch_size": 3000, "tolerance": 1e-5, "max_passes": 60, "penalties": penalties}
    found = factorise_stream(store, 6, listener=lambda *seen: heard.append(seen), **how)
    assert [number for number, *_ in heard] == list(range(1, found.passes + 1))
    objectives = [objective for _, objective, _ in heard]
    assert objectives == sorted(objectives, reverse=True)
    assert heard[-1][2] < 0.1 * heard[0][2]
    # A stop on the way gives the best place so far.
    short = factorise_stream(store, 6, **(how | {"max_passes": 3}))
    assert (short.passes, short.objective, short.residual) == heard[2]


def test_same_seed_same_bits_and_random_starts_differ(positions):
    store, _ = positions
    how = {"sample": 500, "batch_size": 3000, "max_passes": 2}
    first, again = (factorise_stream(store, 6, seed=1, **how) for _ in range(2))
    assert torch.equal(first.dictionary, again.dictionary)
    begun = [factorise_stream(store, 6, seed=seed, random_start=True, **how).dictionary for seed in (1, 1, 2)]
    assert torch.equal(begun[0], begun[1])
    assert not torch.allclose(begun[0], begun[2], atol=1e-2)


def test_a_few_vectors_among_zeros_are_found(tmp_path):
    rows = np.zeros((2000, 8))
    rows[::100] = np.random.default_rng(0).random((20, 8))
    found = factorise_stream(stored(tmp_path / "s", rows), 3, sample=5, batch_size=64)
    alone = best_of(torch.from_numpy(rows[::100]).float().double(), 3)
    assert found.residual <= 1e-3
    assert found.objective <= 1.01 * float(alone.objective)


@pytest.mark.parametrize(
    ("change", "rank", "words"),
    [
        (lambda rows: rows, 9, "9 concepts do not fit 60 vectors of 8 channels"),
        (lambda rows: rows[:4], 5, "5 concepts do not fit 4 vectors"),
        (lambda rows: rows * 0, 2, "all zero"),
        (lambda rows: rows * (np.arange(len(rows)) < 3)[:, None], 5, "5 concepts do not fit 3 vectors"),
        (lambda rows: np.where(np.arange(len(rows))[:, None] == 55, -rows, rows), 2, "negative"),
        (lambda rows: np.where(np.arange(len(rows))[:, None] == 55, np.nan, rows), 2, "NaN"),
    ],
)
def test_bad_vectors_are_refused_with_a_reason(tmp_path, change, rank, words):
    rows = np.random.default_rng(0).random((60, 8)) + 0.1
    store = stored(tmp_path / "s", change(rows))
    with pytest.raises(NotTrainable, match=words):
        factorise_stream(store, rank, sample=20, batch_size=16)


_PEAK = """
import json, sys
from pathlib import Path
from benchmarks.memory import peak_over_baseline
from offline.nmf import factorise_stream
from offline.store.reading import Store

small, large = (Store.open(Path(name), window_bytes=2**20) for name in sys.argv[1:])
how = {"sample": 1000, "batch_size": 1000, "max_passes": 1}
factorise_stream(small, 4, **how)
print(json.dumps([peak_over_baseline(lambda: factorise_stream(store, 4, **how)) for store in (small, large)]))
"""


def test_memory_does_not_grow_with_the_vectors(tmp_path):
    random = np.random.default_rng(0)
    small = stored(tmp_path / "small", random.random((8_000, 64), np.float32), shard=8_000)
    large = stored(tmp_path / "large", random.random((120_000, 64), np.float32), shard=8_000)
    command = [sys.executable, "-c", _PEAK, str(small.path), str(large.path)]
    peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peaks[1] - peaks[0] < 0.25 * (large.bytes - small.bytes)
