"""Which architectures can be built by name, and which must not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bcos.models import pretrained
from torch import nn
from torchvision import models

from concepts.architectures import build
from concepts.cut import Cut
from concepts.errors import InvalidModel


def test_networks_are_built_frozen_and_in_evaluation_mode() -> None:
    for architecture, options in [
        ("torchvision:squeezenet1_1", {"num_classes": 3}),
        ("bcos:cifar10_resnet20", {"num_classes": 3}),
        ("demo.cifar:resnet20", None),
    ]:
        module = build(architecture, options)
        assert isinstance(module, nn.Module)
        assert not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert (
        build("tests.concepts.networks:tiny", {"width": 9}, trusted=["tests.concepts.networks"]).head.in_features == 9
    )  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["", ":", "resnet18", "torchvision:", ":resnet18"])
def test_malformed_names(architecture: str) -> None:
    with pytest.raises(InvalidModel, match="is not of the form"):
        build(architecture)


@pytest.mark.parametrize(
    "architecture",
    ["os:system", "subprocess:run", "demonstration:x", "demo_:x", "concepts.model:build", "builtins:eval", ".demo:x"],
)
def test_packages_that_are_not_trusted(architecture: str) -> None:
    with pytest.raises(InvalidModel, match="not trusted"):
        build(architecture, {"command": "true"})


@pytest.mark.parametrize("name", ["rmtree", "shutil", "not_callable", "nn", "Any"])
def test_names_that_a_trusted_package_only_imports(name: str) -> None:
    """``rmtree`` in a trusted package is still not a factory: nothing is called."""
    with pytest.raises(InvalidModel, match="not a factory of its own package"):
        build(f"tests.concepts.networks:{name}", {"path": "/nowhere"}, trusted=["tests.concepts"])


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("torchvision:resnet19", "no classifier 'resnet19'"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier"),
        ("torchvision:get_model", "no classifier"),
        ("torchvision:quantized_resnet50", "use 'resnet50'"),
        ("bcos:resnet19", "no ResNet, DenseNet"),
        ("bcos:BcosResNet", "no ResNet, DenseNet"),
        ("bcos:list_available", "no ResNet, DenseNet"),
        ("demo.nowhere:x", "no factory demo.nowhere:x"),
        ("demo.cifar:nowhere", "no factory demo.cifar:nowhere"),
        ("demo.cifar:resnet20.forward", "no factory"),
    ],
)
def test_unknown_names(architecture: str, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        build(architecture)


@pytest.mark.parametrize(("name", "options", "cause"), [("raises", {}, "out of luck"), ("tiny", {"depth": 3}, "depth")])
def test_factories_that_fail(name: str, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(InvalidModel, match="the factory failed") as caught:
        build(f"tests.concepts.networks:{name}", options, trusted=["tests"])
    assert cause in str(caught.value.__cause__)
    # The message may reach callers of a service, who must not read what a factory says.
    assert cause not in caught.value.message


def test_factories_that_build_something_else() -> None:
    with pytest.raises(InvalidModel, match="returned a int, not a"):
        build("tests.concepts.networks:a_number", {}, trusted=["tests"])


def test_options_cannot_fetch_weights() -> None:
    for architecture, options in [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("bcos:resnet18", {"pretrained": True}),
        ("bcos:vitc_ti_patch1_14", {"pretrained": True}),
        ("bcos:cifar10_resnet20", {"pretrained": True}),
    ]:
        with pytest.raises(InvalidModel, match="the factory failed"):
            build(architecture, options)


def test_every_classifier_of_torchvision_can_be_built() -> None:
    for name in models.list_models(module=models):
        if name.startswith("regnet"):  # computes its widths with tensors, which have no values on this device
            continue
        with torch.device("meta"):
            module = build(f"torchvision:{name}", {"num_classes": 7})
        assert 7 in [value.shape[0] for value in list(module.parameters())[-8:]], name
    assert build("torchvision:regnet_y_400mf", {"num_classes": 7}).fc.out_features == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_ported_networks_turn_their_input_as_published_weights_want(name: str) -> None:
    with torch.device("meta"):
        assert build(f"torchvision:{name}").transform_input is True
        assert build(f"torchvision:{name}", {"transform_input": False}).transform_input is False


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg11_bnu", "convnext_tiny", "vitc_ti_patch1_14"])
def test_bcos_networks_are_those_that_are_published(name: str) -> None:
    """Their normalisation layers are not the defaults of the package's constructors: weights would not fit those."""
    with torch.device("meta"):
        module, expected = build(f"bcos:{name}"), getattr(pretrained, name)()
    assert repr(module) == repr(expected)
    assert module.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bcos:resnet18", {"num_clases": 3}),
        ("bcos:cifar10_resnet20", {"num_clases": 3}),
        ("bcos:vitc_ti_patch1_14", {"num_clases": 3}),
        ("bcos:standard_vitc_ti_patch1_14", {"logit_bias": 3}),
    ],
)
def test_bcos_options_that_would_be_ignored(architecture: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match="the factory failed") as caught:
        build(architecture, options)
    assert f"has no option {next(iter(options))}" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("resnet18", "layer4", 64),
        ("resnet18", "layer3", 64),
        ("densenet121", "features.denseblock4", 64),
        ("vitc_ti_patch1_14", "0.transformer.encoder_9", 224),
        ("simple_vit_ti_patch16_224", "0.transformer.encoder_10", 224),
    ],
)
def test_logit_layers_are_part_of_the_head(name: str, layer: str, size: int) -> None:
    """The head of nothing is the logit bias, for every class; the temperature divides all the rest."""
    torch.manual_seed(0)
    plain = build(f"bcos:{name}", {"num_classes": 5})
    module = build(f"bcos:{name}", {"num_classes": 5, "logit_bias": -3.0, "logit_temperature": 2.0})
    module.load_state_dict(plain.state_dict())
    x = torch.rand(2, 6, size, size)
    cut, bare = Cut(module, layer, x), Cut(plain, layer, x)
    torch.testing.assert_close(cut.facts.constant, torch.full((5,), -3.0))
    assert bare.facts.constant.unique().numel() == 1
    with torch.no_grad():
        torch.testing.assert_close(module(x), (plain(x) - bare.facts.constant) / 2 - 3)


def test_bcos_networks_have_the_published_bias_unless_told() -> None:
    with torch.device("meta"):
        for name in ("resnet18", "vitc_ti_patch1_14"):
            layers = [child for child in build(f"bcos:{name}").modules() if hasattr(child, "logit_bias")]
            assert [layer.logit_bias for layer in layers] == [pytest.approx(-6.906755)]  # −ln 999
