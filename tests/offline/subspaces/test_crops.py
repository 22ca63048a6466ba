"""Where groups are in images: maps, boxes and cohesion, against references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from torch.nn import functional

from concepts.layout import Layout
from concepts.model import Model
from concepts.preprocessing import Box
from offline.subspaces.crops import cohesion, grid_map, place_of
from tests.concepts.conftest import model, views

__all__ = ["model", "views"]


def test_the_map_of_a_group_is_its_grad_cam(model: Model, views) -> None:
    """Selvaraju et al. 2017, by automatic differentiation of the sum of the pooled features."""
    cut, features = model.cut("layer3"), [3, 17, 40]
    a = cut.trunk(model.inputs(views[:2])).clone().requires_grad_()
    with torch.enable_grad():
        target = a.mean((2, 3))[:, features].sum()
        (gradient,) = torch.autograd.grad(target, a)
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * a.detach()).sum(1).relu()
    for image in range(2):
        found = grid_map(cut.positions(a.detach())[image], features, cut.layout)
        places = cut.layout.grid[0] * cut.layout.grid[1]
        torch.testing.assert_close(found / places, expected[image])


def test_tokens_without_a_place_are_left_out() -> None:
    positions = torch.arange(15.0).view(5, 3)
    found = grid_map(positions, [0, 2], Layout("btc", 3, (2, 2), 1))
    assert found.tolist() == [[8, 14], [20, 26]]


def test_a_place_is_the_box_around_the_largest_connected_part() -> None:
    map_ = np.zeros((10, 20), np.float32)
    map_[1:3, 2:5] = 1.0  # six pixels
    map_[6:9, 12:15] = 0.7  # nine
    map_[6, 14] = 0.5
    assert place_of(map_, 0.6, Box(0, 0, 20, 10)) == Box(12, 6, 15, 9)
    assert place_of(map_, 0.8, Box(0, 0, 20, 10)) == Box(2, 1, 5, 3)
    assert place_of(map_, 0.8, Box(100, 50, 140, 70)) == Box(104, 52, 110, 56)  # in the image's pixels
    assert place_of(map_ - 5, 0.6, Box(0, 0, 20, 10)) == Box(12, 6, 15, 9)  # relative to the map's own range


def test_a_map_without_places_is_the_whole_view() -> None:
    view = Box(3, 4, 35, 36)
    assert place_of(np.full((32, 32), 0.7, np.float32), 0.6, view) == view
    assert place_of(np.zeros((32, 32), np.float32), 0.6, view) == view
    rounded = np.full((32, 32), 0.7, np.float32)
    rounded[13:14, 13:] = np.nextafter(np.float32(0.7), np.float32(1))
    assert place_of(rounded, 0.6, view) == view


def test_maps_are_enlarged_as_in_explanations() -> None:
    from offline.metrics.localisation import enlarge

    small = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = zoom(small[0].numpy(), 8, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(enlarge(small, (32, 32))[0], expected, atol=1e-5)


def test_cohesion_is_the_mean_cosine_of_pairs() -> None:
    rows = functional.normalize(torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = [float(rows[i] @ rows[j]) for i in range(7) for j in range(i)]
    assert cohesion(rows) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert cohesion(rows[:1].expand(3, -1)) == pytest.approx(1.0, abs=1e-6)
