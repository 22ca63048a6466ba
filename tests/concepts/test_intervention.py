"""Interventions on ResNet-20 and small networks, against float64 surgery on the whole network that knows no cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concepts import intervention
from concepts.bank import Bank, Concept
from concepts.codec import Codec, Codes, DenseCodes
from concepts.engine import Engine
from concepts.errors import (
    InvalidInput,
    NumericalFailure,
    UnknownClass,
    UnknownConcept,
    UnsupportedOption,
    WhenceError,
)
from concepts.explanation import ClassScore, EngineRequest, ExplainOptions, Explanation
from concepts.intervention import Intervention, InterventionRequest
from concepts.model import Model, ModelSpec
from concepts.preprocessing import Preprocessing
from tests.concepts.conftest import WITHOUT_CONCEPTS, make_bank
from tests.concepts.test_engine import Reference

Views = NDArray[np.uint8]
Floats = NDArray[np.float64]


class Surgery:
    """The model in float64, with a hook that edits the layer's output, one position and one concept at a time."""

    def __init__(self, model: Model, bank: Bank) -> None:
        self.module = copy.deepcopy(model.module).double()
        self.layer = self.module.get_submodule(bank.layer)
        self.preprocessing = model.spec.preprocessing
        self.bank = bank
        self.dictionary = bank.tensors["dictionary"].double().numpy()

    def logits(self, view: Views, scales: Mapping[int, float], target: int | None) -> Floats:
        p = self.preprocessing
        rgb = torch.from_numpy(((view / 255.0) - np.array(p.mean)) / np.array(p.std))
        owned = [concept.id for concept in self.bank.concepts if concept.class_index in (target, None)]

        def edit(_module: nn.Module, _inputs: object, a: Tensor) -> Tensor:
            channels_last = a.movedim(1, -1).clone() if a.ndim == 4 else a.clone()
            for position in channels_last.reshape(-1, channels_last.shape[-1]).unbind():
                codes, _ = scipy.optimize.nnls(self.dictionary[owned].T, position.numpy())
                for code, concept in zip(codes, owned, strict=True):
                    position += torch.from_numpy((scales.get(concept, 1.0) - 1.0) * code * self.dictionary[concept])
            return channels_last.movedim(-1, 1) if a.ndim == 4 else channels_last

        handle = self.layer.register_forward_hook(edit)
        try:
            with torch.no_grad():
                return self.module(rgb.permute(2, 0, 1).unsqueeze(0))[0].numpy()  # type: ignore[no-any-return]
        finally:
            handle.remove()


@pytest.fixture(scope="module")
def engine(model: Model, bank: Bank) -> Engine:
    return Engine(model, bank)


@pytest.fixture(scope="module")
def early(model: Model, early_bank: Bank) -> Engine:
    return Engine(model, early_bank)


@pytest.fixture(scope="module")
def free_bank(model: Model, views: Views) -> Bank:
    """Concepts that belong to no class."""
    return make_bank(model, views, "layer3", per_class=False)


def intervene(engine: Engine, views: Views, scales: Mapping[int, float], target: int | None = None) -> Intervention:
    """Intervene in one image."""
    request = InterventionRequest(target, scales)
    engine.check_intervention(request)
    (answer,) = engine.intervene(views, [request])
    assert isinstance(answer, Intervention), answer
    return answer


def logits(scores: tuple[ClassScore, ...]) -> dict[int, float]:
    return {score.index: score.logit for score in scores}


def owned(bank: Bank, target: int) -> list[int]:
    return [concept.id for concept in bank.concepts if concept.class_index == target]


def check_against(reference: Surgery, answer: Intervention, view: Views, scales: Mapping[int, float]) -> None:
    target = answer.target.index
    wanted = [reference.logits(view, chosen, target) for chosen in ({}, scales)]
    best = {int(index) for whole in wanted for index in np.argsort(-whole)[:5]}
    for scores, whole in zip((answer.before, answer.after), wanted, strict=True):
        probabilities = scipy.special.softmax(whole)
        assert {score.index for score in scores} == best
        assert [score.index for score in scores] == sorted(best, key=lambda index: -whole[index])
        for score in scores:
            assert score.logit == pytest.approx(whole[score.index], rel=1e-4, abs=2e-3)
            assert score.probability == pytest.approx(probabilities[score.index], rel=1e-2, abs=1e-6)
    assert answer.target.logit == pytest.approx(wanted[0][target], rel=1e-4, abs=2e-3)


@pytest.mark.parametrize("layer", ["layer3", "layer2"])
def test_predictions_are_the_references(model: Model, engine: Engine, early: Engine, views: Views, layer: str) -> None:
    chosen = engine if layer == "layer3" else early
    reference, target = Surgery(model, chosen.bank), 3
    first, second, third, *_ = owned(chosen.bank, target)
    moved = 0.0
    for row, scales in ((5, {first: 0.0}), (6, {second: 2.0, third: 0.3}), (7, {first: 5.0, second: 0.0, third: -1.0})):
        answer = intervene(chosen, views[row : row + 1], scales, target)
        check_against(reference, answer, views[row], scales)
        moved = max(moved, abs(answer.before[0].logit - logits(answer.after)[answer.before[0].index]))
    assert moved > 0.5  # or the agreement would say little


class Tokens(nn.Module):
    """A small transformer whose layer ``relu`` answers with a class token and 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.rand(1, 1, 12))
        self.relu, self.mixed = nn.ReLU(), nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        a = self.relu(torch.cat([self.token.expand(len(patches), 1, 12), patches], 1))
        return self.head(self.mixed(a)[:, 0])


def small_model(module: nn.Module, n_classes: int) -> Model:
    spec = ModelSpec("small", "demo.x:y", Preprocessing(32, 32), tuple("abcdefghij"[:n_classes]), "b" * 64)
    return Model(spec, module.eval().requires_grad_(False), torch.device("cpu"))


def small_bank(layer: str, dictionary: Tensor) -> Bank:
    concepts = tuple(map(Concept, range(len(dictionary))))
    channels = dictionary.shape[1]
    return Bank("nmf", "small", layer, "small", "b" * 64, channels, concepts, {"dictionary": dictionary})


def test_tokens_are_positions_too(views: Views) -> None:
    torch.manual_seed(0)
    model, bank = small_model(Tokens(), 7), small_bank("relu", torch.rand(5, 12))
    scales = {0: 0.0, 3: 4.0}
    answer = intervene(Engine(model, bank), views[:1], scales)
    check_against(Surgery(model, bank), answer, views[0], scales)
    assert logits(answer.before) != pytest.approx(logits(answer.after), abs=0.05)


def test_a_scale_of_one_changes_nothing(early: Engine, views: Views) -> None:
    for row in range(0, 18, 5):
        answer = intervene(early, views[row : row + 1], dict.fromkeys(owned(early.bank, 4), 1.0), 4)
        assert answer.after == answer.before


def test_before_is_the_prediction_that_is_explained(early: Engine, views: Views) -> None:
    answer = intervene(early, views[:1], {owned(early.bank, 0)[0]: 1.0}, 0)
    (explained,) = early.explain(views[:1], [EngineRequest(0)])
    assert isinstance(explained, Explanation)
    assert (answer.before, answer.target) == (explained.predictions, explained.target)


def test_removing_all_concepts_leaves_what_they_do_not_explain(model: Model, early: Engine, views: Views) -> None:
    """Then the head sees a − â: by the slow route, the activation less all that scipy finds of it."""
    reference, target = Reference(model, early.bank), 6
    a = reference.activation(views[9])
    codes, (ids, dictionary) = reference.codes(a, target), reference.dictionary(target)
    expected = reference.head(a - torch.from_numpy(np.einsum("khw,kc->chw", codes, dictionary))[None])[0]
    answer = intervene(early, views[9:10], dict.fromkeys(ids, 0.0), target)
    assert logits(answer.after) == pytest.approx({n: float(expected[n]) for n in logits(answer.after)}, abs=2e-3)


def test_where_the_head_is_affine_logits_change_by_the_contributions(
    model: Model, free_bank: Bank, views: Views
) -> None:
    """``Δy = Σ (s_k − 1)·c_k`` for every class, and not for the target alone."""
    engine = Engine(model, free_bank)
    scales = {concept.id: (0.0, 1.0, 2.0, 0.5, -1.5)[concept.id % 5] for concept in free_bank.concepts}
    answer = intervene(engine, views[3:4], scales)
    assert len(answer.before) >= 5
    for index, before in logits(answer.before).items():
        (explained,) = engine.explain(views[3:4], [EngineRequest(index, ExplainOptions(top_k=1000))])
        assert isinstance(explained, Explanation)
        change = sum((scales[concept.id] - 1.0) * concept.contribution for concept in explained.concepts)
        assert logits(answer.after)[index] - before == pytest.approx(change, rel=1e-3, abs=1e-3)


def close(one: Intervention | WhenceError, other: Intervention | WhenceError) -> None:
    assert isinstance(one, Intervention)
    assert isinstance(other, Intervention)
    for left, right in ((one.before, other.before), (one.after, other.after)):
        assert [score.index for score in left] == [score.index for score in right]
        assert logits(left) == pytest.approx(logits(right), rel=1e-3, abs=1e-3)
    assert one.target.index == other.target.index


@pytest.mark.parametrize("per_class", [True, False])
def test_an_answer_is_the_same_alone_and_in_any_batch(model: Model, views: Views, per_class: bool) -> None:
    bank = make_bank(model, views, "layer2", per_class=per_class)
    engine = Engine(model, bank)
    batch = views[[16, 0, 12, 17, 5, 9]]
    requests = [
        InterventionRequest(target, {owned(bank, target)[0] if per_class else target: scale, **more})
        for target, scale, more in [
            (0, 0.0, {}),
            (8, 3.0, {}),
            (3, 1000.0, {}),
            (3, -1.0, {owned(bank, 3)[1]: 0.0} if per_class else {5: 2.0}),
            (0, 1.0, {}),
            (7, 0.5, {}),
        ]
    ]
    for row, (request, answer) in enumerate(zip(requests, engine.intervene(batch, requests), strict=True)):
        close(answer, engine.intervene(batch[row : row + 1], [request])[0])


def test_what_fails_fails_alone(engine: Engine, views: Views) -> None:
    """Refusals that need the image: the predicted class has no concepts, or the concepts are another class's."""
    predicted = [intervene(engine, view[None], {0: 1.0}, 0).before[0].index for view in views]
    assert WITHOUT_CONCEPTS in predicted
    row = predicted.index(WITHOUT_CONCEPTS)
    other = next(place for place, index in enumerate(predicted) if index not in (0, WITHOUT_CONCEPTS))
    batch = np.stack([views[1], views[row], views[other], views[2]])
    requests = [
        InterventionRequest(0, {0: 0.0}),
        InterventionRequest(None, {0: 0.0}),
        InterventionRequest(None, {0: 0.0}),
        InterventionRequest(2, {owned(engine.bank, 2)[1]: 2.0}),
    ]
    for request in requests:
        engine.check_intervention(request)
    answers = engine.intervene(batch, requests)
    name = engine.model.spec.class_names[predicted[other]]
    assert isinstance(answers[1], UnsupportedOption)
    assert "has no concepts for class 'truck'" in str(answers[1])
    assert isinstance(answers[2], UnsupportedOption)
    assert str(answers[2]).startswith(
        f"concept 0 belongs to class 'airplane', not to the predicted class {name!r}; set `target` to 'airplane'"
    )
    for place in (0, 3):
        close(answers[place], engine.intervene(batch[place : place + 1], requests[place : place + 1])[0])


class Fragile(nn.Module):
    """A network that breaks on flat images, and a head that cannot bear large activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = (x.amax((2, 3)) == x.amin((2, 3))).all(1)
        a = self.layer(x.masked_fill(flat.view(-1, 1, 1, 1), torch.nan))
        return self.head((10 * a.mean((2, 3))).exp())


def test_images_and_scales_that_break_the_model_fail_alone(views: Views) -> None:
    torch.manual_seed(0)
    model, bank = small_model(Fragile(), 3), small_bank("layer", torch.eye(4))
    engine = Engine(model, bank)
    batch = views[:4].copy()
    batch[1] = 0
    requests = [InterventionRequest(None, dict.fromkeys(range(4), scale)) for scale in (2.0, 2.0, 1000.0, 0.0)]
    answers = engine.intervene(batch, requests)
    assert isinstance(answers[1], NumericalFailure)
    assert isinstance(answers[2], NumericalFailure)
    assert "the changed activation" in str(answers[2])
    for row in (0, 3):
        close(answers[row], engine.intervene(batch[row : row + 1], requests[row : row + 1])[0])


class Hyperplane:
    """Signed distances along one direction (methods section 0): components that do not reconstruct."""

    reconstructs, substitutes, differentiable, per_class, needs_non_negative = False, False, False, False, False
    offset: Tensor | None = None

    def __init__(self, normal: Tensor) -> None:
        self.normal = normal / normal.norm()

    def to(self, device: torch.device, *, screening: bool = False) -> Codec:
        return self

    def classes(self) -> None:
        return None

    def encode(self, positions: Tensor, targets: Tensor) -> Codes:
        return DenseCodes((positions @ self.normal).unsqueeze(2), torch.zeros(len(positions), 1, dtype=torch.int64))

    def combine(self, codes: Codes, weights: Tensor | None = None) -> Tensor:
        values = codes.values if weights is None else codes.values * weights.unsqueeze(1)
        return values * self.normal

    def contributions(self, codes: Codes, gradient: Tensor) -> Codes:
        return codes.with_values(codes.values * (gradient @ self.normal).unsqueeze(2))

    def gradients(self, codes: Codes, slots: Tensor) -> Tensor:
        raise NotImplementedError


def test_banks_that_do_not_reconstruct(model: Model, free_bank: Bank, views: Views) -> None:
    """Without the component the activation lies in the hyperplane; with its opposite it is mirrored there."""
    engine = Engine(model, free_bank)
    torch.manual_seed(0)
    engine.codec = Hyperplane(torch.randn(64))
    n = engine.codec.normal
    a = engine.cut.trunk(model.inputs(views[:1]))
    within = a - (a * n.view(-1, 1, 1)).sum(1, keepdim=True) * n.view(-1, 1, 1)
    for scale, changed in ((0.0, within), (-1.0, 2 * within - a)):
        answer = intervene(engine, views[:1], {0: scale})
        expected = engine.cut.head(changed)[0]
        for score in answer.after:
            assert score.logit == pytest.approx(float(expected[score.index]), abs=1e-3)
        assert answer.after != answer.before


@pytest.mark.parametrize(
    ("target", "scales", "error", "says"),
    [
        (None, {}, InvalidInput, "no concept is scaled"),
        (0, {0: float("nan")}, InvalidInput, "concept 0 cannot be scaled by nan"),
        (0, {1: float("inf")}, InvalidInput, "from -1000 to 1000"),
        (0, {1: 1000.5}, InvalidInput, "1000.5"),
        (0, {1: -1000.5}, InvalidInput, "-1000.5"),
        (None, {0: 1.0, 10**6: 0.0}, UnknownConcept, "has concepts 0 to 38, not 1000000"),
        (None, {-1: 0.0}, UnknownConcept, "not -1"),
        (3, {0: 0.0}, UnsupportedOption, "belongs to class 'airplane', not to the target 'cat'; set `target`"),
        (WITHOUT_CONCEPTS, {0: 0.0}, UnsupportedOption, "has no concepts for class 'truck'"),
        (10, {0: 0.0}, UnknownClass, "classes 0 to 9"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_image_is_seen(
    engine: Engine, target: int | None, scales: dict[int, float], error: type[WhenceError], says: str
) -> None:
    with pytest.raises(error) as refusal:
        engine.check_intervention(InterventionRequest(target, scales))
    assert type(refusal.value) is error
    assert says in str(refusal.value)


def test_concepts_of_no_class_go_with_every_target(model: Model, free_bank: Bank, views: Views) -> None:
    engine = Engine(model, free_bank)
    answers = [intervene(engine, views[:1], {0: 0.0, 9: 2.0}, target) for target in (None, WITHOUT_CONCEPTS)]
    assert answers[0].after == answers[1].after
    assert answers[0].target == answers[0].before[0]
    assert answers[1].target.index == WITHOUT_CONCEPTS


def test_concepts_of_all_classes_can_be_scaled_at_once(model: Model, early: Engine, views: Views) -> None:
    """Codes are those of all concepts together, for any class of the model; the answer is float64 surgery's."""
    bank = early.bank
    free = replace(bank, concepts=tuple(replace(c, class_index=None) for c in bank.concepts))
    scales = {owned(bank, 2)[0]: 0.0, owned(bank, 5)[1]: 3.0}
    for target in (2, WITHOUT_CONCEPTS):
        request = InterventionRequest(target, scales, "all")
        early.check_intervention(request)
        (answer,) = early.intervene(views[6:7], [request])
        assert isinstance(answer, Intervention)
        expected = Surgery(model, free).logits(views[6], scales, target)
        for score in answer.after:
            assert score.logit == pytest.approx(expected[score.index], abs=2e-3 * np.abs(expected).max())
    with pytest.raises(UnsupportedOption, match="or ask for the concepts of all classes"):
        early.check_intervention(InterventionRequest(2, scales))
    with pytest.raises(ValueError, match="same scope"):
        early.intervene(views[:2], [InterventionRequest(2, {}), InterventionRequest(2, {}, "all")])


def test_empty_slots_are_nobodys() -> None:
    codes = DenseCodes(torch.ones(2, 1, 3), torch.tensor([[2, 0, 1], [3, -1, -1]]))
    weights = intervention.weights(codes, [InterventionRequest(0, {0: 0.0, 1: 2.5}), InterventionRequest(0, {0: 5})], 4)
    assert weights.tolist() == [[0.0, -1.0, 1.5], [0.0, 0.0, 0.0]]


def test_views_are_not_edited_and_the_answer_says_what_it_is_of(engine: Engine, views: Views) -> None:
    frozen = views[:1].copy()
    frozen.setflags(write=False)
    answer = intervene(engine, frozen, {0: 0.0}, 0)
    assert np.array_equal(frozen, views[:1])
    assert (answer.model, answer.model_digest) == ("cifar-resnet20", "a" * 64)
    assert (answer.bank, answer.bank_digest) == (engine.bank.reference, engine.bank.digest)
    assert answer.runtime == "torch cpu float32"
    assert answer.stages.batch_size == 1
    assert all(getattr(answer.stages, f"{stage}_ms") > 0 for stage in ("trunk", "head", "codes", "explain"))
