"""Which architectures can be built by name, and which must not be."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from concepts.architectures import build
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
        ("bcos:resnet19", "no ResNet or DenseNet"),
        ("bcos:BcosResNet", "no ResNet or DenseNet"),
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
    ]:
        with pytest.raises(InvalidModel, match="the factory failed"):
            build(architecture, options)
