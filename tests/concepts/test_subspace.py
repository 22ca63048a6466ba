"""Subspace banks: codes, projections and gradients against float64 references, answers of the engine, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.bank import Bank, Concept
from concepts.codec import EMPTY
from concepts.cut import Cut
from concepts.engine import Engine
from concepts.errors import CorruptData, UnsupportedOption
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.intervention import Intervention, InterventionRequest
from concepts.kinds import check, load_codec
from concepts.kinds.subspace import SubspaceCodec, SubspaceCodes, representations
from concepts.model import Model

GROUPS = ((0, 3), (2, 3, 7), (5,), (1, 4, 6, 9), (3, 8))
THRESHOLD = 0.3
ALL = 10_000
"""More concepts than any image has."""


def tensors_of(groups: tuple[tuple[int, ...], ...], threshold: float) -> dict[str, Tensor]:
    return {
        "features": torch.tensor([feature for group in groups for feature in group]),
        "offsets": torch.tensor([0, *accumulate(map(len, groups))]),
        "threshold": torch.tensor(threshold),
    }


def codec(groups: tuple[tuple[int, ...], ...] = GROUPS, threshold: float = THRESHOLD) -> SubspaceCodec:
    made = load_codec("subspace", tensors_of(groups, threshold), [None] * len(groups))
    assert isinstance(made, SubspaceCodec)
    return made


def activations(images: int = 12, positions: int = 6, channels: int = 10, seed: int = 0) -> Tensor:
    """Return activations ``[B, P, C]``; in each image half of the features are weak, and in the last one all alike."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(images, positions, channels, generator=generator)
    a += 4 * (torch.rand(images, 1, channels, generator=generator) > 0.5)
    a[-1] = 1.0
    return a


def active_in(a: NDArray[np.float64], groups: tuple[tuple[int, ...], ...], threshold: float) -> list[int]:
    """Return the active groups of one image, ``[P, C]``, as the methods are written down."""
    pooled = a.mean(0)
    r = pooled / np.linalg.norm(pooled)
    return [k for k, group in enumerate(groups) if all(r[feature] >= threshold for feature in group)]


def test_codes_are_means_over_the_features_of_active_groups() -> None:
    a, made = activations(), codec()
    codes = made.encode(a, torch.zeros(len(a), dtype=torch.int64))
    numbers = set()
    for image, row in enumerate(a.double().numpy()):
        wanted = active_in(row, GROUPS, THRESHOLD)
        assert [k for k in codes.ids[image].tolist() if k != EMPTY] == wanted
        assert (codes.ids[image, len(wanted) :] == EMPTY).all()
        for slot, k in enumerate(wanted):
            np.testing.assert_allclose(codes.values[image, :, slot], row[:, list(GROUPS[k])].mean(1), rtol=1e-5)
        assert not codes.values[image, :, len(wanted) :].any()
        numbers.add(len(wanted))
    assert len(numbers) > 2
    assert 0 in numbers
    assert codes.ids.shape[1] == max(numbers)  # no more slots than one image needs


def test_a_representation_is_the_mean_over_positions_of_norm_one() -> None:
    a = activations().double().numpy()
    pooled = a.mean(1)
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(representations(torch.from_numpy(a).float()), expected, atol=1e-6)
    assert not representations(torch.zeros(1, 3, 4)).any()


def test_an_image_has_the_same_codes_alone_as_among_others() -> None:
    a, made = activations(), codec()
    together = made.encode(a, torch.zeros(len(a), dtype=torch.int64))
    for image in range(len(a)):
        alone = made.encode(a[image : image + 1], torch.zeros(1, dtype=torch.int64))
        slots = alone.ids.shape[1]
        assert torch.equal(alone.ids[0], together.ids[image, :slots])
        assert torch.equal(alone.values[0], together.values[image, :, :slots])


def test_where_no_group_is_active_there_is_one_empty_slot() -> None:
    a, made = torch.ones(2, 6, 10), codec(threshold=0.5)
    codes = made.encode(a, torch.zeros(2, dtype=torch.int64))
    assert codes.ids.tolist() == [[EMPTY], [EMPTY]]
    assert not codes.values.any()
    assert not made.combine(codes).any()
    assert not made.contributions(codes, torch.ones_like(a)).values.any()
    assert not made.gradients(codes, torch.zeros(2, 1, dtype=torch.int64)).any()
    assert codes.peak_position().shape == (2, 1)


def test_components_are_projections_and_shared_features_count_once_together() -> None:
    a, made = activations(), codec()
    codes = made.encode(a, torch.zeros(len(a), dtype=torch.int64))
    gradient = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    whole, contributions = made.combine(codes), made.contributions(codes, gradient)
    assert any({1, 4} <= set(row) for row in codes.ids.tolist())  # they share feature 3
    for slot in range(codes.ids.shape[1]):
        one = torch.eye(codes.ids.shape[1])[slot].expand(len(a), -1)
        component = made.combine(codes, one)
        for image, k in enumerate(codes.ids[:, slot].tolist()):
            expected = torch.zeros_like(a[image])
            if k != EMPTY:
                expected[:, list(GROUPS[k])] = a[image][:, list(GROUPS[k])]
            assert torch.equal(component[image], expected)
            inner = (expected.double() * gradient[image].double()).sum(1)
            torch.testing.assert_close(contributions.values[image, :, slot].double(), inner, rtol=1e-5, atol=1e-5)
    for image, row in enumerate(codes.ids.tolist()):
        union = sorted({feature for k in row if k != EMPTY for feature in GROUPS[k]})
        expected = torch.zeros_like(a[image])
        expected[:, union] = a[image][:, union]
        assert torch.equal(whole[image], expected)


def test_a_shared_feature_has_the_weight_of_largest_size() -> None:
    made = codec(((0, 1), (1, 2), (1,)), threshold=0.1)
    a = torch.ones(1, 2, 3)
    codes = made.encode(a, torch.zeros(1, dtype=torch.int64))
    for weights, expected in (
        ((1, 1, 1), (1, 1, 1)),
        ((-1, -1, 0), (-1, -1, -1)),  # taken away together, the shared one goes once
        ((0, 2, -1), (0, 2, 2)),
        ((0.5, -1, 0), (0.5, -1, -1)),
        ((1, -1, 0), (1, 0, -1)),  # of opposite ones neither counts
        ((0, 0, 3), (0, 3, 0)),
    ):
        combined = made.combine(codes, torch.tensor([weights], dtype=torch.float32))
        assert combined[0, 0].tolist() == list(expected)


def test_gradients_are_finite_differences_and_codes_are_homogeneous() -> None:
    a, made = activations().double(), codec()
    targets = torch.zeros(len(a), dtype=torch.int64)
    codes = made.encode(a, targets)
    slots = torch.tensor([[0, 1]]).expand(len(a), -1)
    found = made.gradients(codes, slots)
    step = 1e-6
    for position, feature in ((0, 3), (5, 2), (2, 9)):
        moved = a.clone()
        moved[:, position, feature] += step
        after = made.encode(moved, targets)
        assert torch.equal(after.ids, codes.ids)
        slope = (after.total() - codes.total()).gather(1, slots) / step
        torch.testing.assert_close(found[:, :, position, feature], slope, rtol=1e-4, atol=1e-6)
    along = (found * a.unsqueeze(1)).sum((2, 3))
    torch.testing.assert_close(along, codes.total().gather(1, slots))
    scaled = made.encode(7 * a, targets)
    assert torch.equal(scaled.ids, codes.ids)
    torch.testing.assert_close(scaled.values, 7 * codes.values)


def test_thousands_of_groups_need_no_more_slots_than_are_active() -> None:
    generator = torch.Generator().manual_seed(3)
    groups = tuple(tuple(sorted(torch.randperm(64, generator=generator)[:3].tolist())) for _ in range(5000))
    a = torch.rand(4, 9, 64, generator=generator)
    codes = codec(groups, 0.15).encode(a, torch.zeros(4, dtype=torch.int64))
    for image, row in enumerate(a.double().numpy()):
        assert [k for k in codes.ids[image].tolist() if k != EMPTY] == active_in(row, groups, 0.15)
    assert codes.ids.shape[1] < 500


def test_codes_can_be_chosen_and_moved_with_their_activation() -> None:
    a, made = activations(), codec()
    codes = made.encode(a, torch.zeros(len(a), dtype=torch.int64))
    index = torch.tensor([4, 0])
    chosen = codes.rows(index).to("cpu")
    assert isinstance(chosen, SubspaceCodes)
    assert torch.equal(made.combine(chosen), made.combine(codes)[index])
    assert isinstance(made.contributions(chosen, chosen.positions), SubspaceCodes)
    with pytest.raises(TypeError):
        made.combine(type(chosen).__base__(codes.values, codes.ids))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": torch.tensor([0.0, 1.0, 2.0])}, "int64"),
        ({"offsets": torch.tensor([0])}, "at least one group"),
        ({"offsets": torch.tensor([0, 2, 2, 3])}, "ascend"),
        ({"offsets": torch.tensor([0, 2, 4])}, "ascend"),
        ({"offsets": torch.tensor([1, 2, 3])}, "ascend"),
        ({"features": torch.tensor([0, -1, 2])}, "below 0"),
        ({"features": torch.tensor([1, 1, 2])}, "named once"),
        ({"features": torch.tensor([3, 1, 2])}, "must ascend"),
        ({"threshold": torch.tensor(torch.nan)}, "finite"),
        ({"threshold": torch.zeros(2)}, "one threshold"),
        ({"offsets": torch.tensor([0, 3])}, "cannot be 2 concepts"),
        ({"features": None}, "'features'"),
    ],
)
def test_what_is_no_bank_is_refused(changes: dict[str, Tensor | None], says: str) -> None:
    tensors = {**tensors_of(((0, 1), (2,)), 0.2), **changes}
    with pytest.raises(CorruptData, match=says):
        load_codec("subspace", {name: value for name, value in tensors.items() if value is not None}, [None] * 2)


def test_groups_belong_to_no_class() -> None:
    with pytest.raises(CorruptData, match="no class"):
        load_codec("subspace", tensors_of(((0, 1), (2,)), 0.2), [None, 3])


# With a model


def bank_of(model: Model, layer: str, groups: tuple[tuple[int, ...], ...], threshold: float) -> Bank:
    return Bank(
        kind="subspace",
        model=model.spec.name,
        layer=layer,
        name="falcon",
        weights_digest=model.spec.weights_digest,
        channels=model.cut(layer).layout.channels,
        concepts=tuple(Concept(index) for index in range(len(groups))),
        tensors=tensors_of(groups, threshold),
    )


def groups_in(cut: Cut, a: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    """Return pairs of features that are highly active together in some image; neighbours share one."""
    pooled = representations(cut.positions(a))
    found = set()
    for row in pooled:
        high = (row >= threshold).nonzero().squeeze(1).tolist()
        found |= {(high[i], high[i + 1]) for i in range(len(high) - 1)}
    return tuple(sorted(found))


@pytest.fixture(params=["layer3", "layer2"])
def engine(request: pytest.FixtureRequest, model: Model, views: NDArray[np.uint8]) -> Engine:
    """At ``layer3`` the head is affine, at ``layer2`` it is not."""
    cut = model.cut(request.param)
    groups = groups_in(cut, cut.trunk(model.inputs(views)), 0.25)
    assert len(groups) > 3
    return Engine(model, bank_of(model, request.param, groups, 0.25), cut)


def explain(engine: Engine, views: NDArray[np.uint8], **options: object) -> list[Explanation]:
    asked = ExplainOptions(**{"top_k": ALL, **options})
    answers = engine.explain(views, [EngineRequest(None, asked)] * len(views))
    assert all(isinstance(answer, Explanation) for answer in answers)
    return answers


def reference(engine: Engine, view: NDArray[np.uint8]) -> tuple[Tensor, int, Tensor]:
    """Return the activation ``[C, H, W]``, the target, and the target's gradient, by PyTorch alone."""
    a = engine.cut.trunk(engine.model.inputs(view[None])).clone().requires_grad_()
    with torch.enable_grad():
        logits = engine.cut.head(a)
        target = int(logits.argmax())
        (gradient,) = torch.autograd.grad(logits[0, target], a)
    return a[0].detach(), target, gradient[0]


def test_explanations_list_active_groups_and_say_what_these_carry(engine: Engine, views: NDArray[np.uint8]) -> None:
    codec_groups = [
        engine.bank.tensors["features"][2 * k : 2 * k + 2].tolist() for k in range(len(engine.bank.concepts))
    ]
    numbers = set()
    for view, answer in zip(views, explain(engine, views, maps=("activation", "contribution")), strict=True):
        a, _, gradient = reference(engine, view)
        rows = a.flatten(1).T.double().numpy()
        active = active_in(rows, tuple(map(tuple, codec_groups)), 0.25)
        assert sorted(score.id for score in answer.concepts) == active
        numbers.add(len(active))
        for score in answer.concepts:
            own = codec_groups[score.id]
            assert score.activation == pytest.approx(float(a[own].double().mean(0).sum()), rel=1e-4)
            contribution = float((a[own].double() * gradient[own].double()).sum())
            assert score.contribution == pytest.approx(contribution, rel=1e-3, abs=1e-5)
            np.testing.assert_allclose(score.maps["activation"].values, a[own].mean(0), rtol=1e-4, atol=1e-6)
            assert float(score.maps["contribution"].values.sum()) == pytest.approx(
                score.contribution, rel=1e-3, abs=1e-5
            )
        report = answer.faithfulness
        union = sorted({feature for k in active for feature in codec_groups[k]})
        whole = float((a.double() * gradient.double()).sum())
        carried = float((a[union].double() * gradient[union].double()).sum()) / whole
        assert report.carried_share == pytest.approx(carried, rel=1e-3, abs=1e-5)
        assert answer.unexplained is None
        assert report.relative_error is report.kl is report.top1_agrees is None
        listed = sum(score.contribution for score in answer.concepts)
        assert answer.contributions_total == pytest.approx(listed, rel=1e-4, abs=1e-5)
        left = report.explained_logit - report.constant - listed
        assert report.completeness_residual == pytest.approx(left, rel=1e-4, abs=1e-4)
        assert report.exactness == "first_order"
        assert "do not add up" in report.exactness_reason
    assert len(numbers) > 1


def test_ablation_is_the_head_without_a_group(engine: Engine, views: NDArray[np.uint8]) -> None:
    by_gradient = explain(engine, views[:4])
    for view, answer, other in zip(
        views[:4], explain(engine, views[:4], estimator="ablation"), by_gradient, strict=True
    ):
        a, target, _ = reference(engine, view)
        first = {score.id: score.contribution for score in other.concepts}
        assert first.keys() == {score.id for score in answer.concepts}
        for score in answer.concepts:
            without = a.clone()
            without[engine.bank.tensors["features"][2 * score.id : 2 * score.id + 2]] = 0
            with torch.no_grad():
                difference = engine.cut.head(torch.stack([a, without]))[:, target]
            assert score.contribution == pytest.approx(float(difference[0] - difference[1]), rel=1e-3, abs=1e-4)
            if engine.bank.layer == "layer3":  # where the head is affine, both are the same
                assert score.contribution == pytest.approx(first[score.id], rel=1e-3, abs=1e-4)


def test_scaling_changes_active_groups_alone_and_shared_features_once(engine: Engine, views: NDArray[np.uint8]) -> None:
    view = views[:1]
    (answer,) = explain(engine, view)
    active = sorted(score.id for score in answer.concepts)
    silent = next(k for k in range(len(engine.bank.concepts)) if k not in active)
    a, _, _ = reference(engine, view[0])

    def scaled(scales: dict[int, float]) -> Intervention:
        (changed,) = engine.intervene(view, [InterventionRequest(None, scales)])
        assert isinstance(changed, Intervention)
        return changed

    unchanged = scaled({silent: 0.0})
    assert unchanged.before == unchanged.after
    features = engine.bank.tensors["features"].view(-1, 2)
    two = next((i, j) for i in active for j in active if features[i, 1] == features[j, 0])
    without = a.clone()
    without[features[list(two)].unique()] = 0
    with torch.no_grad():
        expected = engine.cut.head(without[None])[0]
    removed = {score.index: score.logit for score in scaled(dict.fromkeys(two, 0.0)).after}
    assert removed == pytest.approx({index: float(expected[index]) for index in removed}, rel=1e-4, abs=1e-4)


def test_answers_do_not_depend_on_the_batch(engine: Engine, views: NDArray[np.uint8]) -> None:
    together = explain(engine, views)
    for row in (0, 7, 19):
        (alone,) = explain(engine, views[row : row + 1])
        assert [score.id for score in alone.concepts] == [score.id for score in together[row].concepts]
        for one, other in zip(alone.concepts, together[row].concepts, strict=True):
            assert one.contribution == pytest.approx(other.contribution, rel=1e-4, abs=1e-5)


def test_images_without_an_active_group_are_answered(engine: Engine, views: NDArray[np.uint8]) -> None:
    bank = replace(engine.bank, tensors={**engine.bank.tensors, "threshold": torch.tensor(0.99)})
    silent = Engine(engine.model, bank, engine.cut)
    maps = ("activation", "contribution", "input")
    for estimator in ("gradient", "ablation"):
        wanted = maps if estimator == "gradient" else maps[:1]
        for answer in explain(silent, views[:3], estimator=estimator, maps=wanted):
            assert answer.concepts == ()
            assert answer.contributions_total == 0
            assert answer.faithfulness.carried_share == (0 if estimator == "gradient" else None)
            if answer.faithfulness.input_maps is not None:
                assert answer.faithfulness.input_maps.residual == 0
    (changed,) = silent.intervene(views[:1], [InterventionRequest(None, {0: 0.0})])
    assert isinstance(changed, Intervention)
    assert changed.before == changed.after


def test_input_maps_are_gradients_of_the_code(engine: Engine, views: NDArray[np.uint8]) -> None:
    (answer,) = explain(engine, views[:1], maps=("input",))
    x = engine.model.inputs(views[:1]).requires_grad_()
    for score in answer.concepts[:3]:
        own = engine.bank.tensors["features"][2 * score.id : 2 * score.id + 2]
        with torch.enable_grad():
            code = engine.cut.trunk_with_gradients(x)[0, own].mean(0).sum()
            (gradient,) = torch.autograd.grad(code, x)
        expected = (gradient * x).sum(1)[0].detach()
        np.testing.assert_allclose(score.maps["input"].values, expected, rtol=1e-3, atol=1e-5)
    for method in ("smoothgrad", "integrated"):
        (answer,) = explain(engine, views[:1], maps=("input",), input_method=method)
        assert answer.faithfulness.input_maps is not None


def test_pixels_add_up_on_bcos_models(bcos: Model, views: NDArray[np.uint8]) -> None:
    cut = bcos.cut("layer3")
    groups = groups_in(cut, cut.trunk(bcos.inputs(views)), 0.3)
    engine = Engine(bcos, bank_of(bcos, "layer3", groups, 0.3), cut)
    for answer in explain(engine, views[:4], maps=("input",)):
        assert answer.faithfulness.input_maps is not None
        assert answer.faithfulness.input_maps.exactness == "exact"
        assert answer.faithfulness.input_maps.residual < 1e-4


def test_what_needs_a_reconstruction_is_refused(engine: Engine) -> None:
    for options in (ExplainOptions(estimator="integrated"), ExplainOptions(substitute=True)):
        with pytest.raises(UnsupportedOption, match="do not reconstruct"):
            engine.check(EngineRequest(None, options))


def test_features_of_another_layer_are_refused(model: Model) -> None:
    check(bank_of(model, "layer3", ((0, 63),), 0.2))
    with pytest.raises(CorruptData, match="64 channels names the feature 64"):
        check(bank_of(model, "layer3", ((0, 64),), 0.2))
