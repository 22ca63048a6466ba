"""Making an ONNX file of a PyTorch model, for ONNX Runtime, and checking that it is the same model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from concepts.cut import RELATIVE_TOLERANCE
from concepts.errors import InvalidModel
from concepts.model import Model
from concepts.onnx_model.file import OnnxFile
from concepts.trace import outputs

_IMAGES, _LOGITS, _LAYER = "images", "logits", "layer:"
_LARGEST_BYTES = 2**31 - 1
"""What an ONNX file can hold without further files."""


class Export(NamedTuple):
    """An ONNX file of a model, and where its layers are in it."""

    content: bytes
    values: dict[str, str]
    """By layer, the name of its activation in the file."""


def export(model: Model) -> Export:
    """Return a model as an ONNX file that was checked against it, at the logits and at every layer that can be cut.

    Raises
    ------
    InvalidModel
        If PyTorch cannot export it, the file would exceed 2 GiB, or ONNX Runtime computes anything else with it.
    """
    layers = [layer.name for layer in model.layers()]
    proto = _exported(model, layers)
    _compare(model, proto, layers)
    values = {layer: _source(proto, _LAYER + layer) for layer in layers}
    del proto.graph.output[1:]
    content = proto.SerializeToString()
    served = {name for node in OnnxFile.parse(content).model.graph.node for name in node.output}
    return Export(content, {layer: value for layer, value in values.items() if value in served})


class _WithLayers(nn.Module):
    """A model that also answers what its layers answered."""

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.module, self._layers = module, layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits, found = outputs(self.module, self._layers, x)
        return logits, *(found[layer] for layer in self._layers)


def _exported(model: Model, layers: Sequence[str]) -> ModelProto:
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                _WithLayers(model.module, layers).eval(),
                (model.example(),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                input_names=[_IMAGES],
                output_names=[_LOGITS, *(_LAYER + layer for layer in layers)],
                verbose=False,
            )
        proto: ModelProto = program.model_proto  # type: ignore[union-attr]  # None is the old exporter's
    except Exception as error:
        raise InvalidModel(
            f"PyTorch cannot export model {model.spec.name!r} to ONNX ({type(error).__name__}): add it without --onnx",
            model=model.spec.name,
        ) from error
    if proto.ByteSize() > _LARGEST_BYTES:
        raise InvalidModel(f"model {model.spec.name!r} is too large for one ONNX file: add it without --onnx")
    return proto


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's own warnings, logs and dumps of graphs from people: what counts of them is in our errors."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _compare(model: Model, proto: ModelProto, layers: Sequence[str]) -> None:
    """Run both on images that the export has not seen, more of them than it was made with."""
    x = model.example().flip(0, 3)[[0, 1, 0]].cpu()
    found = _run(model, proto, x)
    with torch.no_grad():
        expected = _WithLayers(model.module, layers)(x.to(model.device))
    for name, one, other in zip([_LOGITS, *layers], found, expected, strict=True):
        same = one.shape == tuple(other.shape)
        difference = (torch.from_numpy(one) - other.cpu()).abs().max() if same else torch.tensor(torch.inf)
        error = difference / other.abs().max().cpu().clamp_min(1e-12)
        if not bool(error <= RELATIVE_TOLERANCE):
            raise InvalidModel(
                f"ONNX Runtime computes {name!r} of model {model.spec.name!r} otherwise than PyTorch "
                f"(relative error {error:.1e}): add it without --onnx",
                model=model.spec.name,
            )


def _run(model: Model, proto: ModelProto, x: Tensor) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        answers: list[NDArray[np.float32]] = session.run(None, {_IMAGES: x.numpy()})
    except Exception as error:
        raise InvalidModel(
            f"ONNX Runtime cannot run model {model.spec.name!r} ({type(error).__name__}): add it without --onnx",
            model=model.spec.name,
        ) from error
    return answers


def _source(proto: ModelProto, value: str) -> str:
    """Return the value that an output repeats: one that the logits are computed from."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    while value in producers and producers[value].op_type == "Identity":
        value = producers[value].input[0]
    return value
