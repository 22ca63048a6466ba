"""The permutation that takes no memory."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from offline.store.permutation import permuted


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 65_537])
def test_everything_comes_once(size):
    found = permuted(np.arange(size), size, key=size * 7919)
    assert np.array_equal(np.sort(found), np.arange(size))


def test_places_can_be_asked_for_one_by_one():
    whole = permuted(np.arange(1000), 1000, key=5)
    assert np.array_equal(permuted(np.array([999, 3, 3]), 1000, key=5), whole[[999, 3, 3]])


def test_another_key_is_another_order():
    one, other = (permuted(np.arange(10_000), 10_000, key) for key in (0, 2**64 - 1))
    assert (one == other).sum() < 10


def test_everything_comes_anywhere_equally_often():
    size, draws = 12, 6000
    orders = np.stack([permuted(np.arange(size), size, key * 0x1234567) for key in range(draws)])
    counts = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    assert stats.chisquare(counts, axis=1).pvalue.min() > 1e-4


def test_neighbours_do_not_stay_neighbours():
    order = permuted(np.arange(50_000), 50_000, key=3)
    assert abs(stats.spearmanr(np.arange(50_000), order).statistic) < 0.02
    assert (np.abs(np.diff(order)) == 1).mean() < 0.001
