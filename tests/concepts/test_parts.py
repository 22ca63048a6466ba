"""Parts of concepts: a second statement, at an earlier layer, that is what the parts' bank alone would say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from numpy.typing import NDArray

from concepts import parts
from concepts.bank import Bank, Concept
from concepts.engine import Engine
from concepts.errors import UnknownClass, UnsupportedOption
from concepts.explanation import EngineRequest, Explanation
from concepts.intervention import InterventionRequest
from concepts.layout import Layout
from concepts.model import Model
from tests.concepts.test_engine import ALL, MAPS, Floats, Reference, close, explain, options

WITHOUT_PARTS = 2
"""A class that has concepts, but none with parts."""


@pytest.fixture(scope="module")
def tree(bank: Bank, early_bank: Bank) -> Bank:
    """Concepts at ``layer3``; the parts at ``layer2`` are of the first and the last concept of their class in turn."""
    kept = [c.id for c in early_bank.concepts if c.class_index != WITHOUT_PARTS]
    parts = []
    for index, concept_id in enumerate(kept):
        owner = early_bank.concepts[concept_id].class_index
        family = [c.id for c in bank.concepts if c.class_index == owner]
        parts.append(Concept(index, f"part {index}", class_index=owner, parent=family[0 if index % 2 else -1]))
    tensors = {"dictionary": early_bank.tensors["dictionary"][kept]}
    return bank.with_parts("nmf", "layer2", early_bank.channels, tuple(parts), tensors)


@pytest.fixture(scope="module")
def engine(model: Model, tree: Bank) -> Engine:
    return Engine(model, tree)


def bilinear(values: Floats, size: int) -> Floats:
    """Resize ``[h, h]`` to ``[size, size]``: cells are points at their middles, the border goes on outwards."""
    places = np.clip((np.arange(size) + 0.5) * len(values) / size - 0.5, 0, len(values) - 1)
    low = np.minimum(places.astype(int), len(values) - 2)
    weights = np.zeros((size, len(values)))
    weights[np.arange(size), low] = 1 - (places - low)
    weights[np.arange(size), low + 1] = places - low
    return weights @ values @ weights.T


def codes_within_concepts(model: Model, tree: Bank, view: NDArray[np.uint8], target: int) -> Floats:
    """Return codes ``[K', H, W]`` of the parts of a class: concept by concept, position by position, of its share."""
    assert tree.parts is not None
    late, early = Reference(model, tree), Reference(model, tree.parts)
    owned, dictionary = early.dictionary(target)
    concepts, _ = late.dictionary(target)
    whole = late.codes(late.activation(view), target)
    a = early.activation(view)[0].numpy()
    side = a.shape[1]
    enlarged = np.stack([bilinear(each, side) for each in whole])
    codes = np.zeros((len(owned), side, side))
    for row, concept in enumerate(concepts):
        family = [k for k, part in enumerate(owned) if tree.parts.concepts[part].parent == concept]
        if not family:
            continue
        for i, j in np.ndindex(side, side):
            everything = enlarged[:, i, j].sum()
            share = enlarged[row, i, j] / everything if everything else 0.0
            codes[family, i, j] = scipy.optimize.nnls(dictionary[family].T, share * a[:, i, j])[0]
    return codes


def test_parts_are_what_each_concepts_share_is_made_of(
    model: Model, tree: Bank, engine: Engine, views: NDArray[np.uint8]
) -> None:
    assert tree.parts is not None
    reference, target, first = Reference(model, tree.parts), 3, len(tree.concepts)
    for view, answer in zip(views[5:7], explain(engine, views[5:7], target, parts=True, maps=MAPS), strict=True):
        a, codes = reference.activation(view), codes_within_concepts(model, tree, view, target)
        owned, dictionary = reference.dictionary(target)
        listed = [part for concept in answer.concepts for part in concept.parts]
        assert sorted(part.id - first for part in listed) == owned
        for concept in answer.concepts:
            assert [part.id for part in concept.parts] == sorted(
                tree.children(concept.id), key=lambda id_: -abs(next(p.contribution for p in listed if p.id == id_))
            )
        for part in listed:
            k = owned.index(part.id - first)
            slope = reference.slope(a, reference.component(codes, dictionary, k), target)
            assert part.contribution == pytest.approx(slope, rel=5e-3, abs=2e-3)
            assert part.activation == pytest.approx(codes[k].sum(), rel=1e-3, abs=1e-3 * codes.max())
            assert part.label == f"part {part.id - first}"
            np.testing.assert_allclose(part.maps["activation"].values, codes[k], atol=1e-3 * codes.max())
            assert float(part.maps["contribution"].values.sum()) == pytest.approx(part.contribution, abs=1e-4)
        assert answer.parts is not None
        assert answer.parts.layer == "layer2"
        assert answer.parts.contributions_total == pytest.approx(sum(p.contribution for p in listed), abs=1e-4)
        assert answer.parts.faithfulness.exactness == "first_order"
        assert answer.faithfulness.exactness == "exact"


def test_shares_of_an_earlier_layer_add_up_where_concepts_are_active() -> None:
    codes = torch.rand(2, 1 + 4, 3, generator=torch.Generator().manual_seed(0))
    codes[:, 1:3] = 0.0  # the upper half
    late, early = Layout("btc", 8, (2, 2), 1), Layout("btc", 4, (4, 4), 1)
    found = parts.shares(codes, codes.sum(2), late, early)
    assert found.shape == (2, 17, 3)
    token = codes.sum(1) / codes.sum((1, 2)).unsqueeze(1)
    torch.testing.assert_close(found[:, 0], token)
    places = found[:, 1:].unflatten(1, (4, 4))
    assert not places[:, 0].any()  # the row nearest to no concept at all
    torch.testing.assert_close(places[:, 1:].sum(3), torch.ones(2, 3, 4))


def test_the_concepts_are_the_same_with_and_without_parts(
    model: Model, bank: Bank, engine: Engine, views: NDArray[np.uint8]
) -> None:
    with_parts = explain(engine, views[:4], 3, parts=True)
    for one, other, plain in zip(
        with_parts, explain(engine, views[:4], 3), explain(Engine(model, bank), views[:4], 3), strict=True
    ):
        close(one, other)
        close(other, plain)
        assert other.parts is None
        assert not any(concept.parts for concept in other.concepts)


def test_an_answer_with_parts_is_the_same_alone_and_in_any_batch(engine: Engine, views: NDArray[np.uint8]) -> None:
    requests = [
        EngineRequest(target, options(parts=True, top_k=top_k, order=order, maps=("activation",), map_size=size))
        for target, top_k, order, size in [
            (None, 2, "contribution", "grid"),
            (WITHOUT_PARTS, ALL, "contribution", "grid"),
            (10, ALL, "contribution", "grid"),  # no such class
            (4, ALL, "activation", "image"),
        ]
    ]
    batch = views[[16, 0, 5, 9]]
    together = engine.explain(batch, requests)
    assert isinstance(together[2], UnknownClass)
    for row in (0, 1, 3):
        (alone,) = engine.explain(batch[row : row + 1], requests[row : row + 1])
        answer = together[row]
        assert isinstance(alone, Explanation)
        assert isinstance(answer, Explanation)
        close(answer, alone)
        for one, other in zip(answer.concepts, alone.concepts, strict=True):
            assert [part.id for part in one.parts] == [part.id for part in other.parts]
            for left, right in zip(one.parts, other.parts, strict=True):
                assert left.contribution == pytest.approx(right.contribution, rel=1e-3, abs=1e-4)
                np.testing.assert_allclose(left.maps["activation"].values, right.maps["activation"].values, atol=1e-4)
    assert together[1].parts is None  # type: ignore[union-attr]
    assert not any(concept.parts for concept in together[1].concepts)  # type: ignore[union-attr]
    whole = together[3].concepts  # type: ignore[union-attr]
    assert sum(len(concept.parts) for concept in whole) >= 2
    assert all(part.maps["activation"].values.shape == (32, 32) for concept in whole for part in concept.parts)


def test_a_batch_shares_whether_parts_are_wanted(engine: Engine) -> None:
    assert engine.batch_key(options(parts=True)) != engine.batch_key(options())


def test_parts_of_a_bank_without_any_are_refused_with_the_remedy(model: Model, bank: Bank, engine: Engine) -> None:
    engine.check(EngineRequest(0, options(parts=True)))
    with pytest.raises(UnsupportedOption, match="train one with --parts-layer"):
        Engine(model, bank).check(EngineRequest(0, options(parts=True)))
    with pytest.raises(UnsupportedOption, match="of one class"):
        engine.check(EngineRequest(0, options(parts=True, concepts="all")))


def test_concepts_are_explained_where_their_parts_cannot_be_computed(
    model: Model, tree: Bank, engine: Engine, views: NDArray[np.uint8]
) -> None:
    without = Engine(model, tree, without_parts="no runtime has this layer: use another")
    assert without.of_parts is None
    without.warm_up()
    for one, other in zip(explain(without, views[:2], 0), explain(engine, views[:2], 0), strict=True):
        close(one, other)
    with pytest.raises(UnsupportedOption, match=f"{tree.reference} are not served .*: use another, or leave .parts."):
        without.check(EngineRequest(0, options(parts=True)))


def test_parts_cannot_be_scaled(tree: Bank, engine: Engine) -> None:
    engine.check_intervention(InterventionRequest(None, {0: 0.0}))
    part = len(tree.concepts)
    parent = tree.concept(part).parent
    with pytest.raises(UnsupportedOption, match=f"scale the concept {parent} it belongs to"):
        engine.check_intervention(InterventionRequest(None, {part: 0.0}))


def test_an_engine_of_the_parts_can_be_shared(
    model: Model, tree: Bank, engine: Engine, views: NDArray[np.uint8]
) -> None:
    assert tree.parts is not None
    own = Engine(model, tree.parts)
    shared = Engine(model, tree, of_parts=own)
    assert shared.of_parts is own
    own.codec = Engine(model, replace(tree.parts, tensors={"dictionary": tree.parts.tensors["dictionary"] * 2})).codec
    (one,), (other,) = explain(shared, views[:1], 0, parts=True), explain(engine, views[:1], 0, parts=True)
    doubled = {part.id: part.activation for concept in one.concepts for part in concept.parts}
    for part in (part for concept in other.concepts for part in concept.parts):
        assert doubled[part.id] == pytest.approx(part.activation / 2, rel=1e-3, abs=1e-4)
