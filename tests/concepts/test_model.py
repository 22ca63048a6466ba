"""Models: descriptions, weights, and what they make of views."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from concepts import model as models
from concepts.errors import CorruptData, InvalidInput, InvalidModel, UnknownClass
from concepts.model import Model, ModelSpec
from concepts.preprocessing import Preprocessing
from tests.concepts import networks

SPEC = ModelSpec("net", "tests.concepts.networks:tiny", Preprocessing(8, 8), ("cat", "dog"), "a" * 64, {"width": 5})


def test_json_round_trip(model: Model) -> None:
    for spec in (SPEC, model.spec):
        assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.pop("class_names"),
        lambda value: value.update(schema=2),
        lambda value: value.update(schema=None),
        lambda value: value.update(class_names=None),
        lambda value: value.update(name=3),
    ],
)
def test_descriptions_of_another_form(damage: Any) -> None:
    value = copy.deepcopy(SPEC.to_json())
    damage(value)
    with pytest.raises(CorruptData, match=r"model\.json"):
        ModelSpec.from_json(value)


def test_preprocessing_of_another_form() -> None:
    with pytest.raises(InvalidModel, match="preprocessing"):
        ModelSpec.from_json({**SPEC.to_json(), "preprocessing": None})


def test_names_and_classes() -> None:
    assert SPEC.class_index("dog") == 1
    with pytest.raises(UnknownClass, match="'cow'"):
        SPEC.class_index("cow")
    for wrong in ((), ("cat", "cat")):
        with pytest.raises(InvalidModel, match="class names"):
            replace(SPEC, class_names=wrong)
    with pytest.raises(InvalidInput, match="must be 1 to 128"):
        replace(SPEC, name="../x")


def test_views_become_inputs(model: Model, views: NDArray[np.uint8]) -> None:
    x = model.inputs(views[:2])
    assert torch.equal(x, model.spec.preprocessing.normalize(torch.from_numpy(views[:2])))
    assert torch.equal(model.inputs(torch.from_numpy(views[:2])), x)


def test_real_weights_know_real_images(model: Model, views: NDArray[np.uint8]) -> None:
    with torch.no_grad():
        predicted = model.module(model.inputs(views)).argmax(1)
    assert int((predicted == torch.arange(20) // 2).sum()) >= 14


def test_channels_last_changes_no_logits(model: Model, views: NDArray[np.uint8]) -> None:
    plain = copy.deepcopy(model.module).to(memory_format=torch.contiguous_format)
    x = model.inputs(views[:4])
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), plain(x.contiguous()), rtol=1e-4, atol=1e-4)


def test_a_cut_wants_as_many_outputs_as_class_names(model: Model) -> None:
    with pytest.raises(InvalidModel, match="10 outputs but 2 class names"):
        replace(model, spec=replace(model.spec, class_names=("cat", "dog"))).cut("layer3")


def test_weights_are_loaded_and_left_alone() -> None:
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value) for name, value in models_state().items()}
    before = {name: value.clone() for name, value in weights.items()}
    model = models.build(SPEC, weights, trusted=["tests"])
    for value in model.module.parameters():
        value.data.zero_()
    assert all(torch.equal(weights[name], value) for name, value in before.items())


def models_state() -> dict[str, torch.Tensor]:
    from tests.concepts.networks import Tiny

    module: nn.Module = Tiny(5)
    return module.state_dict()


def test_models_that_mix_the_images_of_a_batch_are_refused() -> None:
    spec = replace(SPEC, architecture="tests.concepts.networks:Coupled")
    built = models.build(spec, networks.Coupled(5).state_dict(), trusted=("tests.concepts",))
    with pytest.raises(InvalidModel, match="two images otherwise than each alone"):
        built.check()
