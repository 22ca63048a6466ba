"""A small real repository: ResNet-20 with its weights, and banks made of real activations in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from concepts.bank import Bank, Concept
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from demo import cifar
from tests.data import real_data

MODEL = "cifar-resnet20"
LAYER = "layer3"
BANK = f"{MODEL}/{LAYER}/quick"
PER_CLASS = 4
"""Concepts of each class."""


def held_out(per_class: int = 1) -> list[Path]:
    """Return held-out images, the same number of every class."""
    folders = sorted((real_data() / "cifar10" / "test").iterdir())
    return [path for folder in folders for path in sorted(folder.glob("*.jpg"))[:per_class]]


def publish_model(root: Path) -> ModelSpec:
    """Store ResNet-20."""
    spec = ModelSpec(MODEL, "demo.cifar:resnet20", cifar.PREPROCESSING, cifar.CLASS_NAMES, "")
    weights = load_file(real_data() / "cifar10" / "resnet20.safetensors")
    # The file leaves out how many batches were seen in training.
    return Repository(root).publish_model(spec, {**cifar.resnet20().state_dict(), **weights})


def publish_bank(root: Path, name: str = "quick", seed: int = 0) -> Bank:
    """Freeze a bank of the stored ResNet-20 whose concepts are activations of real images, a few for each class."""
    repository = Repository(root)
    model = repository.load_model(MODEL)
    images = held_out(per_class=PER_CLASS)
    views = np.stack([model.spec.preprocessing.fit(Image.open(path).convert("RGB"))[0] for path in images])
    cut = model.cut(LAYER)
    with torch.no_grad():
        positions = cut.positions(cut.trunk(model.inputs(views)))
    rows = torch.randint(positions.shape[1], (len(images),), generator=torch.Generator().manual_seed(seed))
    dictionary = positions[torch.arange(len(images)), rows]
    classes = [index // PER_CLASS for index in range(len(images))]
    return repository.publish(
        Bank(
            kind="nmf",
            model=MODEL,
            layer=LAYER,
            name=name,
            weights_digest=model.spec.weights_digest,
            channels=dictionary.shape[1],
            concepts=tuple(
                Concept(
                    index, f"part of {path.parent.name} {path.stem}", class_index, {"importance": 1.0 / (index + 1)}
                )
                for index, (path, class_index) in enumerate(zip(images, classes, strict=True))
            ),
            tensors={"dictionary": dictionary},
            metrics={"seed": seed},
            configuration={"seed": seed, "method": "activations"},
        )
    )


def publish_sae_bank(root: Path, latents: int = 96) -> str:
    """Store the B-cos ResNet-20 and a random sparse autoencoder, whose sums hold as any's do; return its reference."""
    repository, channels = Repository(root), 64
    preprocessing = Preprocessing(32, 32, inverse=True)
    spec = ModelSpec("bcos", "bcos:cifar10_resnet20", preprocessing, cifar.CLASS_NAMES, "", {"num_classes": 10})
    spec = repository.publish_model(spec, load_file(real_data() / "cifar10" / "bcos_resnet20.safetensors"))
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(2, latents, channels, generator=generator).unbind()
    bank = Bank(
        kind="sae",
        model=spec.name,
        layer=LAYER,
        name="sae",
        weights_digest=spec.weights_digest,
        channels=channels,
        concepts=tuple(Concept(index) for index in range(latents)),
        tensors={"encoder": encoder, "decoder": decoder / decoder.norm(dim=1, keepdim=True), "k": torch.tensor(8)},
    )
    return repository.publish(bank).reference
