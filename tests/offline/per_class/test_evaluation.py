"""Judging concepts of each class, against sums done by hand in float64, image by image."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.optimize
import torch

from offline import passes
from offline.images import Stream
from offline.judging import CURVE
from offline.per_class.evaluation import ClassConcepts, codec_of, judge_classes, mean_metrics
from tests.offline.test_judging import CHANNELS, CLASSES, IMAGES, folder, gini, model

__all__ = ["folder", "model"]

POSITIONS = 16


@pytest.fixture(scope="module")
def classes() -> dict[int, ClassConcepts]:
    """Concepts of every class, of each another number."""
    generator = torch.Generator().manual_seed(0)
    return {
        target: ClassConcepts(
            torch.rand(2 + target, CHANNELS, generator=generator),
            torch.rand(2 + target, generator=generator, dtype=torch.float64),
        )
        for target in range(CLASSES)
    }


def by_hand(model, folder, classes) -> dict[int, dict[str, list]]:
    """Return what is to be averaged, by class and image."""
    net, found = copy.deepcopy(model.module).double(), {}

    def head(positions: torch.Tensor) -> torch.Tensor:
        return net.linear(net.bend(positions.T.view(1, CHANNELS, 4, 4)).mean((2, 3)))[0]

    for key in folder.keys:
        x = torch.from_numpy(np.asarray(folder.open(key)).copy()).permute(2, 0, 1)[None].double() / 255
        a = net.layer(x)[0].flatten(1).T.clone().requires_grad_()
        logits = head(a)
        target = int(logits.argmax())
        logits[target].backward()
        d = classes[target].dictionary.double()
        z = torch.from_numpy(np.stack([scipy.optimize.nnls(d.numpy().T, row)[0] for row in a.detach().numpy()]))
        contributions = (z * (a.grad @ d.T)).sum(0)

        def kept(order: list[int], z: torch.Tensor = z, d: torch.Tensor = d, target: int = target) -> list[list[bool]]:
            steps = range(len(order) + 1)
            return [
                [
                    int(head((z * torch.tensor([k in chosen for k in range(len(d))])) @ d).argmax()) == target
                    for chosen in some
                ]
                for some in ([set(order[i:]) for i in steps], [set(order[:i]) for i in steps])
            ]

        row = {
            "whole": kept(classes[target].importance.argsort(descending=True).tolist()),
            "first": kept(contributions.argsort(descending=True, stable=True).tolist()),
            "active": (z > 1e-9).sum(0).numpy(),
            "largest": int(contributions.argmax()),
            "agrees": int(head(z @ d).argmax()) == target,
        }
        for name, value in row.items():
            found.setdefault(target, {}).setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_class_is_judged_as_a_plain_reference_judges_it(model, folder, classes, batch_size):
    cut, codec = model.cut("layer"), codec_of(classes, torch.device("cpu"))
    stream = Stream(folder, folder.keys, model.spec.preprocessing, batch_size)
    images = passes.explain(model, cut, codec, stream, dict.fromkeys(classes, IMAGES))
    judged, expected = judge_classes(cut, codec, images, classes), by_hand(model, folder, classes)
    assert judged.keys() == expected.keys()
    assert len(expected) > 2
    for target, rows in expected.items():
        concepts, count = classes[target], len(classes[target].dictionary)
        found = judged[target].metrics(concepts.dictionary, None)
        whole, first = np.mean(rows["whole"], axis=0), np.mean(rows["first"], axis=0)
        active, images_ = np.stack(rows["active"]), len(rows["largest"])
        # Concepts that there are not change nothing more.
        first = np.concatenate([first, np.repeat(first[:, -1:], CURVE - count, axis=1)], axis=1)
        for name, (deletion, insertion), steps in (("", whole, count), (f"_{CURVE}", first, CURVE)):
            assert found[f"deletion_aopc{name}"] == pytest.approx((deletion[0] - deletion).sum() / (steps + 2))
            assert found[f"insertion_auc{name}"] == pytest.approx(np.trapezoid(insertion) / steps)
        assert found["images"] == images_
        assert found["top1_agreement"] == pytest.approx(np.mean(rows["agrees"]))
        assert found["gini"] == pytest.approx(gini(concepts.importance.numpy()))
        assert found["l0_position"] == pytest.approx(active.sum() / images_ / POSITIONS)
        assert found["code_density"] == pytest.approx(active.mean() / POSITIONS)
        statistics = judged[target].statistics(torch.full((images_,), target))
        shares = np.bincount(rows["largest"], minlength=count) / images_
        assert [row["prevalence"] for row in statistics] == pytest.approx(list(shares))
        assert [row["active_share"] for row in statistics] == pytest.approx(list((active > 0).mean(0)))
        assert all(row.get("reliability", 1) == 1 for row in statistics)
        assert not any("importance" in row or "contribution" in row for row in statistics)


def test_means_are_over_classes_that_are_seen():
    seen = {"images": 3.0, "kl": 0.2, "stability": 0.5}
    assert mean_metrics([seen, {"stability": 0.9}, {"images": 1.0, "kl": 0.4, "stability": 0.1, "accuracy": 1.0}]) == (
        pytest.approx({"kl": 0.3, "stability": 0.3})
    )
    assert mean_metrics([{"stability": 0.9}, {"stability": 0.1}]) == pytest.approx({"stability": 0.5})
    assert mean_metrics([]) == {}
