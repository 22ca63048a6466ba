"""What the packages that publish networks say of them: preprocessing, class names, options of the factory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch

from concepts import architectures
from concepts.errors import InvalidInput
from concepts.preprocessing import Preprocessing


@dataclass(frozen=True)
class Preset:
    """What is known of a model before anybody says it; empty where nothing is."""

    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory that the published weights need."""
    source: str = ""
    """Where this comes from, for people."""
    version: Any = None
    """The ``WeightsEnum`` of torchvision that it comes from."""


def find(architecture: str, weights: str | None = None, like: str | None = None) -> Preset:
    """Return what is known of an architecture.

    Parameters
    ----------
    architecture
        As for ``architectures.build``.
    weights
        Name of torchvision's weights, e.g. ``IMAGENET1K_V2``, or a weights file: one that is named as it was published
        tells which weights it holds.
    like
        Name of those of torchvision's weights whose preprocessing and class names the model shares.

    Raises
    ------
    InvalidModel
        If torchvision or bcos has no such architecture.
    InvalidInput
        If the architecture has no weights named ``like``.
    """
    package, _, name = architecture.partition(":")
    if like is not None and package != "torchvision":
        raise InvalidInput("--like names weights of torchvision's: give one of its architectures with it")
    if package == "torchvision":
        return _of_torchvision(name, weights, like)
    if package == "bcos":
        return _of_bcos(name, weights)
    return Preset()


def architecture_of(weights: str) -> str | None:
    """Return which of torchvision's architectures published weights are for, by their full name or their file's."""
    from torchvision import models

    for name in models.list_models(module=models):
        versions = models.get_model_weights(name)
        if weights.startswith(f"{versions.__name__}.") or _by_file(versions, weights):
            return f"torchvision:{name}"
    return None


def published(architecture: str, weights: str) -> Any:
    """Return the ``WeightsEnum`` of torchvision that ``weights`` names; None where it names none."""
    from torchvision import models

    package, _, name = architecture.partition(":")
    return _by_name(models.get_model_weights(name), weights) if package == "torchvision" else None


def _of_torchvision(name: str, weights: str | None, like: str | None) -> Preset:
    from torchvision import models

    architectures.factory(f"torchvision:{name}")  # refuses what is no classifier
    version, why = _choose(models.get_model_weights(name), weights, like)
    source = f"torchvision's {version!r}: {why}"
    # A ViT's position embeddings fix the size of its input.
    options = {"image_size": version.meta["min_size"][0]} if name.startswith("vit_") else {}
    class_names = tuple(version.meta["categories"] or ())
    return Preset(_torchvision_preprocessing(version), class_names, options, source, version)


def _choose(versions: Any, weights: str | None, like: str | None) -> tuple[Any, str]:
    """Return the version that a preset is taken from, and why that one."""
    if like is not None:
        chosen = _by_name(versions, like)
        if chosen is None:
            raise InvalidInput(f"--like {like!r} is none of {', '.join(version.name for version in versions)}")
        return chosen, "named by --like"
    if weights is not None and (chosen := _by_name(versions, weights)) is not None:
        return chosen, "named by --weights"
    if weights is not None and (chosen := _by_file(versions, weights)) is not None:
        return chosen, "the weights file is named so"
    preprocessing = _torchvision_preprocessing(versions.DEFAULT)
    others = [
        version.name
        for version in versions
        if version.meta["categories"] and _torchvision_preprocessing(version) != preprocessing
    ]
    if others:
        return versions.DEFAULT, f"the default; others differ (--like {' or '.join(others)})"
    return versions.DEFAULT, "all its weights agree"


def _by_name(versions: Any, text: str) -> Any:
    return versions.__members__.get(text.removeprefix(f"{versions.__name__}."))


def _by_file(versions: Iterable[Any], file: str) -> Any:
    return next((version for version in versions if _stem(version.url) == _stem(file)), None)


def _stem(file: str) -> str:
    return PurePosixPath(file).stem


def _torchvision_preprocessing(version: Any) -> Preprocessing:
    # Antialiasing is no choice: Pillow, which resizes here as there, always does it.
    transforms = version.transforms()
    (side,), (resize,) = transforms.crop_size, transforms.resize_size
    return Preprocessing(
        side, side, resize, transforms.interpolation.value, tuple(transforms.mean), tuple(transforms.std)
    )


def _of_bcos(name: str, weights: str | None) -> Preset:
    from bcos.data import categories, presets

    with torch.device("meta"):
        network = architectures.build(f"bcos:{name}")
    if name.startswith("cifar10_"):
        transform, class_names = presets.CIFAR10ClassificationPresetTest(is_bcos=True), categories.CIFAR10_CATEGORIES
    else:
        transform = _bcos_transform(weights) or getattr(network, "transform", None)
        transform = transform or presets.ImageNetClassificationPresetEval(crop_size=224, is_bcos=True)
        class_names = categories.IMAGENET_CATEGORIES
    steps = transform.transforms.transforms
    return Preset(_bcos_preprocessing(steps), tuple(class_names), source=f"the bcos package's transforms for {name}")


def _bcos_transform(weights: str | None) -> Any:
    """Return the transform of published weights by their file's name: some fit two networks that differ in it alone."""
    from bcos.experiments.utils import Experiment
    from bcos.models.pretrained import URLS

    for base, files in URLS.items():
        for experiment, url in files.items():
            if weights is not None and _stem(url) == _stem(weights):
                return Experiment("ImageNet", base, experiment).config["data"]["test_transform"]
    return None


def _bcos_preprocessing(steps: Iterable[Any]) -> Preprocessing:
    """Read a sequence of torchvision's transforms; without one that resizes, CIFAR's 32 pixels are meant."""
    fields: dict[str, Any] = {"height": 32, "width": 32}
    for step in steps:
        match type(step).__name__:
            case "Resize":
                fields |= {"resize": step.size, "interpolation": step.interpolation.value}
            case "CenterCrop":
                fields["height"], fields["width"] = step.size
            case "Normalize":
                fields |= {"mean": tuple(step.mean), "std": tuple(step.std)}
            case "AddInverse":
                fields["inverse"] = True
    return Preprocessing(**fields)
