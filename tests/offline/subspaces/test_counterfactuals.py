"""Counterfactuals of groups, against the definition looked at image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concepts.preprocessing import Box
from offline.exemplars import Excerpt
from offline.subspaces import counterfactuals
from offline.subspaces.counterfactuals import cut_like, nearest_without
from offline.subspaces.grouping import Limits, find
from offline.subspaces.probing import Probe


@pytest.fixture(scope="module")
def seen() -> Probe:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(80, 12, generator=generator) ** 3
    lengths = values.norm(dim=1)
    boxes = [Box(0, 0, 10 + image, 10) for image in range(80)]
    keys = [f"{image}.png" for image in range(80)]
    return Probe(keys, boxes, [""] * 80, values / lengths.unsqueeze(1), lengths)


@pytest.mark.parametrize("elements", [2**24, 200])
def test_counterfactuals_lack_the_features_and_are_else_most_similar(
    seen: Probe, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counterfactuals, "_ELEMENTS", elements)
    groups = find(seen.highly_active(seen.threshold(1.0)), "itemsets", Limits(5, 30, 4))
    found = nearest_without(seen, groups, 6, 0.5)
    r = seen.representations.double().numpy()
    numbers = set()
    for group, excerpts in zip(groups, found, strict=True):
        own = list(group.features)
        others = [feature for feature in range(12) if feature not in own]
        mean = r[group.images].mean(0)[others]
        cosines = {
            image: float(r[image, others] @ mean / np.linalg.norm(r[image, others]) / np.linalg.norm(mean))
            for image in range(80)
            if (r[image, own] < r.mean()).all()
        }
        best = sorted((image for image in cosines if cosines[image] >= 0.5), key=lambda image: -cosines[image])[:6]
        assert [excerpt.key for excerpt in excerpts] == [f"{image}.png" for image in best]
        assert [excerpt.box for excerpt in excerpts] == [seen.boxes[image] for image in best]
        for excerpt, image in zip(excerpts, best, strict=True):
            code = float(r[image, own].mean() * seen.lengths[image])
            assert excerpt.activation == pytest.approx(code, abs=1e-6)
        assert not {int(excerpt.key[:-4]) for excerpt in excerpts} & set(group.images.tolist())
        numbers.add(len(excerpts))
    assert 6 in numbers


def test_a_group_that_nothing_is_like_has_none(seen: Probe) -> None:
    groups = find(seen.highly_active(seen.threshold(1.0)), "itemsets", Limits(5, 3, 4))
    assert nearest_without(seen, groups, 6, 1.0) == [[], [], []]
    assert nearest_without(seen, groups, 0, 0.3) == [[], [], []]


def test_counterfactuals_are_cut_where_the_crops_are_in_their_views(seen: Probe) -> None:
    crops = [Excerpt("10.png", Box(5, 2, 10, 4), 1.0), Excerpt("30.png", Box(0, 0, 40, 10), 0.5)]
    without = [Excerpt(f"{image}.png", seen.boxes[image], 0.0) for image in (50, 60, 70)]
    (cut,) = cut_like(seen, [without], [crops])
    assert [excerpt.key for excerpt in cut] == ["50.png", "60.png", "70.png"]
    expected = [
        Box(15, 2, 30, 4),
        Box(0, 0, 70, 10),
        Box(20, 2, 40, 4),
    ]  # views are 60, 70 and 80 wide, 20 and 40 before
    assert [tuple(excerpt.box) for excerpt in cut] == [pytest.approx(tuple(box)) for box in expected]
    assert cut_like(seen, [[]], [crops]) == [[]]
