"""The real parts that tests share: ResNet-20 with its weights, real images, and a small NMF bank of its activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from concepts import model as models
from concepts.bank import Bank, Concept
from concepts.model import Model, ModelSpec
from concepts.preprocessing import Preprocessing
from demo.cifar import CLASS_NAMES, PREPROCESSING
from tests.data import real_data


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: on small tensors and busy machines, waiting for other threads costs most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WITHOUT_CONCEPTS = 9
"""The class that the banks here say nothing about."""


@pytest.fixture(scope="session")
def model() -> Model:
    spec = ModelSpec("cifar-resnet20", "demo.cifar:resnet20", PREPROCESSING, CLASS_NAMES, "a" * 64)
    return models.build(spec, load_file(real_data() / "cifar10" / "resnet20.safetensors"))


@pytest.fixture(scope="session")
def bcos() -> Model:
    spec = ModelSpec("bcos", "bcos:cifar10_resnet20", Preprocessing(32, 32, inverse=True), CLASS_NAMES, "b" * 64)
    spec = replace(spec, options={"num_classes": 10})
    return models.build(spec, load_file(real_data() / "cifar10" / "bcos_resnet20.safetensors"))


@pytest.fixture(scope="session")
def views() -> NDArray[np.uint8]:
    """Two test images of each class in order, uint8 ``[20, 32, 32, 3]``."""
    folders = sorted((real_data() / "cifar10" / "test").iterdir())
    paths = [path for folder in folders for path in sorted(folder.glob("*.jpg"))[:2]]
    return np.stack([PREPROCESSING.fit(Image.open(path).convert("RGB"))[0] for path in paths])


def make_bank(model: Model, views: NDArray[np.uint8], layer: str, *, per_class: bool = True) -> Bank:
    """Make concepts of means of random groups of real positions: non-negative, overlapping, on the data's own scale."""
    cut = model.cut(layer)
    positions = cut.positions(cut.trunk(model.inputs(views))).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    counts = [3 + index % 4 for index in range(len(CLASS_NAMES)) if index != WITHOUT_CONCEPTS]
    groups = torch.randint(len(positions), (sum(counts), 4), generator=generator)
    owners = [index for index, count in enumerate(counts) for _ in range(count)]
    return Bank(
        kind="nmf",
        model=model.spec.name,
        layer=layer,
        name="small",
        weights_digest=model.spec.weights_digest,
        channels=positions.shape[1],
        concepts=tuple(
            Concept(index, label=f"concept {index}", class_index=owner if per_class else None)
            for index, owner in enumerate(owners)
        ),
        tensors={"dictionary": positions[groups].mean(1)},
    )


@pytest.fixture(scope="session")
def bank(model: Model, views: NDArray[np.uint8]) -> Bank:
    """Three to six concepts for each class but the last, at ``layer3``, where the head is affine."""
    return make_bank(model, views, "layer3")


@pytest.fixture(scope="session")
def early_bank(model: Model, views: NDArray[np.uint8]) -> Bank:
    """The same at ``layer2``, where the head is not linear."""
    return make_bank(model, views, "layer2")
