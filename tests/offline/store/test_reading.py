"""Reading a store: every vector once an epoch, in an order of its own, from any batch on, by parts, and checked."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from scipy import stats

from concepts.errors import CorruptData, InvalidInput, NotFound, WeightsMismatch
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from offline.store.reading import Store
from offline.store.shards import STORE, vectors_file
from tests.offline.store.stores import every_row, numbered

SIZES = [40, 0, 7, 1, 64, 33]
HOW = {"block_rows": 4, "window_bytes": 4 * 12 * 8}
"""Windows of 8 blocks."""


def order(store: Store, **where: int) -> list[int]:
    batches = store.batches(**{"batch_size": 20, "seed": 0, "epoch": 0} | where)
    return torch.cat([torch.empty(0, store.channels), *batches])[:, 0].int().tolist()


@pytest.mark.parametrize("block_rows", [1, 3, 16, 1000])
@pytest.mark.parametrize("window_bytes", [1, 500, 10**6])
def test_every_vector_comes_once_an_epoch(tmp_path, block_rows, window_bytes):
    store = numbered(tmp_path / "s", SIZES, block_rows=block_rows, window_bytes=window_bytes)
    assert len(store) == sum(SIZES)
    for epoch in range(3):
        batches = list(store.batches(20, seed=0, epoch=epoch))
        assert [len(batch) for batch in batches] == [20] * 7 + [5]
        assert all(batch.dtype == torch.float32 and batch.is_contiguous() for batch in batches)
        assert sorted(torch.cat(batches)[:, 0].int().tolist()) == list(range(len(store)))


def test_vectors_are_those_that_were_written(tmp_path):
    for dtype in ("float16", "float32"):
        store = numbered(tmp_path / dtype, SIZES, channels=5, dtype=dtype, **HOW)
        written, _ = every_row(store)
        read = torch.cat(list(store.batches(9, seed=1, epoch=0))).double().numpy()
        assert np.array_equal(read[read[:, 0].argsort()], written[written[:, 0].argsort()])
        assert np.allclose(store.mean, written.mean(0), rtol=1e-12)
        assert store.mean_square == pytest.approx((written**2).sum(1).mean(), rel=1e-12)


def test_seed_and_epoch_decide_the_order(tmp_path):
    store = numbered(tmp_path / "s", SIZES, **HOW)
    assert order(store) == order(store)
    assert len({tuple(order(store, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(store, batch_size=7) == order(store, batch_size=100)


@pytest.mark.parametrize("start", [0, 1, 3, 7, 8, 20])
def test_a_start_leaves_out_batches_and_changes_none(tmp_path, start):
    store = numbered(tmp_path / "s", SIZES, **HOW)
    assert order(store, start=start) == order(store)[start * 20 :]


def test_what_comes_before_the_start_is_not_read(tmp_path):
    store = numbered(tmp_path / "s", [32] * 20, **HOW)
    where = {"batch_size": 32, "start": 18}  # where a window begins
    expected = order(store, **where)
    gone = [n for n in range(20) if not set(expected) & set(range(32 * n, 32 * (n + 1)))]
    assert gone
    for number in gone:
        (store.path / vectors_file(number)).unlink()
    assert order(store, **where) == expected
    with pytest.raises(FileNotFoundError):
        order(store)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("batch_size", [1, 5, 20])
def test_parts_make_the_batch(tmp_path, parts, batch_size):
    store = numbered(tmp_path / "s", SIZES, **HOW)
    whole = store.batches(batch_size, seed=0, epoch=0, start=1)
    readers = [store.batches(batch_size, seed=0, epoch=0, start=1, part=part, parts=parts) for part in range(parts)]
    for batch, *shares in zip(whole, *readers, strict=True):
        for part, share in enumerate(shares):
            assert torch.equal(share, batch[part::parts])


def test_a_vector_comes_anywhere_equally_often(tmp_path):
    store = numbered(tmp_path / "s", [17, 23], **HOW)
    place = np.array([order(store, epoch=epoch).index(5) for epoch in range(2000)])
    assert stats.chisquare(np.bincount(place // 4, minlength=10)).pvalue > 1e-4


def test_neighbours_in_the_store_are_far_apart_in_an_epoch(tmp_path):
    store = numbered(tmp_path / "s", [1000] * 8, block_rows=16, window_bytes=16 * 12 * 60)
    shards = np.array(order(store, batch_size=400)).reshape(-1, 400) // 1000
    shares = np.stack([np.bincount(batch, minlength=8) for batch in shards])
    assert shares.min() > 0


def test_leaving_early_ends_the_thread(tmp_path):
    store = numbered(tmp_path / "s", [500] * 10)
    before = threading.active_count()
    for _batch in store.batches(10, seed=0, epoch=0):
        break
    del _batch
    assert threading.active_count() == before


def test_numbers_without_sense_are_refused(tmp_path):
    store = numbered(tmp_path / "s", [5])
    for wrong in ({"batch_size": 0}, {"start": -1}, {"part": 2, "parts": 2}):
        with pytest.raises(InvalidInput, match="there is no part"):
            order(store, **wrong)


def test_files_that_are_not_what_was_written_are_found(tmp_path):
    store = numbered(tmp_path / "s", SIZES)
    store.verify()
    victim = store.path / vectors_file(4)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CorruptData, match=r"000004\.vectors\.npy of the store has digest \w{64}, not \w{64}"):
        Store.open(store.path).verify()
    victim.write_bytes(content[:-2])
    with pytest.raises(CorruptData, match=r"000004\.vectors\.npy of the store has \d+ bytes, not \d+"):
        Store.open(store.path)
    with pytest.raises(CorruptData, match="shorter than it was"):
        order(store)
    victim.unlink()
    with pytest.raises(CorruptData, match="has -1 bytes"):
        Store.open(store.path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"plan": {"schema": 2}}', b"\xff"])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    store = numbered(tmp_path / "s", SIZES)
    value = json.loads((store.path / STORE).read_text())
    (store.path / STORE).write_bytes(content)
    with pytest.raises(CorruptData):
        Store.open(store.path)
    for key in value:
        (store.path / STORE).write_text(json.dumps({k: v for k, v in value.items() if k != key}))
        with pytest.raises(CorruptData):
            Store.open(store.path)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(NotFound, match="there is no store"):
        Store.open(tmp_path)
    store = numbered(tmp_path / "s", SIZES)
    (store.path / STORE).unlink()
    with pytest.raises(NotFound, match="not finished"):
        Store.open(store.path)


def test_a_store_from_something_else_is_refused(tmp_path):
    store = numbered(tmp_path / "s", SIZES, channels=3)
    spec = ModelSpec("m", "a:b", Preprocessing(8, 8), ("c",), "0" * 64)
    store.check(spec, "layer", 3)
    with pytest.raises(WeightsMismatch, match=f"{'0' * 64} .* {'1' * 64}"):
        store.check(ModelSpec("m", "a:b", Preprocessing(8, 8), ("c",), "1" * 64), "layer", 3)
    with pytest.raises(InvalidInput, match="from layer 'layer', wanted is 'layer2'"):
        store.check(spec, "layer2", 3)
    with pytest.raises(InvalidInput, match="from channels 3, wanted is 4"):
        store.check(spec, "layer", 4)
    with pytest.raises(InvalidInput, match="from preprocessing"):
        store.check(ModelSpec("m", "a:b", Preprocessing(8, 9), ("c",), "0" * 64), "layer", 3)


_READ = """
import sys
from pathlib import Path
from benchmarks.memory import peak_over_baseline
from offline.store.reading import Store
def read():
    store = Store.open(Path(sys.argv[1]), window_bytes=2**20)
    for batch in store.batches(1024, seed=0, epoch=0):
        pass
print(peak_over_baseline(read))
"""


def test_memory_does_not_grow_with_the_store(tmp_path):
    peaks = []
    for shards in (10, 40):
        store = numbered(tmp_path / f"{shards}", [4096] * shards, channels=256)
        result = subprocess.run([sys.executable, "-c", _READ, store.path], capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout))
    assert store.bytes > 160 * 2**20
    assert max(peaks) < 48 * 2**20, peaks
    assert peaks[1] - peaks[0] < 16 * 2**20, peaks
