"""What is measured of planes on held-out images, against loops over images, positions and pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from concepts.errors import InvalidInput
from offline.contrast import held_out
from offline.contrast.evidence import evidence
from offline.contrast.solving import solve
from offline.contrast.statistics import gather
from offline.images import open_folder, split
from tests.offline.contrast import worlds
from tests.offline.worlds import some_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return worlds.place(tmp_path_factory.mktemp("contrast"))


@pytest.fixture(scope="module")
def solved(place):
    task = worlds.task(place, batch_size=7)
    found = gather(task, task.classes())
    return task, solve(found, 5, 0.5), found.unit


def distances(task, planes):
    """Return, by ordered pair, the distances of the positions of i that speak for it, by ``Planes.between``."""
    found: dict[tuple[int, int], list[float]] = {}
    for key in task.held_out.keys:
        view, _ = task.model.spec.preprocessing.fit(task.held_out.open(key))
        a = task.cut.trunk(task.model.inputs(view[None]))
        target = task.cut.head(a).argmax(1)
        spoken = evidence(task.cut, a, target)
        for other in planes.weights.exists[target.item()].nonzero().squeeze(1):
            normal, offset = planes.between(target, other.view(1))
            for vector, speaks in zip(spoken.vectors[0], spoken.speaking(0.5)[0], strict=True):
                if speaks:
                    distance = float(vector.double() @ normal[0].double() + offset[0].double())
                    found.setdefault((int(target), int(other)), []).append(distance)
    return found


def test_accuracy_and_margin_are_means_of_both_sides(solved):
    task, planes, unit = solved
    sides, expected = held_out.measure(task, planes, unit), distances(*solved[:2])
    for i in range(10):
        for j in range(10):
            if (i, j) in expected and (j, i) in expected:
                both = [np.array(expected[pair]) for pair in ((i, j), (j, i))]
                right = np.mean([(rows > 0).mean() for rows in both])
                margin = np.mean([rows.mean() / unit for rows in both])
                assert float(sides.accuracy[i, j]) == pytest.approx(right, abs=1e-6)
                assert float(sides.margin[i, j]) == pytest.approx(margin, rel=1e-4)
            else:
                assert bool(sides.accuracy[i, j].isnan() & sides.margin[i, j].isnan())
    assert int(sides.accuracy.isfinite().sum()) == 6


def test_only_held_out_images_are_looked_at(solved):
    task, planes, unit = solved
    sides = held_out.measure(task, planes, unit)
    alone = replace(task, training=replace(task.training, root=task.training.root / "nowhere", keys=()))
    again = held_out.measure(alone, planes, unit)
    assert torch.equal(sides.accuracy.nan_to_num(-1), again.accuracy.nan_to_num(-1))
    assert {key for keys in sides.members.values() for key in keys} == set(sides.digests) <= set(task.held_out.keys)


def test_a_fraction_is_held_out_of_the_training(place):
    task = worlds.task(place, held_out=0.3)
    found = gather(task, task.classes())
    sides = held_out.measure(task, solve(found, 5, 0.5), found.unit)
    training, rest = split(open_folder(place / "train"), 0.3, 0)
    assert set(found.digests) <= set(training.keys)
    assert set(sides.digests) <= set(rest.keys)


def test_classes_that_no_held_out_image_shows_are_not_measured(solved, tmp_path):
    task, planes, unit = solved
    some_images(tmp_path / "ships", "test", {"ship": 6})
    sides = held_out.measure(replace(task, held_out=open_folder(tmp_path / "ships")), planes, unit)
    assert set(sides.members) == {8}
    assert bool(sides.accuracy.isnan().all())


def test_images_of_other_classes_measure_nothing(solved, tmp_path):
    task, planes, unit = solved
    some_images(tmp_path / "cats", "test", {"cat": 1})
    with pytest.raises(InvalidInput, match="no held-out image"):
        held_out.measure(replace(task, held_out=open_folder(tmp_path / "cats")), planes, unit)


def test_so_many_images_of_a_class_are_measured(solved, place):
    _, planes, unit = solved
    sides = held_out.measure(worlds.task(place, held_out_per_class=2), planes, unit)
    assert {len(keys) for keys in sides.members.values()} == {2}


def test_images_without_an_answer_are_skipped(solved, place, monkeypatch):
    _, planes, unit = solved
    task = worlds.task(place)
    monkeypatch.setattr(task.cut, "head", worlds.unanswered(task, 4_350))
    sides = held_out.measure(task, planes, unit)
    skipped = [key for key, why in task.skipped_images.items() if "NaN" in why]
    assert 0 < len(skipped) < 12
    assert not set(skipped) & sides.digests.keys()
