"""Finding groups: closed frequent itemsets against a brute force, and the published grouping within them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from concepts.preprocessing import Box
from offline.subspaces.grouping import Group, Limits, distinct, exact, find, itemsets, most_deviations
from offline.subspaces.probing import Probe

ALL = 10_000


def transactions(seed: int, images: int = 60, features: int = 9, share: float = 0.4) -> NDArray[np.bool_]:
    """Draw highly active sets, of which many are alike."""
    generator = np.random.default_rng(seed)
    kinds = generator.random((images // 6, features)) < share
    drawn = kinds[generator.integers(len(kinds), size=images)]
    return drawn ^ (generator.random(drawn.shape) < 0.04)


def brute_force(high: NDArray[np.bool_], min_images: int) -> dict[tuple[int, ...], list[int]]:
    """Return all closed frequent sets by looking at every set of features."""
    found = {}
    for size in range(1, high.shape[1] + 1):
        for features in combinations(range(high.shape[1]), size):
            images = np.flatnonzero(high[:, features].all(1))
            if len(images) > min_images and tuple(np.flatnonzero(high[images].all(0)).tolist()) == features:
                found[features] = images.tolist()
    return found


def as_dict(groups: list[Group]) -> dict[tuple[int, ...], list[int]]:
    return {group.features: group.images.tolist() for group in groups}


@pytest.mark.parametrize("seed", range(8))
def test_itemsets_are_all_closed_frequent_sets(seed: int) -> None:
    high = transactions(seed)
    for min_images in (1, 4, 10):
        expected = brute_force(high, min_images)
        found = itemsets(csr_array(high.astype(np.int32)), Limits(min_images, ALL, ALL))
        assert as_dict(found) == expected
        assert len(found) == len(expected)  # none twice
        assert len(expected) > 3


def test_features_that_are_active_everywhere_are_in_every_set() -> None:
    high = transactions(0)
    high[:, 4] = True
    found = itemsets(csr_array(high.astype(np.int32)), Limits(5, ALL, ALL))
    assert as_dict(found) == brute_force(high, 5)
    assert found[0].features == (4,)
    assert all(4 in group.features for group in found)


@pytest.mark.parametrize("seed", range(4))
def test_groups_come_by_their_images_and_the_limit_takes_the_first(seed: int) -> None:
    high = csr_array(transactions(seed).astype(np.int32))
    for grouping in ("itemsets", "exact"):
        everything = find(high, grouping, Limits(3, ALL, ALL))
        order = [(-len(group.images), group.features) for group in everything]
        assert order == sorted(order)
        for most in (1, 2, 5, len(everything)):
            few = find(high, grouping, Limits(3, most, ALL))
            assert as_dict(few) == as_dict(everything[:most])
        narrow = find(high, grouping, Limits(3, ALL, 2))
        assert as_dict(narrow) == as_dict([group for group in everything if len(group.features) <= 2])


@pytest.mark.parametrize("seed", range(4))
def test_itemsets_hold_every_exact_group(seed: int) -> None:
    high = transactions(seed)
    published = exact(csr_array(high.astype(np.int32)), Limits(3, ALL, ALL))
    sets = as_dict(itemsets(csr_array(high.astype(np.int32)), Limits(3, ALL, ALL)))
    assert len(published) > 3
    for group in published:
        alike = np.flatnonzero((high == np.isin(np.arange(high.shape[1]), group.features)).all(1))
        assert group.images.tolist() == alike.tolist()
        assert set(alike.tolist()) <= set(sets[group.features])


def test_dense_data_stay_bounded() -> None:
    generator = np.random.default_rng(0)
    high = csr_array((generator.random((300, 80)) < 0.5).astype(np.int32))
    found = itemsets(high, Limits(10, 50, ALL))
    assert len(found) == 50
    singles = np.sort(high.sum(0))[::-1]
    assert [len(group.images) for group in found] == singles[:50].tolist()


def probe_of(representations: torch.Tensor) -> Probe:
    count = len(representations)
    whole = Box(0, 0, 8, 8)
    return Probe([f"{i}.png" for i in range(count)], [whole] * count, [""] * count, representations, torch.ones(count))


def test_statistics_are_of_all_entries() -> None:
    values = torch.nn.functional.normalize(torch.rand(40, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    seen = probe_of(values)
    assert seen.mean == pytest.approx(float(values.double().mean()), rel=1e-9)
    assert seen.std == pytest.approx(float(values.double().std(correction=0)), rel=1e-6)
    threshold = seen.threshold(1.5)
    assert threshold == np.float32(seen.mean + 1.5 * seen.std)
    assert (seen.highly_active(threshold).toarray() == (values >= threshold).numpy()).all()


@pytest.mark.parametrize("grouping", ["itemsets", "exact"])
def test_most_deviations_are_the_most_at_which_there_is_a_group(grouping: str) -> None:
    values = torch.nn.functional.normalize(torch.rand(200, 6, generator=torch.Generator().manual_seed(1)) ** 4, dim=1)
    seen, limits = probe_of(values), Limits(10, ALL, ALL)
    most = most_deviations(seen, grouping, limits)
    assert most is not None
    assert find(seen.highly_active(seen.threshold(most)), grouping, limits)
    for steps in range(1, 20):
        assert not find(seen.highly_active(seen.threshold(most + 0.1 * steps)), grouping, limits)


def test_no_deviations_help_where_images_are_too_few_or_alike() -> None:
    assert most_deviations(probe_of(torch.eye(3)), "itemsets", Limits(3, ALL, ALL)) is None
    alike = torch.nn.functional.normalize(torch.ones(20, 4), dim=1)
    assert most_deviations(probe_of(alike), "itemsets", Limits(3, ALL, ALL)) is None


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 1.0])
def test_of_groups_that_share_too_many_images_the_first_is_kept(overlap: float) -> None:
    groups = itemsets(csr_array(transactions(3).astype(np.int32)), Limits(5, ALL, 9))
    kept: list[int] = []
    for place, group in enumerate(groups):
        own = set(group.images.tolist())
        others = [set(groups[other].images.tolist()) for other in kept]
        if all(len(own & other) <= overlap * len(own | other) for other in others):
            kept.append(place)
    assert distinct(groups, overlap) == kept
    assert (len(kept) == len(groups)) == (overlap == 1)
    assert distinct([], overlap) == []
