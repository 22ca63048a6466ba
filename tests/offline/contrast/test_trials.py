"""The shift test and the masking test, against single images and loops."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch

from concepts.contrast import shift
from offline.contrast import held_out, trials
from offline.contrast.solving import solve
from offline.contrast.statistics import gather
from tests.offline.contrast import worlds

PAIRS = {6: [8, 9], 9: [8]}


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    task = worlds.task(worlds.place(tmp_path_factory.mktemp("contrast")), test_images=4, batch_size=3)
    found = gather(task, task.classes())
    planes = solve(found, 5, 0.5)
    members = held_out.measure(task, planes, found.unit).members
    return task, planes, found.unit, members


@pytest.fixture(scope="module")
def tested(solved):
    task, planes, unit, members = solved
    return trials.run(task, planes, unit, PAIRS, members)


def activations(task, keys):
    for key in keys:
        view, _ = task.model.spec.preprocessing.fit(task.held_out.open(key))
        yield task.cut.trunk(task.model.inputs(view[None]))


def test_swaps_are_those_of_single_images(solved, tested):
    task, planes, unit, members = solved
    for target, others in PAIRS.items():
        for other in others:
            pair = torch.tensor([target]), torch.tensor([other])
            normals, _ = planes.between(*pair)
            flips = [
                float(shift.search(task.cut, a, normals, *pair, unit).flip)
                for a in activations(task, members[target][:4])
            ]
            turned = [flip for flip in flips if np.isfinite(flip)]
            assert len(flips) == 4
            assert float(tested.swap_rate[target, other]) == len(turned) / 4
            assert float(tested.swap_shift[target, other]) == pytest.approx(np.median(turned), rel=1e-5)
    assert int(tested.swap_rate.isfinite().sum()) == 3


def test_a_median_shift_really_turns_half_of_the_images(solved, tested):
    task, planes, unit, members = solved
    normals, _ = planes.between(torch.tensor([6]), torch.tensor([9]))
    at = float(tested.swap_shift[6, 9]) * unit * 1.02
    won = [
        float(task.cut.head(shift.shifted(task.cut, a, normals, torch.tensor([[at]]))).softmax(1)[0, 9]) > 0.5
        for a in activations(task, members[6][:4])
    ]
    assert sum(won) >= 2


def test_images_lie_on_the_side_of_their_mean_position(solved, tested):
    task, planes, _, members = solved
    shares = []
    for target, others in PAIRS.items():
        for other in others:
            normals, offsets = planes.between(torch.tensor([target]), torch.tensor([other]))
            means = [task.cut.positions(a)[0].mean(0) for a in activations(task, members[target][:4])]
            shares.append(np.mean([float(mean @ normals[0] + offsets[0]) > 0 for mean in means]))
    assert tested.image_accuracy == pytest.approx(np.mean(shares))


def test_masking_curves_are_means_over_pairs_of_means_over_images(solved, tested):
    task, planes, _, members = solved
    curves = []
    for target, others in PAIRS.items():
        for other in others:
            normals, offsets = planes.between(torch.tensor([target]), torch.tensor([other]))
            rows = []
            for a in activations(task, members[target][:4]):
                vectors = task.cut.positions(a)[0]
                order = np.argsort(-(vectors @ normals[0] + offsets[0]).numpy(), kind="stable")
                row = []
                for tenth in range(11):
                    left = vectors.clone()
                    for position in order[: round(tenth / 10 * len(order))]:
                        left[position] = 0
                    row.append(task.cut.head(task.cut.unpositions(left[None])).softmax(1)[0, [target, other]].numpy())
                rows.append(row)
            curves.append(np.mean(rows, axis=0))
    expected = np.mean(curves, axis=0)
    assert tested.curves.target == pytest.approx(expected[:, 0], abs=1e-5)
    assert tested.curves.other == pytest.approx(expected[:, 1], abs=1e-5)


def test_random_masking_begins_and_ends_alike_and_takes_longer(tested):
    curves = tested.curves
    for own, random in ((curves.target, curves.target_random), (curves.other, curves.other_random)):
        assert (own[0], own[-1]) == pytest.approx((random[0], random[-1]), abs=1e-6)
    assert sum(curves.target_random) > sum(curves.target)


def test_batches_do_not_matter(solved, tested):
    task, planes, unit, members = solved
    whole = trials.run(worlds.task(task.training.root.parent, test_images=4), planes, unit, PAIRS, members)
    assert whole.curves.target_random == pytest.approx(tested.curves.target_random, abs=1e-6)
    torch.testing.assert_close(whole.swap_shift, tested.swap_shift, equal_nan=True)


def test_few_rows_at_a_time_change_nothing(solved, tested, monkeypatch):
    task, planes, unit, members = solved
    monkeypatch.setattr(trials, "_ELEMENTS", 1)
    single = trials.run(task, planes, unit, PAIRS, members)
    assert single.curves.other == pytest.approx(tested.curves.other, abs=1e-6)
    torch.testing.assert_close(single.swap_rate, tested.swap_rate, equal_nan=True)


def test_without_held_out_images_nothing_is_said(solved):
    task, planes, unit, _ = solved
    found = trials.run(task, planes, unit, PAIRS, {})
    assert found.curves is None
    assert bool(found.swap_rate.isnan().all())


def test_where_nothing_is_left_the_model_need_not_answer(solved, tested, monkeypatch):
    task, planes, unit, members = solved
    head = task.cut.head
    monkeypatch.setattr(task.cut, "head", lambda a: head(a) / a.flatten(1).any(1, keepdim=True))  # as a norm would
    found = trials.run(task, planes, unit, PAIRS, members)
    for curve, known in zip(astuple(found.curves), astuple(tested.curves), strict=True):
        assert curve[:-1] == pytest.approx(known[:-1])
        assert curve[-1] == 0.0
