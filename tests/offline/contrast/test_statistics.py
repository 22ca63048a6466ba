"""Sums over vectors, against loops over single images and positions in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from offline.contrast.evidence import evidence
from offline.contrast.statistics import Statistics, gather
from offline.images import shuffled
from tests.offline.contrast import worlds


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return worlds.place(tmp_path_factory.mktemp("contrast"))


def looked_at(task, key):
    """Return the logits of one image, its vectors and their evidence, all float64 but for what the model computes."""
    view, _ = task.model.spec.preprocessing.fit(task.training.open(key))
    a = task.cut.trunk(task.model.inputs(view[None]))
    with torch.enable_grad(), task.cut.linearised():
        leaf = a.clone().requires_grad_()
        logits = task.cut.head(leaf)[0]
        target = int(logits.argmax())
        others = torch.cat([logits[:target], logits[target + 1 :]])
        (gradient,) = torch.autograd.grad(logits[target] - others.logsumexp(0), leaf)
    vectors, slopes = (task.cut.positions(each)[0].double().numpy() for each in (a, gradient))
    return logits.detach().numpy(), vectors, [float(v @ s) for v, s in zip(vectors, slopes, strict=True)]


def reference(task, share=0.5):
    """Sum image by image, position by position."""
    classes, channels = task.cut.n_classes, task.cut.layout.channels
    wanted = task.classes()
    found = {
        "counts": np.zeros(classes),
        "sums": np.zeros((classes, channels)),
        "neutral_count": 0,
        "neutral_sum": np.zeros(channels),
        "squares": np.zeros((channels, channels)),
        "runners_up": np.zeros((classes, classes)),
    }
    norms, taken = [], np.zeros(classes)
    for key in shuffled([key for key in task.training.keys if "broken" not in key], task.config.seed):
        logits, vectors, values = looked_at(task, key)
        ranked = [c for c in np.argsort(-logits) if c in wanted]
        target = int(logits.argmax())
        if target not in wanted or taken[target] == task.config.images_per_class or max(values) <= 0:
            continue
        taken[target] += 1
        found["runners_up"][target, ranked[1]] += 1
        norms += [np.linalg.norm(vector) for vector in vectors]
        for vector, value in zip(vectors, values, strict=True):
            if value > share * max(values):
                found["counts"][target] += 1
                found["sums"][target] += vector
            elif value <= 0:
                found["neutral_count"] += 1
                found["neutral_sum"] += vector
            else:
                continue
            found["squares"] += np.outer(vector, vector)
    return found, np.mean(norms), taken


@pytest.mark.parametrize(
    "changes", [{}, {"layer": "layer3"}, {"model": "bcos"}, {"images_per_class": 7, "batch_size": 5}]
)
def test_sums_are_those_of_the_definition(place, changes):
    task = worlds.task(place, **changes)
    found = gather(task, task.classes())
    expected, unit, images = reference(task)
    for name, value in expected.items():
        got = getattr(found, name).numpy()
        assert got == pytest.approx(value, rel=1e-5, abs=1e-5 * np.abs(value).max()), name
    assert found.unit == pytest.approx(unit, rel=1e-6)
    assert found.images.tolist() == images.tolist()
    assert found.images.sum() == len(found.digests)
    assert found.signed == (task.config.model == "bcos")
    assert expected["neutral_count"] > 0
    assert "ship/broken.jpg" in task.skipped_images


def test_batches_do_not_matter(place):
    small, large = (
        gather(task, task.classes()) for task in (worlds.task(place, batch_size=3), worlds.task(place, batch_size=64))
    )
    assert small.keys == large.keys
    for name in ("counts", "sums", "neutral_count", "neutral_sum", "squares", "norms", "runners_up"):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=1e-6, atol=1e-6)


def test_tokens_without_a_place_are_left_out(place, monkeypatch):
    task = worlds.task(place)
    a = task.cut.trunk(task.model.example())
    whole = evidence(task.cut, a, torch.tensor([0, 1]))
    monkeypatch.setattr(task.cut, "layout", task.cut.layout._replace(tokens=3))
    less = evidence(task.cut, a, torch.tensor([0, 1]))
    assert torch.equal(less.values, whole.values[:, 3:])
    assert torch.equal(less.vectors, whole.vectors[:, 3:])


def test_an_image_that_nothing_speaks_for_gives_nothing(place):
    task = worlds.task(place)
    found = evidence(task.cut, task.cut.trunk(task.model.example()), torch.tensor([0, 1]))
    against = found._replace(values=-found.values.abs())
    assert not bool(against.speaking(0.5).any())
    assert bool(against.neutral().all())
    sums = Statistics.empty(10, task.cut.layout.channels, torch.device("cpu"))
    batch = next(iter(task.stream(task.training, task.training.keys[:2])))
    sums.add(batch, against, torch.tensor([3, 3]), torch.tensor([4, 4]), 0.5)
    assert int(sums.predicted[3]) == 2
    assert not bool(sums.images.any() | sums.runners_up.any() | sums.squares.any() | sums.norms.any())


def test_images_without_an_answer_are_skipped(place, monkeypatch):
    task, whole = worlds.task(place), worlds.task(place)
    with monkeypatch.context() as patch:
        patch.setattr(task.cut, "head", worlds.unanswered(task, 4_350))
        found = gather(task, [6, 8, 9])
    skipped = [key for key, why in task.skipped_images.items() if "NaN" in why]
    assert 0 < len(skipped) < 30
    assert not set(skipped) & found.digests.keys()
    rest = gather(
        replace(whole, training=replace(whole.training, keys=sorted(set(whole.training.keys) - set(skipped)))),
        [6, 8, 9],
    )
    assert found.predicted.tolist() == rest.predicted.tolist()
    assert found.sums.numpy() == pytest.approx(rest.sums.numpy(), rel=1e-5)
