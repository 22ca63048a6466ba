"""The models the demo publishes: what each is, where its weights lie and how it wants its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from concepts.architectures import build
from concepts.preprocessing import Preprocessing
from demo.attributes import CLASS_NAMES

WEIGHTS = Path(__file__).parent / "weights"
CLIP = WEIGHTS / "clip"
"""The CLIP that was trained on the world's captions; see `demo.train_clip`."""
_CENTRED = Preprocessing(64, 64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@dataclass(frozen=True)
class DemoModel:
    """One model of the demo."""

    name: str
    architecture: str
    """As `concepts.architectures.build` takes it, with the option ``num_classes``."""
    weights: Path
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    layers: tuple[str, ...]
    """Good places to cut, best first."""
    nonnegative: bool
    """Whether the activations there are non-negative, so that they can be factorised."""

    def load(self) -> nn.Module:
        """Build the network with its weights, in evaluation mode."""
        network = build(self.architecture, {"num_classes": len(self.class_names)})
        network.load_state_dict(load_file(self.weights))
        return network


MODELS = MappingProxyType(
    {
        "cnn": DemoModel(
            "cnn", "demo.networks:cnn", WEIGHTS / "cnn.safetensors", _CENTRED, CLASS_NAMES, ("stage3", "stage2"), True
        ),
        "bcos": DemoModel(
            "bcos",
            "demo.networks:bcos",
            WEIGHTS / "bcos.safetensors",
            Preprocessing(64, 64, inverse=True),
            CLASS_NAMES,
            ("stage3", "stage2"),
            False,
        ),
        "vit": DemoModel(
            "vit",
            "demo.networks:vit",
            WEIGHTS / "vit.safetensors",
            _CENTRED,
            CLASS_NAMES,
            ("encoder.layers.relu",),
            True,
        ),
    }
)
"""The models trained on the known-concepts world, by name."""


def predict(model: DemoModel, network: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the logits, float32 [n, classes], of RGB images [n, 64, 64, 3] of a network on any device."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits: NDArray[np.float32] = (
            network(model.preprocessing.normalize(torch.from_numpy(images).to(device))).cpu().numpy()
        )
    return logits
