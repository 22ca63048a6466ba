"""ResNet-50 with random weights, a bank of 25 NMF concepts and an SAE of 16,384: the load that speed is measured on."""

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
LATENTS, ACTIVE = 16_384, 16
NMF, SAE = f"NMF of {CONCEPTS}", f"SAE of {LATENTS}"
REFERENCE = f"resnet50/{LAYER}/craft"
BANKS = {NMF: REFERENCE, SAE: f"resnet50/{LAYER}/sae"}


def publish(root: Path, *, exported: bool = False) -> Repository:
    """Publish the model, with its ONNX file if wanted, and its banks: of found directions, and of random ones."""
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
    latents = torch.nn.functional.normalize(torch.randn(LATENTS, 2048), dim=1)
    tensors = {"encoder": latents, "decoder": latents.clone(), "k": torch.tensor(ACTIVE)}
    concepts = tuple(Concept(index) for index in range(LATENTS))
    repository.publish(Bank("sae", "resnet50", LAYER, "sae", spec.weights_digest, 2048, concepts, tensors))
    return repository


@contextmanager
def repository(*, exported: bool = False) -> Iterator[tuple[Path, Repository]]:
    """Publish into a temporary folder; see ``publish``."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), publish(Path(folder), exported=exported)


def engines(
    repository: Repository, runtimes: Sequence[Runtime], device: torch.device | str = "cpu"
) -> dict[tuple[str, str], Engine]:
    """Return one engine for each bank and runtime, by what they say of themselves; all share the network."""
    model = repository.load_model("resnet50", device)
    banks = {name: repository.load(repository.resolve(reference)) for name, reference in BANKS.items()}
    cut = model.cut(LAYER)
    trunks = [open_trunk(runtime, model, cut) for runtime in runtimes]
    return {
        (name, trunk.description): Engine(model, bank, cut, trunk) for name, bank in banks.items() for trunk in trunks
    }


def request() -> EngineRequest:
    """Return the options that speed is measured with: ten concepts, contributions and layer-grid maps."""
    return EngineRequest(options=ExplainOptions(top_k=10, maps=("activation", "contribution")))


def views(count: int) -> NDArray[np.uint8]:
    """Return images as the model sees them: uint8 ``[count, 224, 224, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
