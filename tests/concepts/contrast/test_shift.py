"""The search for the shift that turns an image, against a fine scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.contrast import shift
from concepts.contrast.planes import Planes
from concepts.kinds.contrast import tables
from concepts.model import Model
from tests.concepts.contrast.conftest import UNIT, make_bank

Views = NDArray[np.uint8]


class Case:
    """Activations of one layer, with planes from the predicted class to a given one."""

    def __init__(self, model: Model, views: Views, layer: str) -> None:
        self.cut = model.cut(layer)
        self.planes: Planes = tables(make_bank(model, views, layer)).planes
        self.a = self.cut.trunk(model.inputs(views))
        ranked = self.cut.head(self.a)[:, :9].argsort(dim=1, descending=True)
        self.targets, self.others = ranked[:, 0], ranked[:, 1]
        self.normals, _ = self.planes.between(self.targets, self.others)

    def found(self, rows: Tensor) -> shift.Shifted:
        return shift.search(self.cut, self.a[rows], self.normals[rows], self.targets[rows], self.others[rows], UNIT)


@pytest.fixture(scope="module", params=["layer3", "layer2"])
def case(request: pytest.FixtureRequest, model: Model, views: Views) -> Case:
    return Case(model, views, request.param)


def test_the_image_turns_at_the_flip_and_not_before(case: Case) -> None:
    """By surgery on the activation in plain loops."""
    found = case.found(torch.arange(20))
    turned = found.flip.isfinite().nonzero().squeeze(1).tolist()
    assert len(turned) > 10
    for row in turned:
        flip = float(found.flip[row])
        for at, expected in ((flip, True), (flip - max(0.04 * flip, 1 / 500), False)):
            moved = case.a[row].clone()
            for y in range(moved.shape[1]):
                for x in range(moved.shape[2]):
                    moved[:, y, x] = (moved[:, y, x] - at * UNIT * case.normals[row]).clamp_min(0)
            probability = case.cut.head(moved.unsqueeze(0)).softmax(1)[0, case.others[row]]
            assert (float(probability) > 0.5) is expected or flip == 0.0


def test_points_are_in_order_and_hold_both_probabilities(case: Case) -> None:
    found = case.found(torch.arange(20))
    for shifts, probabilities, flip in zip(found.shifts, found.probabilities, found.flip, strict=True):
        tried = shifts[shifts.isfinite()]
        assert tried[0] == 0
        assert tried[-1] == shift.LARGEST
        assert bool((tried.diff() > 0).all())
        values = probabilities[: len(tried)]
        assert bool(((values >= 0) & (values <= 1)).all())
        won = tried[values[:, 1] > 0.5]
        assert float(flip) == (float(won[0]) if len(won) else float("inf"))
        assert bool(probabilities[len(tried) :].isnan().all())


def test_an_image_is_shifted_as_it_would_be_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    together = case.found(torch.arange(20))
    monkeypatch.setattr(shift, "_ELEMENTS", 30 * case.a[0].numel())  # three images a piece
    for row in range(0, 20, 5):
        alone = case.found(torch.tensor([row]))
        torch.testing.assert_close(alone.flip[0], together.flip[row])
        kept = together.shifts[row].isfinite()
        torch.testing.assert_close(alone.shifts[0], together.shifts[row][kept])
        torch.testing.assert_close(alone.probabilities[0], together.probabilities[row][kept], atol=1e-5, rtol=1e-4)


def test_an_image_on_the_other_side_turns_at_once(case: Case) -> None:
    case_turned = shift.search(case.cut, case.a, -case.normals, case.others, case.targets, UNIT)
    sure = case.cut.head(case.a).softmax(1).gather(1, case.targets.unsqueeze(1)).squeeze(1) > 0.5
    assert bool((case_turned.flip[sure] == 0).all())
    assert bool(sure.any())


def test_signed_layers_keep_their_signs(bcos: Model, views: Views) -> None:
    cut = bcos.cut("layer3")
    a = cut.trunk(bcos.inputs(views[:2]))
    normals = torch.nn.functional.normalize(torch.randn(2, a.shape[1], generator=torch.Generator().manual_seed(0)))
    moved = shift.shifted(cut, a, normals, torch.tensor([[0.0, 2.0], [0.5, 1.0]]))
    assert torch.equal(moved[0], a[0])
    torch.testing.assert_close(moved[1], a[0] - 2 * normals[0].view(-1, 1, 1))
    torch.testing.assert_close(moved[2], a[1] - 0.5 * normals[1].view(-1, 1, 1))
    assert bool((moved < 0).any())


def test_a_shift_that_the_model_has_no_answer_to_turns_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    head, known = case.cut.head, case.found(torch.arange(20))
    limit = 1.5 * case.a.flatten(1).sum(1).max()
    monkeypatch.setattr(
        case.cut, "head", lambda a: head(a).masked_fill(a.flatten(1).sum(1, keepdim=True) > limit, torch.nan)
    )
    found = case.found(torch.arange(20))
    tried = found.shifts.isfinite()
    assert bool(found.probabilities[tried].isfinite().all())
    assert bool((found.probabilities[tried] == 0).all(1).any())
    assert bool((found.flip >= known.flip).all())
