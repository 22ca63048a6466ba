"""What several tests train on: a repository with a real model, and a few real images."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file

from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from demo.cifar import CLASS_NAMES, PREPROCESSING
from tests.data import real_data

MODEL = "cifar-resnet20"


def cifar() -> Path:
    return real_data() / "cifar10"


def repository(root: Path) -> Repository:
    """Return a repository with ResNet-20 for CIFAR-10."""
    files = Repository(root)
    spec = ModelSpec(MODEL, "demo.cifar:resnet20", PREPROCESSING, CLASS_NAMES, "")
    files.publish_model(spec, load_file(cifar() / "resnet20.safetensors"))
    return files


def add_bcos(files: Repository) -> str:
    """Add the B-cos ResNet-20, whose activations take any sign."""
    spec = ModelSpec(
        "bcos", "bcos:cifar10_resnet20", Preprocessing(32, 32, inverse=True), CLASS_NAMES, "", {"num_classes": 10}
    )
    files.publish_model(spec, load_file(cifar() / "bcos_resnet20.safetensors"))
    return spec.name


def some_images(target: Path, split: str, per_class: dict[str, int]) -> Path:
    """Copy the first images of some classes."""
    for name, count in per_class.items():
        (target / name).mkdir(parents=True)
        for path in sorted((cifar() / split / name).iterdir())[:count]:
            shutil.copy(path, target / name)
    return target
