"""Encoders that judge concepts from outside: networks that turn a view into features on a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from concepts.errors import InvalidInput
from concepts.model import Model
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository

_HUB = "hub:"
_DINO = "facebookresearch/dinov2"
_DINO_SIZE, _DINO_PATCH = 224, 14


@dataclass(frozen=True)
class Encoder:
    """Turns views of a model into an encoder's features."""

    name: str
    preprocessing: Preprocessing
    """Its own: views are resized to its size."""
    features: Callable[[Tensor], Tensor]
    """From its inputs ``[B, C, H, W]`` to ``[B, D, h, w]``."""
    device: torch.device

    def __call__(self, views: NDArray[np.uint8]) -> Tensor:
        """Return features float32 ``[B, D, h, w]`` of views uint8 ``[B, height, width, 3]``, on the CPU."""
        size = (self.preprocessing.width, self.preprocessing.height)
        fitted = np.stack([np.asarray(Image.fromarray(view).resize(size, Image.Resampling.BILINEAR)) for view in views])
        with torch.no_grad():
            inputs = self.preprocessing.normalize(torch.from_numpy(fitted).to(self.device))
            found: Tensor = self.features(inputs).float().cpu()
        return found


def open_encoder(reference: str, repository: Repository, device: torch.device) -> Encoder:
    """Return an encoder.

    Parameters
    ----------
    reference
        ``MODEL/LAYER`` of a model of the repository, PyTorch or ONNX; or ``hub:NAME`` for one of DINOv2's, fetched by
        ``torch.hub`` where that can be reached, e.g. ``hub:dinov2_vits14``.
    repository
        Where models are.
    device
        Where to compute.

    Raises
    ------
    InvalidInput
        If the reference has another form, or the hub cannot be reached.
    UnknownModel, UnknownLayer, InvalidCut
        If there is no such model or layer.
    """
    if reference.startswith(_HUB):
        return _from_hub(reference.removeprefix(_HUB), device)
    name, _, layer = reference.partition("/")
    if not layer:
        raise InvalidInput(f"encoder {reference!r} must be MODEL/LAYER of the repository, or hub:dinov2_vits14")
    model = repository.load_model(name, device)
    return of_model(model, layer)


def of_model(model: Model, layer: str) -> Encoder:
    """Return the encoder that a model is up to a layer."""
    cut = model.cut(layer)

    def features(x: Tensor) -> Tensor:
        positions = cut.positions(cut.trunk(x))[:, cut.layout.tokens :]
        return positions.mT.reshape(len(x), -1, *cut.layout.grid)

    return Encoder(f"{model.spec.name}/{layer}", model.spec.preprocessing, features, model.device)


def _from_hub(name: str, device: torch.device) -> Encoder:
    if not name.replace("_", "").isalnum():
        raise InvalidInput(f"{name!r} cannot be the name of a network in the hub")
    try:
        network = torch.hub.load(_DINO, name, trust_repo=True, verbose=False)
    except Exception as error:
        raise InvalidInput(
            f"{name!r} cannot be fetched from the hub: without network, name a model of the repository, MODEL/LAYER"
        ) from error
    network = network.eval().requires_grad_(False).to(device)
    side = _DINO_SIZE // _DINO_PATCH

    def features(x: Tensor) -> Tensor:
        tokens: Tensor = network.forward_features(x)["x_norm_patchtokens"]
        return tokens.mT.reshape(len(x), -1, side, side)

    view = Preprocessing(_DINO_SIZE, _DINO_SIZE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return Encoder(f"{_HUB}{name}", view, features, device)
