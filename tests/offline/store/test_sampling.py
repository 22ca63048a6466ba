"""Positions are drawn one after another, each with probability in proportion to its weight among those left."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from offline.store.sampling import draw

WEIGHTS = np.array([4.0, 1.0, 0.5, 2.0, 0.25])


def exact(weights: np.ndarray, count: int) -> dict[tuple[int, ...], float]:
    """Return the probability of each set of positions, by adding up all orders in which it can be drawn."""
    found: dict[tuple[int, ...], float] = {}
    for order in permutations(range(len(weights)), count):
        probability, left = 1.0, weights.sum()
        for position in order:
            probability *= weights[position] / left
            left -= weights[position]
        found[tuple(sorted(order))] = found.get(tuple(sorted(order)), 0.0) + probability
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sets_come_as_often_as_they_should(count):
    images = 20_000
    drawn = draw(np.tile(WEIGHTS, (images, 1)), count, [f"{i}.png" for i in range(images)], seed=0)
    expected = exact(WEIGHTS, count)
    assert sum(expected.values()) == pytest.approx(1)
    sets, counts = np.unique(drawn, axis=0, return_counts=True)
    seen = {tuple(row): n for row, n in zip(sets.tolist(), counts, strict=True)}
    assert seen.keys() == expected.keys()
    if count < len(WEIGHTS):
        assert stats.chisquare([seen[s] for s in expected], [images * p for p in expected.values()]).pvalue > 1e-4


def test_an_image_draws_the_same_alone_and_in_any_batch():
    weights = np.random.default_rng(0).random((8, 50))
    keys = [f"c/{i}.png" for i in range(8)]
    together = draw(weights, 7, keys, seed=3)
    for order in (range(8), [5, 2, 7]):
        assert np.array_equal(draw(weights[list(order)], 7, [keys[i] for i in order], seed=3), together[list(order)])
    assert not np.array_equal(draw(weights, 7, keys, seed=4), together)
    assert not np.array_equal(draw(weights[:1], 7, ["other"], seed=3), together[:1])


def test_positions_without_weight_come_only_where_nothing_else_is_left():
    weights = np.tile([0.0, 3.0, 0.0, 1e-300, 0.0, 0.0], (3000, 1))
    drawn = draw(weights, 3, [str(i) for i in range(3000)], seed=0)
    assert (np.sort(drawn) == drawn).all()
    assert all({1, 3} <= set(row) for row in drawn.tolist())
    third = np.array([(set(row) - {1, 3}).pop() for row in drawn.tolist()])
    assert stats.chisquare([(third == p).sum() for p in (0, 2, 4, 5)]).pvalue > 1e-4
