"""What torchvision and bcos say of their networks, against their own transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bcos.data import categories, presets
from bcos.models import pretrained
from PIL import Image
from torch import Tensor
from torchvision import models

from concepts.errors import InvalidInput, InvalidModel
from concepts.preprocessing import Preprocessing
from offline.presets import architecture_of, find
from tests.data import real_data

NAMES = models.list_models(module=models)


def photos() -> Iterator[tuple[str, str, Image.Image]]:
    """Yield each photograph's name, its mode, and it in RGB."""
    for path in sorted((real_data() / "photos").glob("*.JPEG")):
        with Image.open(path) as image:
            yield path.name, image.mode, image.convert("RGB")


def same_to_a_grey_level(preprocessing: Preprocessing, reference: Callable[[Image.Image], Tensor]) -> None:
    std = torch.tensor(preprocessing.std * (2 if preprocessing.inverse else 1)).view(-1, 1, 1)
    seen = set()
    for name, mode, image in photos():
        view, _ = preprocessing.fit(image)
        ours = preprocessing.normalize(torch.from_numpy(view.copy())[None])[0]
        # Undoing the normalisation: the mean cancels in the difference.
        levels = ((ours - reference(image)) * std * 255).abs().max()
        assert levels < 1.01, (name, levels)
        seen.add((image.width > image.height, mode))
    assert {(True, "RGB"), (False, "RGB")} < seen
    assert any(mode == "L" for _, mode in seen)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("resnet50", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V2"),
        ("efficientnet_b0", "IMAGENET1K_V1"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("convnext_tiny", "IMAGENET1K_V1"),
        ("swin_t", "IMAGENET1K_V1"),
        ("vgg16", "IMAGENET1K_FEATURES"),
    ],
)
def test_images_are_prepared_as_torchvision_prepares_them(name: str, version: str) -> None:
    preset = find(f"torchvision:{name}", like=version)
    assert preset.preprocessing is not None
    same_to_a_grey_level(preset.preprocessing, models.get_model_weights(name)[version].transforms())


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *((name, getattr(pretrained, name)) for name in ("resnet50_long", "standard_vitc_ti_patch1_14")),
        ("resnet101", lambda: presets.ImageNetClassificationPresetEval(crop_size=224, is_bcos=True)),
        ("wide_resnet50_2", lambda: presets.ImageNetClassificationPresetEval(crop_size=224, is_bcos=True)),
    ],
)
def test_images_are_prepared_as_bcos_prepares_them(name: str, reference: Callable[[], Any]) -> None:
    preset = find(f"bcos:{name}")
    assert preset.preprocessing is not None
    with torch.device("meta"):
        made = reference()
    same_to_a_grey_level(preset.preprocessing, getattr(made, "transform", made))
    assert preset.class_names == tuple(categories.IMAGENET_CATEGORIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_version_of_every_classifier_is_known(name: str) -> None:
    for version in models.get_model_weights(name):
        by_name = find(f"torchvision:{name}", like=version.name)
        assert by_name.version is version
        for weights in (version.name, str(version), Path(version.url).name, f"/some/where/{Path(version.url).name}"):
            known = find(f"torchvision:{name}", weights)
            assert (known.preprocessing, known.version) == (by_name.preprocessing, version)
        assert architecture_of(Path(version.url).name) == f"torchvision:{name}"
        assert len(by_name.class_names) == (1000 if version.meta["categories"] else 0)
        assert len(set(by_name.class_names)) == len(by_name.class_names)


@pytest.mark.parametrize("name", pretrained.list_available())
def test_every_published_bcos_network_is_known(name: str) -> None:
    preset = find(f"bcos:{name}")
    assert preset.preprocessing is not None
    assert preset.preprocessing.inverse != name.startswith("standard_")
    assert preset.preprocessing.resize == (232 if "convnext" in name or name.endswith("_long") else 256)


def test_bcos_networks_for_cifar() -> None:
    preset = find("bcos:cifar10_resnet20")
    assert preset.preprocessing == Preprocessing(32, 32, inverse=True)
    assert preset.class_names == tuple(categories.CIFAR10_CATEGORIES)
    pixels = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    reference = presets.CIFAR10ClassificationPresetTest(is_bcos=True)
    torch.testing.assert_close(
        preset.preprocessing.normalize(pixels)[0], reference(Image.fromarray(pixels[0].numpy())), rtol=0, atol=1e-6
    )


def test_which_weights_a_preset_is_taken_from() -> None:
    def taken(*arguments: str | None) -> tuple[str, str]:
        preset = find(*arguments)  # type: ignore[arg-type]
        return preset.version.name, preset.source

    assert taken("torchvision:resnet18", "mine.pth") == (
        "IMAGENET1K_V1", "torchvision's ResNet18_Weights.IMAGENET1K_V1: all its weights agree",
    )  # fmt: skip
    name, why = taken("torchvision:resnet50", "mine.pth")
    assert name == "IMAGENET1K_V2"
    assert why.endswith("the default; others differ (--like IMAGENET1K_V1)")
    # What is said counts more than what a file is called.
    assert taken("torchvision:resnet50", "resnet50-11ad3fa6.pth", "IMAGENET1K_V1")[0] == "IMAGENET1K_V1"
    assert taken("torchvision:resnet50", "resnet50-0676ba61.safetensors")[0] == "IMAGENET1K_V1"
    assert taken("torchvision:resnet50", "ResNet50_Weights.DEFAULT")[0] == "IMAGENET1K_V2"
    # The weights of VGG-16's convolutions alone are no classifier, and no choice.
    assert taken("torchvision:vgg16", "mine.pth")[1].endswith("all its weights agree")


def test_the_file_tells_longer_training_where_the_architecture_does_not() -> None:
    assert (
        find("bcos:resnet50", "resnet_50_long-ef38a88533.pth").preprocessing == find("bcos:resnet50_long").preprocessing
    )
    assert find("bcos:resnet50", "resnet_50-ead259efe4.pth").preprocessing == find("bcos:resnet50").preprocessing


def test_options_that_published_weights_need() -> None:
    assert find("torchvision:vit_b_16", like="IMAGENET1K_SWAG_E2E_V1").options == {"image_size": 384}
    assert find("torchvision:vit_b_16").options == {"image_size": 224}
    assert find("torchvision:resnet18").options == {}


def test_what_is_not_known() -> None:
    assert find("demo.cifar:resnet20", "resnet50-11ad3fa6.pth").preprocessing is None
    assert find("").class_names == ()
    assert architecture_of("mine.pth") is None
    assert architecture_of("IMAGENET1K_V2") is None
    assert architecture_of("ResNet50_Weights.IMAGENET1K_V2") == "torchvision:resnet50"
    with pytest.raises(InvalidInput, match="none of IMAGENET1K_V1, IMAGENET1K_V2"):
        find("torchvision:resnet50", like="IMAGENET1K_V3")
    for architecture in ("bcos:resnet50", "demo.cifar:resnet20", ""):
        with pytest.raises(InvalidInput, match="--like names weights of torchvision's"):
            find(architecture, like="IMAGENET1K_V1")
    for architecture in ("torchvision:resnet19", "torchvision:quantized_resnet50", "bcos:resnet19", "torchvision:"):
        with pytest.raises(InvalidModel):
            find(architecture)
