"""The nearest captions, beside a float64 search of all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concepts.errors import InvalidInput
from offline.vocabulary import search
from tests.offline.vocabulary.sources import unit


def brute_force(rows, queries, k):
    """Sort all products, taken in float64; of equal ones the first stays first."""
    products = queries.double().numpy() @ rows.astype(np.float64).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), order


def searched(rows, queries, k, block=100, device="cpu"):
    blocks = (rows[first : first + block] for first in range(0, len(rows), block))
    return search.nearest(blocks, queries, k, torch.device(device))


def drawn(count, width, seed):
    return unit(np.random.default_rng(seed).standard_normal((count, width)))


def as_queries(rows):
    return torch.from_numpy(unit(rows)).float()


@pytest.mark.parametrize("width", [1, 3, 64, 512])
@pytest.mark.parametrize(
    ("count", "k", "block"), [(1, 1, 5), (1000, 5, 8192), (1000, 1, 1), (1003, 70, 130), (90, 90, 7)]
)
def test_it_finds_what_a_search_of_all_finds(width, count, k, block):
    rows, queries = drawn(count, width, 0).astype(np.float16), as_queries(drawn(23, width, 1))
    cosines, captions = brute_force(rows, queries, k)
    found = searched(rows, queries, k, block)
    assert found.captions.dtype == torch.int64
    assert found.cosines.dtype == torch.float32
    if width > 1:
        assert found.captions.tolist() == captions.tolist()
    assert np.abs(found.cosines.numpy() - cosines).max() < 1e-7


def test_products_that_float32_cannot_tell_apart_are_ranked():
    """Rows whose products differ by less than their rounding in float32, so that its own order is another one."""
    random = np.random.default_rng(2)
    rows = np.tile(unit(random.standard_normal((1, 512))).astype(np.float16), (3000, 1))
    rows[:, 64:] = random.integers(-1, 2, (3000, 448)) * (random.random((3000, 448)) < 0.1) * 2.0**-24
    rows[:, :64] /= np.linalg.norm(rows[0].astype(float))
    queries = as_queries(random.standard_normal((40, 512)))
    products = (queries @ torch.from_numpy(rows).float().T).double().numpy()
    _, wanted = brute_force(rows, queries, 5)
    assert (np.sort(np.argsort(-products, axis=1)[:, :5]) != np.sort(wanted)).any(1).mean() > 0.5
    for block in (64, 1000, 4096):
        assert searched(rows, queries, 5, block).captions.tolist() == wanted.tolist()


@pytest.mark.parametrize("block", [1, 10, 64, 333, 5000])
def test_of_equal_captions_the_first_come_first(block):
    """The same few rows again and again, at places that blocks cut in every way."""
    random = np.random.default_rng(3)
    kinds = drawn(6, 48, 4).astype(np.float16)
    which = random.integers(0, 6, 2000)
    queries = as_queries(drawn(9, 48, 5))
    found = searched(kinds[which], queries, 7, block)
    best = (queries.double().numpy() @ kinds.astype(np.float64).T).argmax(1)
    for captions, kind in zip(found.captions.tolist(), best, strict=True):
        assert captions == np.flatnonzero(which == kind)[:7].tolist()


def test_the_block_changes_no_bit(monkeypatch):
    rows, queries = drawn(3000, 100, 6).astype(np.float16), as_queries(drawn(50, 100, 7))
    whole = searched(rows, queries, 20, 3000)
    monkeypatch.setattr(search, "_QUERIES", 7)
    monkeypatch.setattr(search, "_PAIRS", 3)
    for block in (1, 17, 64, 100, 1024):
        found = searched(rows, queries, 20, block)
        assert torch.equal(found.cosines, whole.cosines)
        assert torch.equal(found.captions, whole.captions)


@pytest.mark.parametrize("scale", [0.0, 0.9, 1.1, float("nan"), float("inf")])
def test_queries_that_are_no_embeddings_are_refused(scale):
    queries = as_queries(drawn(3, 8, 0))
    queries[1] *= scale
    with pytest.raises(InvalidInput, match="norm 1"):
        searched(drawn(10, 8, 1).astype(np.float16), queries, 1)


def test_none_is_no_number_of_captions():
    with pytest.raises(InvalidInput, match="at least 1"):
        searched(drawn(10, 8, 1).astype(np.float16), as_queries(drawn(3, 8, 0)), 0)


def test_no_queries_find_nothing():
    found = searched(drawn(10, 8, 1).astype(np.float16), torch.zeros(0, 8), 3)
    assert found.captions.shape == found.cosines.shape == (0, 3)


def test_queries_stay_as_they_are():
    queries = as_queries(drawn(3, 8, 0))
    before = queries.clone()
    searched(drawn(10, 8, 1).astype(np.float16), queries, 2)
    assert torch.equal(queries, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same():
    rows, queries = drawn(20000, 512, 8).astype(np.float16), as_queries(drawn(50, 512, 9))
    here, there = (searched(rows, queries, 5, 4096, device) for device in ("cpu", "cuda"))
    assert torch.equal(here.captions, there.captions)
    assert torch.equal(here.cosines, there.cosines)
