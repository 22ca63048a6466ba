"""Contrasts against a float64 reference that goes position by position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concepts.bank import Bank, Concept, freeze, read_manifest, thaw
from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import Contrast, ContrastRequest, PlaneReport
from concepts.engine import Engine
from concepts.errors import (
    CorruptData,
    InvalidInput,
    NumericalFailure,
    UnknownClass,
    UnsupportedOption,
    WhenceError,
)
from concepts.explanation import ExplainOptions
from concepts.model import Model
from tests.concepts.contrast.conftest import UNKNOWN
from tests.concepts.test_engine import Reference

Views = NDArray[np.uint8]
MAPS = ("activation", "contribution")
PAIRS = ((3, 5), (5, 3), (0, 8), (2, 4))


@pytest.fixture(scope="module")
def engine(model: Model, contrast_bank: Bank) -> ContrastEngine:
    return ContrastEngine(model, contrast_bank)


@pytest.fixture(scope="module")
def early(model: Model, early_contrast_bank: Bank) -> ContrastEngine:
    return ContrastEngine(model, early_contrast_bank)


def ask(target: int | None = None, other: int | None = None, *, shift: bool = True, **options: Any) -> ContrastRequest:
    return ContrastRequest(target, other, ExplainOptions(**{"maps": MAPS, **options}), shift)


def contrast(engine: ContrastEngine, views: Views, *requests: ContrastRequest) -> list[Contrast]:
    """Answer requests that can all be answered."""
    for request in requests:
        engine.check(request)
    answers = engine.contrast(views, requests)
    assert all(isinstance(answer, Contrast) for answer in answers), answers
    return answers  # type: ignore[return-value]


class Slow:
    """One image and one pair, in float64."""

    def __init__(self, model: Model, bank: Bank, view: Views, target: int, other: int) -> None:
        reference = Reference(model, bank)
        a = reference.activation(view)
        leaf = a.clone().requires_grad_()
        with torch.enable_grad():
            logits = reference.head(leaf)[0]
            difference = logits[target] - logits[other]
            (gradient,) = torch.autograd.grad(difference, leaf)
        self.difference = float(difference.detach())
        positions, gradients = (t[0].flatten(1).T.numpy() for t in (a, gradient))
        w, k = bank.tensors["directions"].double().numpy(), bank.tensors["products"].double().numpy()
        system = np.array([[k[target, target], k[target, other]], [k[target, other], k[other, other]]])
        alpha, beta = np.linalg.solve(system, [1.0, -1.0])
        normal = alpha * w[target] + beta * w[other]
        self.normal = normal / np.linalg.norm(normal)
        self.distances = (positions - bank.tensors["centre"].double().numpy()) @ self.normal
        self.contributions = np.array([g @ (z * self.normal) for g, z in zip(gradients, self.distances, strict=True)])
        self.carried = self.contributions.sum() / (gradients * positions).sum()
        owned = [c.id for c in bank.concepts if (c.class_index, c.other_index) == (target, other)]
        dictionary = bank.tensors["dictionary"].double().numpy()[owned]
        self.codes, self.shares = {}, {}
        for index in owned:
            self.codes[index] = np.zeros(len(positions))
            self.shares[index] = np.zeros(len(positions))
        for p, (position, g, z) in enumerate(zip(positions, gradients, self.distances, strict=True)):
            if z > 0 and owned:
                for index, row, code in zip(
                    owned, dictionary, scipy.optimize.nnls(dictionary.T, position)[0], strict=True
                ):
                    self.codes[index][p], self.shares[index][p] = code, code * (row @ g)


@pytest.mark.parametrize("which", ["engine", "early"])
def test_distances_contributions_and_prototypes_are_the_references(
    which: str, request: pytest.FixtureRequest, model: Model, views: Views
) -> None:
    engine: ContrastEngine = request.getfixturevalue(which)
    for row, pair in zip((6, 10, 0, 4), PAIRS, strict=True):
        (answer,) = contrast(engine, views[row : row + 1], ask(*pair))
        slow = Slow(model, engine.bank, views[row], *pair)
        near = {"rtol": 1e-3, "atol": 1e-4 * float(np.abs(slow.distances).max())}
        np.testing.assert_allclose(answer.maps["activation"].values.ravel(), slow.distances, **near)
        scale = float(np.abs(slow.contributions).max())
        np.testing.assert_allclose(
            answer.maps["contribution"].values.ravel(), slow.contributions, rtol=1e-3, atol=1e-4 * scale
        )
        assert answer.contribution == pytest.approx(slow.contributions.sum(), rel=1e-3, abs=1e-3 * scale)
        assert answer.contribution_for_target == pytest.approx(slow.contributions.clip(0).sum(), rel=1e-3)
        assert answer.contribution_for_other == pytest.approx(
            slow.contributions.clip(None, 0).sum(), rel=1e-3, abs=1e-6
        )
        assert answer.faithfulness.carried_share == pytest.approx(slow.carried, rel=1e-2, abs=1e-3)
        assert answer.faithfulness.explained_logit == pytest.approx(slow.difference, rel=1e-3, abs=1e-3)
        assert {c.id for c in answer.concepts} == set(slow.codes)
        for concept in answer.concepts:
            codes, shares = slow.codes[concept.id], slow.shares[concept.id]
            largest = max(np.abs(codes).max(), 1e-3)
            np.testing.assert_allclose(concept.maps["activation"].values.ravel(), codes, rtol=1e-3, atol=1e-3 * largest)
            assert concept.activation == pytest.approx(codes.sum(), rel=1e-3, abs=1e-3 * largest)
            assert concept.peak == pytest.approx(codes.max(), rel=1e-3, abs=1e-3 * largest)
            assert concept.contribution == pytest.approx(shares.sum(), rel=1e-2, abs=1e-3)
            assert concept.maps["contribution"].values.sum() == pytest.approx(concept.contribution, rel=1e-3, abs=1e-4)


def test_sums_hold(engine: ContrastEngine, early: ContrastEngine, views: Views) -> None:
    for one in (engine, early):
        for answer in contrast(one, views[4:8], *[ask(*pair) for pair in PAIRS]):
            for kind, total in (("contribution", answer.contribution),):
                assert float(answer.maps[kind].values.sum()) == pytest.approx(total, rel=1e-4, abs=1e-4)  # type: ignore[index]
            parts = answer.contribution_for_target + answer.contribution_for_other
            assert parts == pytest.approx(answer.contribution, rel=1e-5, abs=1e-5)
            report = answer.faithfulness
            assert report.explained_logit == pytest.approx(answer.target.logit - answer.other.logit, abs=1e-5)
            rest = report.explained_logit - report.constant - answer.contribution
            assert report.completeness_residual == pytest.approx(rest, abs=1e-5)
            assert report.exactness == ("exact" if one is engine else "first_order")


def test_turning_the_pair_round_negates(engine: ContrastEngine, early: ContrastEngine, views: Views) -> None:
    for one in (engine, early):
        for pair in PAIRS:
            (there,) = contrast(one, views[6:7], ask(*pair))
            (back,) = contrast(one, views[6:7], ask(*pair[::-1]))
            assert np.array_equal(back.maps["activation"].values, -there.maps["activation"].values)
            np.testing.assert_allclose(
                back.maps["contribution"].values, -there.maps["contribution"].values, rtol=1e-4, atol=1e-5
            )
            assert back.contribution == pytest.approx(-there.contribution, rel=1e-4, abs=1e-5)
            assert back.contribution_for_target == pytest.approx(-there.contribution_for_other, rel=1e-4, abs=1e-5)
            assert (back.target.index, back.other.index) == (there.other.index, there.target.index)


def test_classes_default_to_the_prediction_and_the_runner_up_with_a_plane(
    engine: ContrastEngine, model: Model, views: Views
) -> None:
    logits = Reference(model, engine.bank).head(torch.cat([Reference(model, engine.bank).activation(v) for v in views]))
    answers = engine.contrast(views, [ask()] * len(views))
    seen = 0
    for ranked, answer in zip(logits.argsort(dim=1, descending=True).tolist(), answers, strict=True):
        if ranked[0] == UNKNOWN:
            assert isinstance(answer, UnsupportedOption)
            continue
        assert isinstance(answer, Contrast)
        expected = [index for index in ranked if index != UNKNOWN][:2]
        assert [answer.target.index, answer.other.index] == expected
        seen += ranked[1] == UNKNOWN
    assert seen  # the class without planes was a runner-up somewhere


@pytest.mark.parametrize("which", ["engine", "early"])
def test_an_answer_is_the_same_alone_and_in_any_batch(which: str, request: pytest.FixtureRequest, views: Views) -> None:
    engine: ContrastEngine = request.getfixturevalue(which)
    requests = [ask(3, 5), ask(map_size="image", top_k=1), ask(5, 3, maps=()), ask(0, 8, order="activation"), ask(2)]
    rows = [6, 1, 10, 0, 4]
    together = contrast(engine, views[rows], *requests)
    for row, each, answer in zip(rows, requests, together, strict=True):
        (alone,) = contrast(engine, views[row : row + 1], each)
        assert (answer.target.index, answer.other.index) == (alone.target.index, alone.other.index)
        assert answer.contribution == pytest.approx(alone.contribution, rel=1e-4, abs=1e-4)
        assert (answer.flip_shift is None) == (alone.flip_shift is None)
        assert (answer.flip_shift or 0.0) == pytest.approx(alone.flip_shift or 0.0, rel=1e-6)
        assert len(answer.shift_curve) == len(alone.shift_curve)
        assert [c.id for c in answer.concepts] == [c.id for c in alone.concepts]
        assert set(answer.maps) == set(each.options.maps)
        for kind in answer.maps:
            np.testing.assert_allclose(answer.maps[kind].values, alone.maps[kind].values, rtol=1e-3, atol=1e-4)
        for one, other in zip(answer.concepts, alone.concepts, strict=True):
            assert one.activation == pytest.approx(other.activation, rel=1e-3, abs=1e-3)
            assert set(one.maps) == set(each.options.maps)


def test_one_image_that_breaks_the_model_fails_alone(model: Model, contrast_bank: Bank, views: Views) -> None:
    class Fragile(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            black = (x < -1.7).all(3).all(2).all(1)
            return self.inner(x.masked_fill(black.view(-1, 1, 1, 1), torch.nan))

    engine = ContrastEngine(
        replace(model, module=Fragile(model.module).eval()), replace(contrast_bank, layer="inner.layer3")
    )
    batch = views[:3].copy()
    batch[1] = 0
    answers = engine.contrast(batch, [ask(0, 8)] * 3)
    assert isinstance(answers[1], NumericalFailure)
    for row in (0, 2):
        (alone,) = contrast(engine, batch[row : row + 1], ask(0, 8))
        answer = answers[row]
        assert isinstance(answer, Contrast)
        assert answer.contribution == pytest.approx(alone.contribution, rel=1e-4)
        assert answer.flip_shift == pytest.approx(alone.flip_shift, rel=1e-6)


def test_the_curve_tells_of_the_flip_and_can_be_left_out(engine: ContrastEngine, views: Views) -> None:
    answers = contrast(engine, views[:8], *[ask(*pair) for pair in PAIRS * 2])
    assert any(answer.flip_shift for answer in answers)
    for answer in answers:
        first = answer.shift_curve[0]
        assert first.shift == 0
        assert first.target_probability == pytest.approx(answer.target.probability, abs=1e-4)
        assert first.other_probability == pytest.approx(answer.other.probability, abs=1e-4)
        won = [point.shift for point in answer.shift_curve if point.other_probability > 0.5]
        assert answer.flip_shift == (won[0] if won else None)
    (quick,) = contrast(engine, views[:1], ask(*PAIRS[0], shift=False))
    assert (quick.flip_shift, quick.shift_curve) == (None, ())
    assert quick.contribution == pytest.approx(answers[0].contribution, rel=1e-4)
    with pytest.raises(ValueError, match="batch_key"):
        engine.contrast(views[:2], [ask(), ask(shift=False)])


def test_the_plane_is_reported_as_the_bank_says(engine: ContrastEngine, views: Views) -> None:
    there, back = contrast(engine, views[:2], ask(3, 5), ask(5, 3))
    assert there.plane == PlaneReport(60, 60, accuracy=0.75, swap_shift=0.5)
    assert back.plane == PlaneReport(60, 60)


def test_a_pair_without_prototypes_has_none(engine: ContrastEngine, views: Views) -> None:
    (without,) = contrast(engine, views[4:5], ask(2, 4))
    assert without.concepts == ()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ask(3, 3), InvalidInput, "two different classes, not 'cat' twice"),
        (ask(3, 10), UnknownClass, "classes 0 to 9, not 10"),
        (ask(-1), UnknownClass, "not -1"),
        (ask(3, UNKNOWN), UnsupportedOption, "no planes for class 'truck', which too few training images"),
        (ask(UNKNOWN, 3), UnsupportedOption, "no planes for class 'truck'"),
        (ask(UNKNOWN), UnsupportedOption, "it has for 'airplane'"),
        (ask(None, UNKNOWN), UnsupportedOption, "no planes for class 'truck'"),
        (ask(maps=("input",)), UnsupportedOption, "has no maps of kind input"),
        (ask(substitute=True), UnsupportedOption, "has no substitute"),
        (ask(parts=True), UnsupportedOption, "has no parts"),
        (ask(colours=True), UnsupportedOption, "has no colours"),
        (ask(concepts="all"), UnsupportedOption, "has no concepts"),
        (ask(estimator="ablation"), UnsupportedOption, "has no estimator ablation"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    engine: ContrastEngine, request_: ContrastRequest, error: type[WhenceError], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.check(request_)


def test_the_predicted_class_cannot_be_contrasted_with_itself(engine: ContrastEngine, views: Views) -> None:
    (known,) = contrast(engine, views[:1], ask())
    assert known.target.index == 0
    answers = engine.contrast(views[:2], [ask(None, 0), ask(None, 8)])
    assert isinstance(answers[0], InvalidInput)
    assert "predicts 'airplane', the class to contrast with" in answers[0].message
    assert isinstance(answers[1], Contrast)


def test_classes_that_are_alike_at_the_layer_have_no_plane(model: Model, contrast_bank: Bank) -> None:
    tensors = dict(contrast_bank.tensors)
    tensors["directions"], tensors["products"] = tensors["directions"].clone(), tensors["products"].clone()
    tensors["directions"][4] = tensors["directions"][2]
    tensors["products"][4] = tensors["products"][2]
    tensors["products"][:, 4] = tensors["products"][:, 2]
    engine = ContrastEngine(model, replace(contrast_bank, tensors=tensors))
    with pytest.raises(UnsupportedOption, match=r"no plane between 'deer' and 'bird'.*does not tell them apart"):
        engine.check(ask(4, 2))
    engine.check(ask(4, 3))


def test_a_bank_without_any_plane_loads_warms_up_and_refuses(model: Model, contrast_bank: Bank, views: Views) -> None:
    nothing = {**contrast_bank.tensors, "images": torch.zeros(10, dtype=torch.int64)}
    engine = ContrastEngine(model, replace(contrast_bank, tensors=nothing, concepts=()))
    engine.warm_up()
    (answer,) = engine.contrast(views[:1], [ask()])
    assert isinstance(answer, UnsupportedOption)
    assert answer.message.endswith("predicted as; it has none")


def test_a_bank_without_prototypes_answers_all_else(model: Model, contrast_bank: Bank, views: Views) -> None:
    tensors = {name: tensor for name, tensor in contrast_bank.tensors.items() if name != "dictionary"}
    bare = ContrastEngine(model, replace(contrast_bank, tensors=tensors, concepts=()))
    full = ContrastEngine(model, contrast_bank)
    one, other = (contrast(engine, views[6:7], ask(3, 5))[0] for engine in (bare, full))
    assert one.concepts == ()
    assert one.contribution == other.contribution
    assert bare.memory.bank < full.memory.bank


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": None}, "needs the tensor 'unit'"),
        ({"unit": torch.tensor(0.0)}, "mean norm above zero"),
        ({"images": torch.ones(4, dtype=torch.int64)}, "count of images for each class"),
        ({"accuracy": torch.zeros(10, 9)}, "a number for each pair of 10 classes"),
        ({"dictionary": None}, "needs the tensor 'dictionary'"),
        ({"directions": torch.full((10, 64), torch.nan)}, "finite"),
        ({"unit": torch.tensor(torch.inf)}, "mean norm above zero"),
        ({"directions": torch.tensor(1.0)}, "in its 64 channels"),
        ({"directions": torch.ones(10, 32), "centre": torch.ones(32)}, "in its 64 channels"),
        ({"dictionary": torch.ones(6, 32)}, "have its 64 channels"),
    ],
)
def test_damaged_banks_are_refused(
    model: Model, contrast_bank: Bank, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: tensor for name, tensor in {**contrast_bank.tensors, **change}.items() if tensor is not None}
    with pytest.raises(CorruptData, match=message):
        ContrastEngine(model, replace(contrast_bank, tensors=tensors))


@pytest.mark.parametrize("pair", [(None, 3), (3, None), (3, 3), (3, 12), (-1, 3), (3, -1)])
def test_a_prototype_must_name_two_classes(model: Model, contrast_bank: Bank, pair: tuple[int | None, ...]) -> None:
    strange = Concept(0, class_index=pair[0], other_index=pair[1])
    with pytest.raises(CorruptData, match="must name two of its classes"):
        ContrastEngine(model, replace(contrast_bank, concepts=(strange, *contrast_bank.concepts[1:])))


def test_other_kinds_of_question_are_refused(model: Model, contrast_bank: Bank) -> None:
    with pytest.raises(UnsupportedOption, match="ask Contrast"):
        Engine(model, contrast_bank)
    with pytest.raises(UnsupportedOption, match="ask Contrast"):
        contrast_bank.codec()


def test_a_bank_of_another_model_is_refused(model: Model, contrast_bank: Bank) -> None:
    with pytest.raises(InvalidInput, match="not a bank of model"):
        ContrastEngine(model, replace(contrast_bank, weights_digest="c" * 64))


def test_a_bank_comes_back_from_its_files(model: Model, contrast_bank: Bank, views: Views) -> None:
    frozen, files = freeze(contrast_bank)
    manifest = read_manifest(files["bank.json"], frozen.digest)
    back = thaw(manifest, frozen.digest, files["tensors.safetensors"], files["concepts.jsonl"])
    assert back.concepts == contrast_bank.concepts
    one, other = (contrast(ContrastEngine(model, bank), views[6:7], ask(3, 5))[0] for bank in (contrast_bank, back))
    assert one.contribution == other.contribution
    assert other.plane == one.plane


def test_nothing_is_said_of_tokens_but_they_are_shifted_with_all() -> None:
    """A small transformer: its class token has no place, yet the head sees it."""
    from concepts.model import ModelSpec
    from concepts.preprocessing import Preprocessing

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.token = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.rand(1, 1, 12))
            self.relu, self.head = nn.ReLU(), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            p = self.patches(x).flatten(2).transpose(1, 2)
            a = self.relu(torch.cat([self.token.expand(len(p), 1, 12), p], 1))
            return self.head((a * torch.cat([a.new_full((1,), 3.0), a.new_ones(16)]).view(1, -1, 1)).mean(1))

    torch.manual_seed(0)
    spec = ModelSpec("tokens", "demo.x:y", Preprocessing(32, 32), ("a", "b", "c"), "b" * 64)
    model = Model(spec, Tokens().eval().requires_grad_(False), torch.device("cpu"))
    directions = torch.randn(3, 12)
    tables = {name: torch.full((3, 3), torch.nan) for name in ("accuracy", "margin", "swap_rate", "swap_shift")}
    bank = Bank(
        "contrast", "tokens", "relu", "contrast", "b" * 64, 12, (),
        {
            "directions": directions, "products": directions @ directions.T, "centre": torch.zeros(12),
            "images": torch.ones(3, dtype=torch.int64), "unit": torch.tensor(1.0), **tables,
        },
    )  # fmt: skip
    view = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    engine = ContrastEngine(model, bank)
    (answer,) = contrast(engine, view, ask(0, 1))
    assert answer.maps["activation"].values.shape == (4, 4)
    assert answer.maps["activation"].class_token == 0.0
    normal, _ = engine._planes.between(torch.tensor([0]), torch.tensor([1]))
    a = engine.cut.trunk(model.inputs(view))
    point = answer.shift_curve[3]
    moved = engine.cut.head((a - point.shift * normal).clamp_min(0)).softmax(1)[0]
    assert point.other_probability == pytest.approx(float(moved[1]), rel=1e-4)
    assert answer.maps["contribution"].values.sum() == pytest.approx(answer.contribution, rel=1e-4)


def test_image_maps_have_the_size_of_the_view(engine: ContrastEngine, views: Views) -> None:
    (small,), (large,) = (contrast(engine, views[6:7], ask(3, 5, map_size=size)) for size in ("grid", "image"))
    assert small.maps["activation"].values.shape == (8, 8)
    assert large.maps["activation"].values.shape == (32, 32)
    assert large.maps["activation"].values.mean() == pytest.approx(small.maps["activation"].values.mean(), abs=0.1)
