"""Planes from sums, against a reference that holds all vectors and inverts the covariance, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concepts.errors import NotTrainable
from offline.contrast.solving import solve
from tests.offline.contrast.vectors import drawn, statistics


def reference(own, neutral, shrinkage):
    """Return directions, products and centre as the definition says, vector by vector."""
    groups = [rows for rows in [*own, neutral] if len(rows)]
    channels = groups[0].shape[1]
    scatter = np.zeros((channels, channels))
    for rows in groups:
        for row in rows:
            scatter += np.outer(row - rows.mean(0), row - rows.mean(0))
    covariance = scatter / sum(map(len, groups))
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / channels * np.eye(channels)
    means = np.array([rows.mean(0) for rows in own])
    centre = neutral.mean(0) if len(neutral) else means.mean(0)
    directions = (means - centre) @ np.linalg.inv(covariance)
    return directions, (means - centre) @ directions.T, centre


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("neutral", [100, 1, 0])
def test_planes_are_those_of_the_definition(shrinkage, neutral):
    own, rest = drawn(4, 6, neutral=neutral)
    planes = solve(statistics(own, rest), 5, shrinkage)
    directions, products, centre = reference(own, rest, shrinkage)
    assert planes.directions.numpy() == pytest.approx(directions, rel=1e-6, abs=1e-6)
    assert planes.products.numpy() == pytest.approx(products, rel=1e-9)
    assert torch.equal(planes.products, planes.products.T)
    assert planes.centre.numpy() == pytest.approx(centre, rel=1e-6, abs=1e-6)
    assert bool(planes.weights.exists.sum() == 12)


def test_a_plane_sees_both_classes_alike_and_has_the_least_variance():
    own, rest = drawn(3, 5)
    planes = solve(statistics(own, rest), 5, 0.0)
    normals, offsets = planes.between(torch.tensor([2]), torch.tensor([0]))
    normal, offset = normals[0].double().numpy(), float(offsets[0])
    sides = [normal @ own[c].mean(0) + offset for c in (2, 0)]
    assert sides[0] == pytest.approx(-sides[1], rel=1e-5)
    assert sides[0] > 0
    assert normal @ rest.mean(0) + offset == pytest.approx(0, abs=1e-6)
    rows = np.concatenate([group - group.mean(0) for group in (*own, rest)])
    seen = normal / sides[0]  # both means at a distance of one
    first, second = own[2].mean(0) - rest.mean(0), own[0].mean(0) - rest.mean(0)
    for draw in np.random.default_rng(1).normal(size=(20, 5)):
        span = np.linalg.qr(np.array([first, second]).T)[0]
        other = seen + draw - span @ (span.T @ draw)  # sees the means as they were
        assert other @ first == pytest.approx(1, rel=1e-4)
        assert (rows @ other).var() > (rows @ seen).var()


def test_turning_a_pair_round_negates_its_plane():
    planes = solve(statistics(*drawn(4, 6)), 5, 0.5)
    i, j = planes.weights.exists.nonzero().unbind(1)
    for there, back in zip(planes.between(i, j), planes.between(j, i), strict=True):
        assert torch.equal(there, -back)


def test_classes_with_too_few_images_have_no_planes_but_add_to_the_covariance():
    own, rest = drawn(4, 6)
    own[1] = own[1][:3]
    planes = solve(statistics(own, rest), 5, 0.5)
    assert planes.known.tolist() == [True, False, True, True]
    assert not bool(planes.weights.exists[1].any() | planes.weights.exists[:, 1].any())
    directions = reference(own, rest, 0.5)[0]
    assert planes.directions[[0, 2, 3]].numpy() == pytest.approx(directions[[0, 2, 3]], rel=1e-6, abs=1e-6)
    assert not bool(planes.directions[1].any())


@pytest.mark.parametrize("neutral", [50, 0])
def test_two_classes_are_enough(neutral):
    own, rest = drawn(2, 4, neutral=neutral)
    planes = solve(statistics(own, rest), 5, 0.5)
    normals, offsets = planes.between(torch.tensor([0]), torch.tensor([1]))
    for rows, side in zip(own, (1, -1), strict=True):
        assert (side * (rows @ normals[0].double().numpy() + float(offsets[0])) > 0).mean() > 0.9


@pytest.mark.parametrize(
    ("own", "shrinkage", "words"),
    [
        ([np.eye(3)[[0] * 5], np.eye(3)[[1] * 4]], 0.5, "1 of 2 classes have the 5 training images"),
        ([np.eye(3)[[0] * 5], np.eye(3)[[1] * 5]], 0.5, "all alike"),
        ([np.eye(4)[[0, 1, 0, 1, 0]], np.eye(4)[[1, 2, 1, 2, 1]]], 0.0, "raise --shrinkage"),
        ([np.arange(5.0)[:, None] * np.ones(3)] * 3, 0.5, "tells no two classes apart"),
    ],
)
def test_what_has_no_planes_is_refused(own, shrinkage, words):
    with pytest.raises(NotTrainable, match=words):
        solve(statistics(own, np.empty((0, 0))), 5, shrinkage)
