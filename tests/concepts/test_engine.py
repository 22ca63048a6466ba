"""The engine on ResNet-20 and real images, against slow float64 references that share none of its code."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concepts.bank import Bank
from concepts.cut import Cut
from concepts.engine import Engine
from concepts.errors import (
    InvalidInput,
    NumericalFailure,
    UnknownClass,
    UnsupportedOption,
    WhenceError,
)
from concepts.explanation import EngineRequest, ExplainOptions, Explanation, MapKind
from concepts.model import Model
from concepts.runtimes.torch import TorchTrunk
from tests.concepts.conftest import WITHOUT_CONCEPTS, make_bank

Floats = NDArray[np.float64]
ALL = 1000
"""More concepts than any class has."""


class Reference:
    """The same numbers, one image and one concept at a time, in float64."""

    def __init__(self, model: Model, bank: Bank) -> None:
        stages = dict(copy.deepcopy(model.module).double().named_children())
        names = list(stages)
        split = names.index(bank.layer) + 1
        self.trunk = nn.Sequential(*(stages[name] for name in names[:split]))
        self.head = nn.Sequential(*(stages[name] for name in names[split:]))
        self.preprocessing = model.spec.preprocessing
        self.bank = bank

    def activation(self, view: NDArray[np.uint8]) -> Tensor:
        """Return ``[1, C, H, W]``."""
        p = self.preprocessing
        rgb = torch.from_numpy(((view / 255.0) - np.array(p.mean)) / np.array(p.std))
        return self.trunk(rgb.permute(2, 0, 1).unsqueeze(0))

    def dictionary(self, target: int) -> tuple[list[int], Floats]:
        owned = [c.id for c in self.bank.concepts if c.class_index in (target, None)]
        return owned, self.bank.tensors["dictionary"].double().numpy()[owned]

    def codes(self, a: Tensor, target: int) -> Floats:
        """Return ``[K, H, W]`` by scipy, position by position."""
        _, dictionary = self.dictionary(target)
        codes = np.zeros((len(dictionary), *a.shape[2:]))
        for row, column in np.ndindex(*a.shape[2:]):
            codes[:, row, column] = scipy.optimize.nnls(dictionary.T, a[0, :, row, column].numpy())[0]
        return codes

    def component(self, codes: Floats, dictionary: Floats, k: int) -> Tensor:
        """Return ``comp_k(a)``, ``[1, C, H, W]``."""
        return torch.from_numpy(dictionary[k][:, None, None] * codes[k][None])[None]

    def logit(self, a: Tensor, target: int) -> float:
        return float(self.head(a)[0, target])

    def slope(self, a: Tensor, component: Tensor, target: int) -> float:
        """Return the derivative of the logit along one component: one backward pass for one concept."""
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            logit = self.head(a + (scale - 1) * component)[0, target]
            (gradient,) = torch.autograd.grad(logit, scale)
        return float(gradient)


@pytest.fixture(scope="module")
def engine(model: Model, bank: Bank) -> Engine:
    return Engine(model, bank)


@pytest.fixture(scope="module")
def early(model: Model, early_bank: Bank) -> Engine:
    return Engine(model, early_bank)


def options(**changes: object) -> ExplainOptions:
    return replace(ExplainOptions(top_k=ALL), **changes)  # type: ignore[arg-type]


def explain(
    engine: Engine, views: NDArray[np.uint8], target: int | None = None, **changes: object
) -> list[Explanation]:
    answers = engine.explain(views, [EngineRequest(target, options(**changes))] * len(views))
    assert all(isinstance(answer, Explanation) for answer in answers), answers
    return answers  # type: ignore[return-value]


MAPS: tuple[MapKind, ...] = ("activation", "contribution")


@pytest.mark.parametrize("layer", ["layer3", "layer2"])
def test_codes_contributions_and_maps_are_the_references(
    model: Model, bank: Bank, early_bank: Bank, views: NDArray[np.uint8], layer: str
) -> None:
    chosen = bank if layer == "layer3" else early_bank
    reference, engine, target = Reference(model, chosen), Engine(model, chosen), 3
    for view, answer in zip(views[5:8], explain(engine, views[5:8], target, maps=MAPS), strict=True):
        a = reference.activation(view)
        codes = reference.codes(a, target)
        owned, dictionary = reference.dictionary(target)
        assert sorted(c.id for c in answer.concepts) == owned
        size = float(np.abs(codes).max())
        for concept in answer.concepts:
            k = owned.index(concept.id)
            activation_map, contribution_map = concept.maps["activation"].values, concept.maps["contribution"].values
            assert activation_map.dtype == contribution_map.dtype == np.float32
            assert (activation_map >= 0).all()
            np.testing.assert_allclose(activation_map, codes[k], rtol=1e-3, atol=1e-4 * size)
            assert concept.activation == pytest.approx(codes[k].sum(), rel=1e-3, abs=1e-3 * size)
            assert concept.peak == pytest.approx(codes[k].max(), rel=1e-3, abs=1e-4 * size)
            slope = reference.slope(a, reference.component(codes, dictionary, k), target)
            assert concept.contribution == pytest.approx(slope, rel=2e-3, abs=1e-3)
            assert float(activation_map.sum()) == pytest.approx(concept.activation, rel=1e-5, abs=1e-5)
            assert float(contribution_map.sum()) == pytest.approx(concept.contribution, rel=1e-4, abs=1e-4)
            assert concept.label == f"concept {concept.id}"
        assert answer.faithfulness.code_tolerance is not None
        assert answer.faithfulness.code_tolerance <= 1e-9


def test_contribution_is_the_finite_difference_of_scaling_a_concept(
    model: Model, early_bank: Bank, early: Engine, views: NDArray[np.uint8]
) -> None:
    reference, target, step = Reference(model, early_bank), 5, 1e-5
    (answer,) = explain(early, views[10:11], target)
    a = reference.activation(views[10])
    codes, (owned, dictionary) = reference.codes(a, target), reference.dictionary(target)
    for concept in answer.concepts:
        component = reference.component(codes, dictionary, owned.index(concept.id))
        rise = reference.logit(a + step * component, target) - reference.logit(a - step * component, target)
        assert concept.contribution == pytest.approx(rise / (2 * step), rel=5e-3, abs=2e-3)


def test_the_sum_is_the_logit_where_the_head_is_affine(model: Model, engine: Engine, views: NDArray[np.uint8]) -> None:
    reference = Reference(model, engine.bank)
    for view, answer in zip(views[::4], explain(engine, views[::4], target=1), strict=True):
        assert answer.unexplained is not None
        logit = reference.logit(reference.activation(view), 1)
        assert answer.target.logit == pytest.approx(logit, abs=1e-3)
        parts = answer.faithfulness.constant + sum(c.contribution for c in answer.concepts) + answer.unexplained
        assert parts == pytest.approx(logit, abs=1e-3)
        assert answer.contributions_total == pytest.approx(sum(c.contribution for c in answer.concepts), abs=1e-4)
        assert abs(answer.faithfulness.completeness_residual) < 1e-3
        assert answer.faithfulness.exactness == "exact"
        assert answer.faithfulness.constant == pytest.approx(float(reference.head[-1].bias[1]), abs=1e-5)  # type: ignore[index]


def test_the_report_says_what_is_missing_where_the_head_is_not_affine(
    model: Model, early: Engine, views: NDArray[np.uint8]
) -> None:
    reference = Reference(model, early.bank)
    zero = torch.zeros_like(reference.activation(views[0]))
    for view, answer in zip(views[:4], explain(early, views[:4], target=2), strict=True):
        report = answer.faithfulness
        assert report.exactness == "first_order"
        a = reference.activation(view)
        constant, whole = reference.logit(zero, 2), reference.slope(a, a, 2)
        assert report.constant == pytest.approx(constant, abs=1e-3)
        assert report.completeness_residual == pytest.approx(reference.logit(a, 2) - constant - whole, abs=1e-2)
        assert abs(report.completeness_residual) > 0.1  # or the law above would be too easy


def test_report_against_plain_numpy(model: Model, engine: Engine, early: Engine, views: NDArray[np.uint8]) -> None:
    agreements = set()
    for each in (engine, early):
        reference = Reference(model, each.bank)
        for view, answer in zip(views[2:6], explain(each, views[2:6], target=0), strict=True):
            a = reference.activation(view)
            codes, (_, dictionary) = reference.codes(a, 0), reference.dictionary(0)
            rebuilt = torch.from_numpy(np.einsum("khw,kc->chw", codes, dictionary))[None]
            logits, again = reference.head(a)[0].numpy(), reference.head(rebuilt)[0].numpy()
            log_p, log_q = scipy.special.log_softmax(logits), scipy.special.log_softmax(again)
            report = answer.faithfulness
            error = float((a - rebuilt).norm() / a.norm())
            assert report.relative_error == pytest.approx(error, rel=1e-4)
            assert report.kl == pytest.approx(float((np.exp(log_p) * (log_p - log_q)).sum()), rel=5e-3, abs=1e-5)
            assert report.top1_agrees == (logits.argmax() == again.argmax())
            agreements.add(report.top1_agrees)
            probabilities = np.exp(log_p)
            assert [p.index for p in answer.predictions] == np.argsort(-probabilities)[:5].tolist()
            for prediction in answer.predictions:
                assert prediction.name == model.spec.class_names[prediction.index]
                assert prediction.probability == pytest.approx(
                    float(probabilities[prediction.index]), rel=1e-3, abs=1e-6
                )
            shares = [c.contribution for c in answer.concepts]
            whole = sum(map(abs, shares)) + abs(answer.unexplained or 0)
            assert [c.share for c in answer.concepts] == pytest.approx([s / whole for s in shares], abs=1e-6)
    assert agreements == {True, False}


def test_the_default_target_is_the_prediction(engine: Engine, views: NDArray[np.uint8]) -> None:
    answers = engine.explain(views, [EngineRequest()] * len(views))
    explained = [answer for answer in answers if isinstance(answer, Explanation)]
    assert len({answer.target.index for answer in explained}) >= 5
    for answer in explained:
        assert answer.target == answer.predictions[0]
        assert {engine.bank.concepts[c.id].class_index for c in answer.concepts} <= {answer.target.index}


def close(one: Explanation, other: Explanation) -> None:
    """Compare two answers for one image, field by field."""
    assert [c.id for c in one.concepts] == [c.id for c in other.concepts]
    for left, right in zip(one.concepts, other.concepts, strict=True):
        assert left.contribution == pytest.approx(right.contribution, rel=1e-3, abs=1e-4)
        assert left.activation == pytest.approx(right.activation, rel=1e-3, abs=1e-4)
        assert left.share == pytest.approx(right.share, rel=1e-3, abs=1e-4)
        assert left.maps.keys() == right.maps.keys()
        for kind, values in left.maps.items():
            assert values.values.shape == right.maps[kind].values.shape
            np.testing.assert_allclose(values.values, right.maps[kind].values, rtol=1e-3, atol=1e-4)
    assert one.unexplained == pytest.approx(other.unexplained, rel=1e-3, abs=1e-4)
    assert [p.index for p in one.predictions] == [p.index for p in other.predictions]
    for name in ("relative_error", "kl", "completeness_residual", "integration_error"):
        left, right = getattr(one.faithfulness, name), getattr(other.faithfulness, name)
        assert (left is None) == (right is None)
        assert left is None or left == pytest.approx(right, rel=1e-2, abs=1e-4)
    tolerances = one.faithfulness.code_tolerance, other.faithfulness.code_tolerance
    assert tolerances[0] is not None
    assert tolerances[1] is not None
    assert max(tolerances) < 1e-9


@pytest.mark.parametrize("estimator", ["gradient", "integrated", "ablation"])
def test_an_answer_is_the_same_alone_and_in_any_batch(early: Engine, views: NDArray[np.uint8], estimator: str) -> None:
    both = ("activation", "contribution") if estimator != "ablation" else ("activation",)
    requests = [
        EngineRequest(target, options(top_k=top_k, order=order, maps=maps, map_size=size, estimator=estimator))
        for target, top_k, order, maps, size in [
            (None, 3, "contribution", (), "grid"),
            (4, ALL, "activation", both, "image"),
            (0, 1, "contribution", ("activation",), "grid"),
            (4, 2, "activation", both[::-1], "grid"),
            (8, 0, "contribution", both, "image"),
            (7, 5, "contribution", both, "image"),
        ]
    ]
    batch = views[[16, 0, 12, 17, 5, 9]]
    together = early.explain(batch, requests)
    for row, request in enumerate(requests[:3] if estimator == "integrated" else requests):
        (alone,) = early.explain(batch[row : row + 1], [request])
        answer = together[row]
        assert isinstance(alone, Explanation)
        assert isinstance(answer, Explanation)
        close(answer, alone)
        assert all(set(concept.maps) == set(request.options.maps) for concept in answer.concepts)
        assert len(answer.concepts) <= request.options.top_k


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("estimator", ["gradient", "integrated", "ablation"])
def test_one_image_that_breaks_the_model_fails_alone(
    model: Model, views: NDArray[np.uint8], estimator: str, per_class: bool
) -> None:
    """A model that answers with NaN for one image: its neighbours get what they would get without it."""

    class Fragile(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            black = (x < -1.7).all(3).all(2).all(1)
            return self.inner(x.masked_fill(black.view(-1, 1, 1, 1), torch.nan))

    bank = make_bank(model, views, "layer3", per_class=per_class)
    fragile = replace(model, module=Fragile(model.module).eval())
    engine = Engine(fragile, replace(bank, layer="inner.layer3"))
    batch = views[:4].copy()
    batch[1] = 0
    requests = [EngineRequest(2, options(estimator=estimator))] * 4
    together = engine.explain(batch, requests)
    assert isinstance(together[1], NumericalFailure)
    for row in (0, 2, 3):
        (alone,) = engine.explain(batch[row : row + 1], requests[:1])
        answer = together[row]
        assert isinstance(answer, Explanation)
        assert isinstance(alone, Explanation)
        close(answer, alone)


def test_a_class_without_concepts_and_a_class_out_of_range_fail_alone(engine: Engine, views: NDArray[np.uint8]) -> None:
    requests = [EngineRequest(t, options()) for t in (0, WITHOUT_CONCEPTS, 3, 10, -1, 10**6)]
    answers = engine.explain(views[:6], requests)
    assert [type(answer) for answer in answers] == [
        Explanation, UnsupportedOption, Explanation, UnknownClass, UnknownClass, UnknownClass,
    ]  # fmt: skip
    assert "'truck'" in str(answers[1])
    assert "'airplane'" in str(answers[1])
    close(answers[2], explain(engine, views[2:3], 3)[0])  # type: ignore[arg-type]
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, WhenceError):
            with pytest.raises(type(answer)):
                engine.check(request)
        else:
            engine.check(request)


def test_estimators_agree_where_the_head_is_affine(engine: Engine, views: NDArray[np.uint8]) -> None:
    by_gradient = explain(engine, views[:6], 4)
    for estimator in ("integrated", "ablation"):
        for one, other in zip(by_gradient, explain(engine, views[:6], 4, estimator=estimator), strict=True):
            assert other.estimator == estimator
            assert {c.id: c.contribution for c in one.concepts} == pytest.approx(
                {c.id: c.contribution for c in other.concepts}, rel=1e-3, abs=1e-4
            )
            assert one.unexplained == pytest.approx(other.unexplained, rel=1e-3, abs=1e-4)
            assert other.faithfulness.exactness == "exact"
            assert abs(other.faithfulness.completeness_residual) < 1e-3


def test_integrated_adds_up_for_any_head(model: Model, early: Engine, views: NDArray[np.uint8]) -> None:
    reference, target = Reference(model, early.bank), 6
    for view, answer in zip(views[:3], explain(early, views[:3], target, estimator="integrated"), strict=True):
        a = reference.activation(view)
        codes, (_, dictionary) = reference.codes(a, target), reference.dictionary(target)
        rebuilt = torch.from_numpy(np.einsum("khw,kc->chw", codes, dictionary))[None]
        difference = reference.logit(a, target) - reference.logit(a - rebuilt, target)
        error = answer.faithfulness.integration_error
        assert error is not None
        assert error < 0.01
        assert abs(answer.contributions_total - difference) <= 0.011 * abs(difference) + 1e-3
        assert abs(answer.contributions_total - difference) == pytest.approx(error * abs(difference), abs=2e-3)
        assert abs(answer.faithfulness.completeness_residual) <= 0.011 * abs(difference) + 1e-3
        assert answer.faithfulness.exactness == "exact"


def test_integrated_along_the_path_is_the_fine_riemann_sum(
    model: Model, early: Engine, views: NDArray[np.uint8]
) -> None:
    reference, target, steps = Reference(model, early.bank), 6, 64
    (answer,) = explain(early, views[:1], target, estimator="integrated")
    a = reference.activation(views[0])
    codes, (owned, dictionary) = reference.codes(a, target), reference.dictionary(target)
    rebuilt = torch.from_numpy(np.einsum("khw,kc->chw", codes, dictionary))[None]
    for concept in answer.concepts[:2]:
        component = reference.component(codes, dictionary, owned.index(concept.id))
        along = [reference.slope(a - (1 - (i + 0.5) / steps) * rebuilt, component, target) for i in range(steps)]
        assert concept.contribution == pytest.approx(
            np.mean(along), rel=0.05, abs=0.02 * abs(answer.contributions_total)
        )


def test_ablation_is_taking_each_concept_out(model: Model, early: Engine, views: NDArray[np.uint8]) -> None:
    reference, target = Reference(model, early.bank), 3
    for view, answer in zip(views[:3], explain(early, views[:3], target, estimator="ablation"), strict=True):
        a = reference.activation(view)
        codes, (owned, dictionary) = reference.codes(a, target), reference.dictionary(target)
        components = [reference.component(codes, dictionary, k) for k in range(len(owned))]
        for concept in answer.concepts:
            without = reference.logit(a - components[owned.index(concept.id)], target)
            assert concept.contribution == pytest.approx(reference.logit(a, target) - without, rel=2e-3, abs=2e-3)
        remainder = a - torch.stack(components).sum(0)
        unexplained = reference.logit(a, target) - reference.logit(a - remainder, target)
        assert answer.unexplained == pytest.approx(unexplained, rel=2e-3, abs=2e-3)
        assert answer.faithfulness.exactness == "first_order"


def test_substitution_explains_the_logit_of_the_reconstruction(
    model: Model, engine: Engine, early: Engine, views: NDArray[np.uint8]
) -> None:
    for each in (engine, early):
        reference, target = Reference(model, each.bank), 7
        for view, answer in zip(views[:3], explain(each, views[:3], target, substitute=True), strict=True):
            a = reference.activation(view)
            codes, (owned, dictionary) = reference.codes(a, target), reference.dictionary(target)
            components = [reference.component(codes, dictionary, k) for k in range(len(owned))]
            rebuilt = torch.stack(components).sum(0)
            for concept in answer.concepts:
                slope = reference.slope(rebuilt, components[owned.index(concept.id)], target)
                assert concept.contribution == pytest.approx(slope, rel=2e-3, abs=2e-3)
            assert answer.substitute
            assert answer.target.logit == pytest.approx(reference.logit(a, target), abs=1e-3)
            residual = (
                reference.logit(rebuilt, target)
                - answer.faithfulness.constant
                - sum(c.contribution for c in answer.concepts)
            )
            assert answer.faithfulness.completeness_residual == pytest.approx(residual, abs=2e-3)
            if each is engine:
                assert abs(residual) < 1e-3


def test_order(engine: Engine, views: NDArray[np.uint8]) -> None:
    for answer in explain(engine, views[:5], 4):
        sizes = [abs(c.contribution) for c in answer.concepts]
        assert sizes == sorted(sizes, reverse=True)
    for answer in explain(engine, views[:5], 4, order="activation"):
        activations = [c.activation for c in answer.concepts]
        assert activations == sorted(activations, reverse=True)


def test_equal_scores_come_in_the_order_of_the_bank(model: Model, bank: Bank, views: NDArray[np.uint8]) -> None:
    """Dead concepts all score zero: a tie must not be broken by who else is in the batch."""
    dictionary = bank.tensors["dictionary"].clone()
    dictionary[[c.id for c in bank.concepts if c.class_index == 3]] = 0
    engine = Engine(model, replace(bank, tensors={"dictionary": dictionary}))
    ids = [c.id for c in bank.concepts if c.class_index == 3]
    for rows in (1, 7):
        for answer in explain(engine, views[:rows], 3, top_k=4):
            assert [c.id for c in answer.concepts] == ids[:4]
            assert all(c.contribution == 0 and c.share == 0 for c in answer.concepts)


def test_concepts_of_no_class_explain_every_class(model: Model, views: NDArray[np.uint8]) -> None:
    bank = make_bank(model, views, "layer3", per_class=False)
    engine, reference = Engine(model, bank), Reference(model, bank)
    for target in (0, WITHOUT_CONCEPTS):
        (answer,) = explain(engine, views[:1], target, maps=MAPS)
        assert len(answer.concepts) == len(bank.concepts)
        a = reference.activation(views[0])
        codes = reference.codes(a, target)
        for concept in answer.concepts:
            np.testing.assert_allclose(concept.maps["activation"].values, codes[concept.id], rtol=2e-3, atol=1e-3)


def test_concepts_of_all_classes_compete(
    model: Model, early_bank: Bank, early: Engine, views: NDArray[np.uint8]
) -> None:
    """Codes are scipy's on the concatenated dictionary; any class can be explained by them."""
    free = replace(early_bank, concepts=tuple(replace(c, class_index=None) for c in early_bank.concepts))
    reference = Reference(model, free)
    for target in (2, WITHOUT_CONCEPTS):
        (answer,) = explain(early, views[6:7], target, maps=MAPS, concepts="all")
        a = reference.activation(views[6])
        codes, (_, dictionary) = reference.codes(a, target), reference.dictionary(target)
        size = float(np.abs(codes).max())
        assert answer.scope == "all"
        assert sorted(c.id for c in answer.concepts) == list(range(len(early_bank.concepts)))
        for concept in answer.concepts:
            values = concept.maps["activation"].values
            np.testing.assert_allclose(values, codes[concept.id], rtol=2e-3, atol=1e-3 * size)
            owner = early_bank.concepts[concept.id].class_index
            assert owner is not None
            assert (concept.class_index, concept.class_name) == (owner, model.spec.class_names[owner])
        for concept in answer.concepts[:5]:
            slope = reference.slope(a, reference.component(codes, dictionary, concept.id), target)
            assert concept.contribution == pytest.approx(slope, rel=5e-3, abs=5e-3)
        rebuilt = np.einsum("khw,kc->chw", codes, dictionary)
        error = float((a[0] - torch.from_numpy(rebuilt)).norm() / a.norm())
        assert answer.faithfulness.relative_error == pytest.approx(error, rel=1e-3)
        if target != WITHOUT_CONCEPTS:
            (own,) = explain(early, views[6:7], target)
            assert own.scope == "target"
            assert {c.class_index for c in own.concepts} == {target}
            assert own.faithfulness.relative_error is not None
            assert error < own.faithfulness.relative_error  # more atoms reconstruct more


@pytest.mark.parametrize("estimator", ["gradient", "integrated", "ablation"])
def test_concepts_of_all_classes_are_those_of_a_bank_without_classes(
    model: Model, bank: Bank, engine: Engine, views: NDArray[np.uint8], estimator: str
) -> None:
    free = Engine(model, replace(bank, concepts=tuple(replace(c, class_index=None) for c in bank.concepts)))
    expected = explain(free, views[:3], None, estimator=estimator)
    for one, other in zip(explain(engine, views[:3], None, estimator=estimator, concepts="all"), expected, strict=True):
        close(one, other)
    # Where concepts belong to no class there is nothing to choose.
    assert free.batch_key(options(concepts="all")) == free.batch_key(options())
    assert explain(free, views[:1], None, concepts="all")[0].scope == "target"


def test_too_many_concepts_are_not_solved_for_at_once(
    model: Model, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = EngineRequest(WITHOUT_CONCEPTS, options(concepts="all"))
    monkeypatch.setattr("concepts.engine.AT_ONCE", len(bank.concepts))
    Engine(model, bank).check(everything)
    monkeypatch.setattr("concepts.engine.AT_ONCE", len(bank.concepts) - 1)
    engine = Engine(model, bank)
    engine.check(EngineRequest(0, options()))
    with pytest.raises(UnsupportedOption, match="those of the target's class"):
        engine.check(everything)


def test_memory_counts_the_dictionary_of_all_classes_whether_asked_for_or_not(
    model: Model, bank: Bank, engine: Engine, views: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Engine(model, bank)
    before = fresh.memory
    explain(fresh, views[:1], None, concepts="all")
    assert fresh.memory == before
    monkeypatch.setattr("concepts.engine.AT_ONCE", len(bank.concepts) - 1)
    count = len(bank.concepts)
    # float32 rows, float64 products of all pairs, int64 ids.
    assert before.bank - Engine(model, bank).memory.bank == 4 * count * bank.channels + 8 * count**2 + 8 * count
    free = replace(bank, concepts=tuple(replace(concept, class_index=None) for concept in bank.concepts))
    monkeypatch.undo()
    assert Engine(model, free).memory.bank == 4 * count * bank.channels + 8 * count**2 + 8 * count


def test_image_maps_are_the_grid_resized_without_a_shift(
    engine: Engine, model: Model, bank: Bank, views: NDArray[np.uint8]
) -> None:
    grid, image = (explain(engine, views[:3], 2, maps=MAPS, map_size=size) for size in ("grid", "image"))
    for small, large in zip(grid, image, strict=True):
        for one, other in zip(small.concepts, large.concepts, strict=True):
            for kind in MAPS:
                values = one.maps[kind].values
                assert values.shape == (8, 8)
                assert other.maps[kind].values.shape == (32, 32)
                # Bilinear from its definition: the centre of cell i is at (i + ½)·4 pixels; edges repeat.
                place = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
                low, part = np.minimum(place.astype(int), 6), place - np.minimum(place.astype(int), 6)
                rows = values[low] * (1 - part)[:, None] + values[low + 1] * part[:, None]
                expected = rows[:, low] * (1 - part) + rows[:, low + 1] * part
                np.testing.assert_allclose(
                    other.maps[kind].values, expected, rtol=1e-4, atol=1e-4 * np.abs(values).max()
                )


def test_tokens_without_a_place_stand_beside_the_map() -> None:
    """A small transformer: the class token's value is apart, and map and token add up to the activation."""
    from concepts.model import ModelSpec
    from concepts.preprocessing import Preprocessing

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.token = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.rand(1, 1, 12))
            self.mixed, self.head = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), nn.Linear(12, 3)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            p = self.patches(x).flatten(2).transpose(1, 2)
            a = self.relu(self.mixed(torch.cat([self.token.expand(len(p), 1, 12), p], 1)))
            return self.head(
                (a * torch.cat([a.new_full((1,), 3.0), a.new_ones(a.shape[1] - 1)]).view(1, -1, 1)).mean(1)
            )

    torch.manual_seed(0)
    spec = ModelSpec("tokens", "demo.x:y", Preprocessing(32, 32), ("a", "b", "c"), "b" * 64)
    model = Model(spec, Tokens().eval().requires_grad_(False), torch.device("cpu"))
    assert model.cut("relu").layout.tokens == 1
    dictionary = torch.rand(5, 12)
    from concepts.bank import Concept

    bank = Bank(
        "nmf", "tokens", "relu", "small", "b" * 64, 12, tuple(map(Concept, range(5))), {"dictionary": dictionary}
    )
    view = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    a = model.cut("relu").trunk(model.inputs(view)).double()
    for row, answer in enumerate(explain(Engine(model, bank), view, 1, maps=MAPS)):
        codes = np.stack([scipy.optimize.nnls(dictionary.double().numpy().T, p)[0] for p in a[row].numpy()])
        for concept in answer.concepts:
            activation_map = concept.maps["activation"]
            assert activation_map.class_token == pytest.approx(codes[0, concept.id], abs=1e-4)
            np.testing.assert_allclose(activation_map.values, codes[1:, concept.id].reshape(4, 4), atol=1e-4)
            for kind, whole in (("activation", concept.activation), ("contribution", concept.contribution)):
                part = concept.maps[kind]  # type: ignore[index]
                assert float(part.values.sum()) + (part.class_token or 0.0) == pytest.approx(whole, rel=1e-4, abs=1e-5)
        assert any(concept.maps["contribution"].class_token for concept in answer.concepts)


def test_views_are_not_edited_and_may_be_read_only(engine: Engine, views: NDArray[np.uint8]) -> None:
    frozen = views[:2].copy()
    frozen.setflags(write=False)
    explain(engine, frozen, 0)
    assert np.array_equal(frozen, views[:2])


def test_what_the_answer_says_of_itself(engine: Engine, views: NDArray[np.uint8]) -> None:
    (answer, _) = explain(engine, views[:2], 0)
    assert (answer.model, answer.model_digest) == ("cifar-resnet20", "a" * 64)
    assert (answer.bank, answer.estimator, answer.substitute) == ("cifar-resnet20/layer3/small", "gradient", False)
    assert answer.runtime == "torch cpu float32"
    assert answer.stages.batch_size == 2
    times = [getattr(answer.stages, f"{stage}_ms") for stage in ("trunk", "head", "codes", "explain")]
    assert all(time > 0 for time in times)


def test_a_lower_precision_of_the_trunk_stays_near(model: Model, bank: Bank, views: NDArray[np.uint8]) -> None:
    cut = model.cut(bank.layer)
    full, low = Engine(model, bank, cut), Engine(model, bank, cut, TorchTrunk(cut, "bfloat16"))
    for one, other in zip(explain(full, views[:4], 2), explain(low, views[:4], 2), strict=True):
        assert other.runtime == "torch cpu bfloat16"
        assert one.contributions_total != other.contributions_total
        assert one.contributions_total == pytest.approx(other.contributions_total, rel=0.1, abs=0.3)
        assert abs(other.faithfulness.completeness_residual) < 1e-3  # head and codes are still float32


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"colours": True}, UnsupportedOption),
        ({"input_method": "smoothgrad"}, UnsupportedOption),
        ({"input_method": "integrated", "maps": ("activation",)}, UnsupportedOption),
        ({"estimator": "ablation", "maps": ("contribution",)}, UnsupportedOption),
        ({"estimator": "integrated", "substitute": True}, UnsupportedOption),
        ({"estimator": "ablation", "substitute": True}, UnsupportedOption),
    ],
)
def test_options_that_do_not_go_together(engine: Engine, changes: dict[str, object], error: type[WhenceError]) -> None:
    with pytest.raises(error):
        engine.check(EngineRequest(0, options(**changes)))


def test_a_batch_shares_its_key(engine: Engine, views: NDArray[np.uint8]) -> None:
    key = engine.batch_key
    assert key(options(top_k=3)) == key(options(order="activation", maps=MAPS))
    assert key(options(substitute=False)) == key(options(substitute=None)) != key(options(substitute=True))
    assert len({key(options(estimator=e)) for e in ("gradient", "integrated", "ablation")}) == 3
    assert key(options(concepts="all")) != key(options())
    methods = ("gradient", "smoothgrad", "integrated")
    assert len({key(options(maps=("input",), input_method=method)) for method in methods} | {key(options())}) == 4
    with pytest.raises(ValueError, match="batch_key"):
        engine.explain(views[:2], [EngineRequest(), EngineRequest(options=options(substitute=True))])


def test_a_bank_that_is_not_of_this_model(model: Model, bank: Bank) -> None:
    with pytest.raises(InvalidInput, match="not a bank of model"):
        Engine(model, replace(bank, model="other"))
    with pytest.raises(InvalidInput, match="not a bank of model"):
        Engine(model, replace(bank, weights_digest="b" * 64))
    with pytest.raises(InvalidInput, match="32 channels, its layer has 64"):
        Engine(model, replace(bank, channels=32, tensors={"dictionary": torch.rand(len(bank.concepts), 32)}))


def test_a_bank_with_concepts_of_classes_that_do_not_exist(model: Model, bank: Bank) -> None:
    concepts = tuple(replace(c, class_index=10) if c.class_index == 8 else c for c in bank.concepts)
    with pytest.raises(InvalidInput, match="class 10, which its model does not have"):
        Engine(model, replace(bank, concepts=concepts))


def test_a_cut_can_be_shared(model: Model, bank: Bank, views: NDArray[np.uint8]) -> None:
    cut: Cut = model.cut("layer3")
    close(explain(Engine(model, bank, cut), views[:1], 1)[0], explain(Engine(model, bank), views[:1], 1)[0])


def test_a_kind_that_does_not_reconstruct_reports_the_share_it_carries(
    model: Model, bank: Bank, views: NDArray[np.uint8]
) -> None:
    """Codes without a reconstruction: no remainder, no errors of reconstruction, but the carried share of ⟨G, a⟩."""
    engine, reference, target = Engine(model, bank), Reference(model, bank), 4
    engine.codec.reconstructs = False
    for view, answer in zip(views[:3], explain(engine, views[:3], target), strict=True):
        a = reference.activation(view)
        codes, (owned, dictionary) = reference.codes(a, target), reference.dictionary(target)
        slopes = [reference.slope(a, reference.component(codes, dictionary, k), target) for k in range(len(owned))]
        report = answer.faithfulness
        assert report.carried_share == pytest.approx(sum(slopes) / reference.slope(a, a, target), rel=1e-3)
        assert answer.unexplained is None
        assert (report.relative_error, report.kl, report.top1_agrees, report.integration_error) == (None,) * 4
        shares = sum(abs(concept.share) for concept in answer.concepts)
        assert shares == pytest.approx(1.0, abs=1e-4)
    for changes in ({"substitute": True}, {"estimator": "integrated"}):
        with pytest.raises(UnsupportedOption, match="do not reconstruct"):
            engine.check(EngineRequest(0, options(**changes)))
