"""Planes against the problem that defines them, solved slowly in float64 for each pair by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from concepts.contrast.planes import Planes
from concepts.errors import CorruptData

CLASSES, CHANNELS = 6, 5


class Setting:
    """Class means, a covariance and a centre, drawn at random."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.means: NDArray[np.float64] = generator.normal(size=(CLASSES, CHANNELS))
        self.centre: NDArray[np.float64] = generator.normal(size=CHANNELS)
        factor = generator.normal(size=(CHANNELS, CHANNELS))
        self.covariance = factor @ factor.T + 0.1 * np.eye(CHANNELS)

    def planes(self, known: torch.Tensor | None = None) -> Planes:
        centred = self.means - self.centre
        directions = np.linalg.solve(self.covariance, centred.T).T
        return Planes(
            torch.from_numpy(directions),
            torch.from_numpy(centred @ directions.T),
            torch.from_numpy(self.centre),
            torch.ones(CLASSES, dtype=torch.bool) if known is None else known,
        )

    def normal(self, i: int, j: int) -> NDArray[np.float64]:
        """Minimise nᵀΣn subject to n·m_i = 1 and n·m_j = −1, by the equations of its optimum."""
        constraints = np.stack([self.means[i] - self.centre, self.means[j] - self.centre])
        zeros = np.zeros((2, 2))
        system = np.block([[2 * self.covariance, constraints.T], [constraints, zeros]])
        solution = np.linalg.solve(system, np.concatenate([np.zeros(CHANNELS), [1.0, -1.0]]))
        return solution[:CHANNELS]  # type: ignore[no-any-return]


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    i, j = torch.meshgrid(torch.arange(CLASSES), torch.arange(CLASSES), indexing="ij")
    return i[i != j], j[i != j]


def test_each_plane_solves_its_problem() -> None:
    setting = Setting()
    targets, others = pairs()
    normals, offsets = setting.planes().between(targets, others)
    for target, other, normal, offset in zip(targets.tolist(), others.tolist(), normals, offsets, strict=True):
        reference = setting.normal(target, other)
        unit = reference / np.linalg.norm(reference)
        np.testing.assert_allclose(normal, unit, atol=1e-6)
        np.testing.assert_allclose(offset, -unit @ setting.centre, atol=1e-6)


def test_class_means_lie_as_far_on_either_side_and_the_centre_between() -> None:
    setting = Setting()
    targets, others = pairs()
    normals, offsets = (each.double() for each in setting.planes().between(targets, others))
    means, centre = torch.from_numpy(setting.means), torch.from_numpy(setting.centre)
    mine = (normals * means[targets]).sum(1) + offsets
    theirs = (normals * means[others]).sum(1) + offsets
    assert bool((mine > 0).all())
    torch.testing.assert_close(mine, -theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(normals @ centre + offsets, torch.zeros_like(offsets), atol=1e-6, rtol=0)


def test_turning_a_pair_round_negates_normal_and_offset() -> None:
    targets, others = pairs()
    planes = Setting().planes()
    normals, offsets = planes.between(targets, others)
    turned, negated = planes.between(others, targets)
    assert torch.equal(turned, -normals)
    assert torch.equal(negated, -offsets)


def test_distances_of_all_planes_at_once_are_those_of_each() -> None:
    planes = Setting().planes()
    vectors = torch.from_numpy(np.random.default_rng(1).normal(size=(7, CHANNELS)))
    projected = planes.projected(vectors)
    for target in range(CLASSES):
        found = planes.distances(projected, target)
        for other in range(CLASSES):
            if other == target:
                assert not found[:, other].any()
                continue
            (normal,), (offset,) = planes.between(torch.tensor([target]), torch.tensor([other]))
            torch.testing.assert_close(found[:, other], vectors @ normal.double() + offset, atol=1e-5, rtol=1e-4)


def test_there_is_no_plane_where_a_class_is_unknown_or_two_are_the_same() -> None:
    setting = Setting()
    setting.means[3] = setting.centre + 2 * (setting.means[1] - setting.centre)  # told apart by size alone
    known = torch.ones(CLASSES, dtype=torch.bool)
    known[5] = False
    exists = setting.planes(known).weights.exists
    expected = ~torch.eye(CLASSES, dtype=torch.bool)
    expected[5] = expected[:, 5] = expected[1, 3] = expected[3, 1] = False
    assert torch.equal(exists, expected)


@pytest.mark.parametrize("broken", ["directions", "products", "centre", "known"])
def test_what_does_not_go_together_is_refused(broken: str) -> None:
    good = Setting().planes()
    values = {name: getattr(good, name) for name in ("directions", "products", "centre", "known")}
    with pytest.raises(CorruptData, match="do not go with"):
        Planes(**{**values, broken: values[broken][:-1]})


def test_what_is_not_finite_is_refused() -> None:
    good = Setting().planes()
    with pytest.raises(CorruptData, match="finite"):
        Planes(good.directions * torch.nan, good.products, good.centre, good.known)
