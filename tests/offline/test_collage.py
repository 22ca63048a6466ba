"""The prototype test where every answer is known, and pictures pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concepts.preprocessing import Box, Preprocessing
from offline import collage
from offline.config import TrainingConfig
from offline.images import open_folder
from offline.nearest import Place
from tests.offline.colours import COLOURS, picture, task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of each colour, and some that have a patch of red but are predicted as what surrounds it."""
    root = tmp_path_factory.mktemp("colours")
    for name in COLOURS:
        (root / name).mkdir()
        for index in range(7):
            picture(name).save(root / name / f"{index}.png")
    for index in range(6):
        picture("green" if index % 2 else "blue", "red", (16, 8)).save(root / f"patch{index}.png")
    return root


def world(folder, **changes):
    values = {"model": "colours", "layer": "relu", "images": folder, "name": "x", "device": "cpu", "batch_size": 3}
    return task(folder, TrainingConfig(**values | changes))


def one_concept_each() -> dict[int, torch.Tensor]:
    return {target: torch.eye(3)[target : target + 1] for target in range(3)}


def test_a_class_is_predicted_from_crops_that_show_it_and_not_from_others(folder):
    found = collage.measure(world(folder), one_concept_each(), open_folder(folder), 1000)
    assert found.metrics[0]["collage_4"] == found.metrics[0]["collage_6"] == 1.0
    assert found.metrics[0]["collage_4_probability"] > 0.99
    # Red patches in images of other colours are enough: they are predicted as red when they stand alone.
    assert {place.key for place in found.found.elsewhere[0][0]} == {f"patch{index}.png" for index in range(6)}
    assert found.metrics[0]["collage_4_excluded"] == found.metrics[0]["collage_6_excluded"] == 1.0
    # Green is nowhere in images that are not predicted as green, so that there is nothing to paste.
    assert found.metrics[1]["collage_4"] == 1.0
    assert "collage_4_excluded" not in found.metrics[1]
    assert not found.found.elsewhere[1][0]


def test_concepts_of_another_class_fail_the_test(folder):
    swapped = {0: torch.eye(3)[1:2], 1: torch.eye(3)[0:1]}
    found = collage.measure(world(folder), swapped, open_folder(folder), 1000)
    for target in swapped:
        assert found.metrics[target]["collage_4"] == 0.0
        assert found.metrics[target]["collage_4_probability"] < 0.01


def test_crops_are_those_of_each_concept_in_turn(folder):
    both = {0: torch.eye(3)[[0, 2]]}
    opened = world(folder)
    places = collage.measure(opened, both, opened.training, 1000).found
    made = {made.name: made.view for made in collage.collages(opened.training, opened.model.spec.preprocessing, places)}
    colours = made["collage_6"].reshape(2, 16, 32, 3)[:, 8, [5, 15, 27]].reshape(6, 3)
    assert colours.tolist() == [list(COLOURS["red"]), list(COLOURS["blue"])] * 3
    assert made["collage_4"][[8, 8, 24, 24], [8, 24, 8, 24]].tolist() == colours[:4].tolist()


def test_few_images_make_no_collage(folder):
    found = collage.measure(world(folder), one_concept_each(), open_folder(folder), 3)
    assert all("collage_4" not in metrics for metrics in found.metrics.values())


def test_numbers_do_not_depend_on_the_batch(folder):
    one = collage.measure(world(folder, batch_size=1), one_concept_each(), open_folder(folder), 1000)
    many = collage.measure(world(folder, batch_size=64), one_concept_each(), open_folder(folder), 1000)
    assert one.metrics == many.metrics


@pytest.mark.parametrize("grid", [(2, 2), (2, 3)])
def test_a_collage_is_made_of_the_pixels_of_its_crops(grid):
    view = Preprocessing(7, 11)  # sides that the cells do not divide
    g = np.random.default_rng(0)
    count = grid[0] * grid[1]
    views = {str(index): g.integers(0, 256, (7, 11, 3), dtype=np.uint8) for index in range(count)}
    places = [Place(key, Box(0, 0, 11, 7), tuple(g.random(2)), 1.0) for key in views]
    made = collage.paste(places, views, view, grid)
    rows, columns = np.linspace(0, 7, grid[0] + 1).astype(int), np.linspace(0, 11, grid[1] + 1).astype(int)
    for cell, place in enumerate(places):
        row, column = divmod(cell, grid[1])
        part = made[rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
        height, width = part.shape[:2]
        top = np.clip(round(place.centre[0] * 7 - height / 2), 0, 7 - height)
        left = np.clip(round(place.centre[1] * 11 - width / 2), 0, 11 - width)
        assert np.array_equal(part, views[place.key][top : top + height, left : left + width])
