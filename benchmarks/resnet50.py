"""ResNet-50 with random weights and a bank of 25 concepts: the load that speed is measured on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from concepts.bank import Bank, Concept
from concepts.engine import Engine
from concepts.explanation import EngineRequest, ExplainOptions
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from concepts.runtimes import Runtime, open_trunk
from offline.export import export

LAYER = "layer4"
CONCEPTS = 25
REFERENCE = f"resnet50/{LAYER}/craft"


def publish(root: Path, *, exported: bool = False) -> Repository:
    """Publish the model, with its ONNX file if wanted, and an NMF bank of directions found in its activations."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    spec = ModelSpec(
        name="resnet50",
        architecture="torchvision:resnet50",
        preprocessing=Preprocessing(224, 224, 256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        class_names=tuple(f"class {index}" for index in range(1000)),
        weights_digest="",
    )
    repository = Repository(root)
    spec = repository.publish_model(spec, network.state_dict())
    if exported:
        onnx = export(repository.load_model("resnet50"))
        spec = repository.publish_model(spec, network.state_dict(), exported=onnx, replace=True)
    cut = repository.load_model("resnet50").cut(LAYER)
    with torch.no_grad():
        activations = cut.positions(cut.trunk(torch.randn(4, 3, 224, 224))).flatten(0, 1)
    dictionary = activations[torch.randperm(len(activations))[:CONCEPTS]].clone()
    concepts = tuple(Concept(index) for index in range(CONCEPTS))
    repository.publish(
        Bank("nmf", "resnet50", LAYER, "craft", spec.weights_digest, 2048, concepts, {"dictionary": dictionary})
    )
    return repository


@contextmanager
def repository(*, exported: bool = False) -> Iterator[tuple[Path, Repository]]:
    """Publish into a temporary folder; see ``publish``."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), publish(Path(folder), exported=exported)


def engines(
    repository: Repository, runtimes: Sequence[Runtime], device: torch.device | str = "cpu"
) -> dict[str, Engine]:
    """Return one engine a runtime, by what it says of itself; they share the network."""
    model = repository.load_model("resnet50", device)
    bank = repository.load(repository.resolve(REFERENCE))
    cut = model.cut(LAYER)
    trunks = [open_trunk(runtime, model, cut) for runtime in runtimes]
    return {trunk.description: Engine(model, bank, cut, trunk) for trunk in trunks}


def request() -> EngineRequest:
    """Return the options that speed is measured with: ten concepts, contributions and layer-grid maps."""
    return EngineRequest(options=ExplainOptions(top_k=10, maps=("activation", "contribution")))


def views(count: int) -> NDArray[np.uint8]:
    """Return images as the model sees them: uint8 ``[count, 224, 224, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
