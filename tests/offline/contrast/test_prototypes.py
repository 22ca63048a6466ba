"""Contrastive prototypes: the factorisation of what lies on one side of a plane, and the places that show it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from offline.contrast import prototypes
from offline.contrast.solving import solve
from offline.contrast.statistics import gather
from tests.offline.contrast import worlds


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    place = worlds.place(tmp_path_factory.mktemp("contrast"))
    task = worlds.task(place, layer="layer3", tolerance=1e-7, exemplars=2, batch_size=5)
    found = gather(task, task.classes())
    return task, solve(found, 5, 0.5), found.keys


@pytest.fixture(scope="module")
def learned(solved):
    task, planes, keys = solved
    return list(prototypes.learn(task, planes, {8: [6, 9], 9: [8]}, keys))


def weighed(task, planes, target, other, keys):
    """Return what is factorised, image by image and position by position."""
    normals, offsets = planes.between(torch.tensor([target]), torch.tensor([other]))
    rows = []
    for key in keys:
        view, _ = task.model.spec.preprocessing.fit(task.training.open(key))
        for vector in task.cut.positions(task.cut.trunk(task.model.inputs(view[None])))[0].double():
            distance = float(vector @ normals[0].double() + offsets[0].double())
            rows.append(vector.numpy() * max(0.0, distance))
    return np.array(rows)


def test_they_factorise_what_lies_on_the_side_of_the_class(solved, learned):
    task, planes, keys = solved
    assert [(one.target, one.other) for one in learned] == [(8, 6), (8, 9), (9, 8)]
    for one in learned:
        rows = weighed(task, planes, one.target, one.other, keys[one.target])
        dictionary = one.dictionary.double().numpy()
        assert dictionary.shape == (3, 64)
        assert (dictionary >= 0).all()
        assert np.linalg.norm(dictionary, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
        codes = np.array([nnls(dictionary.T, row)[0] for row in rows])
        residual = rows - codes @ dictionary
        gradient = -codes.T @ residual  # by the dictionary: zero where it is positive, and nowhere negative
        assert np.abs(gradient[dictionary > 1e-6]).max() < 1e-4 * np.abs(codes.T @ rows).max()
        energy = (codes**2).sum(0)
        assert one.energy.numpy() == pytest.approx(energy / energy.sum(), rel=1e-3)
        assert one.energy.tolist() == sorted(one.energy.tolist(), reverse=True)


def test_exemplars_show_the_largest_codes_each_in_another_image(solved, learned):
    task, planes, keys = solved
    for one in learned:
        rows = weighed(task, planes, one.target, one.other, keys[one.target])
        codes = np.array([nnls(one.dictionary.double().numpy().T, row)[0] for row in rows]).reshape(-1, 64, 3)
        for concept, excerpts in enumerate(one.excerpts):
            peaks = codes[:, :, concept].max(1)
            best = np.argsort(-peaks)[:2]
            assert [excerpt.key for excerpt in excerpts] == [keys[one.target][image] for image in best]
            for image, excerpt in zip(best, excerpts, strict=True):
                assert excerpt.activation == pytest.approx(peaks[image], rel=1e-3)
                row, column = divmod(int(codes[image, :, concept].argmax()), 8)
                top, left = (min(max(4 * cell + 2 - 4, 0), 24) for cell in (row, column))
                assert excerpt.box == (left, top, left + 8, top + 8)


def test_a_crop_is_a_quarter_of_the_view_and_no_less_than_two_cells(solved):
    config, view = solved[0].config, solved[0].model.spec.preprocessing
    assert config.side(view, (8, 8)) == 8
    assert config.side(view, (4, 4)) == 16
    assert config.side(view, (1, 1)) == 32
    assert config.model_copy(update={"patch_size": 5}).side(view, (8, 8)) == 5


def test_pairs_taken_one_by_one_are_the_same(solved, learned, monkeypatch):
    monkeypatch.setattr(prototypes, "_BYTES", 1)
    task, planes, keys = solved
    for one, whole in zip(prototypes.learn(task, planes, {8: [6, 9], 9: [8]}, keys), learned, strict=True):
        torch.testing.assert_close(one.dictionary, whole.dictionary, rtol=1e-4, atol=1e-5)


def test_of_few_positions_there_are_few_prototypes(solved):
    _, planes, keys = solved
    task = worlds.task(solved[0].training.root.parent, layer="pool", concepts=3)
    found = gather(task, task.classes())
    planes = solve(found, 5, 0.5)
    (one,) = prototypes.learn(task, planes, {8: [9]}, {8: keys[8][:2]})
    assert len(one.dictionary) <= 2
    assert all(excerpt.box == (0, 0, 32, 32) for excerpts in one.excerpts for excerpt in excerpts)
