"""Small ONNX classifiers, written in ONNX's own text form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor

CNN = """
    c = Conv <pads=[1, 1, 1, 1]> (image, filters)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    logits = Gemm <transB=1> (f, classes, constant)
"""
"""Body of a network of six channels and five classes."""


def weights(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


CNN_WEIGHTS = {"filters": weights(6, 3, 3, 3), "classes": weights(5, 6), "constant": weights(5)}


def model(
    body: str = CNN,
    *,
    image: str = "float[N, 3, 8, 8] image",
    output: str = "float[N, 5] logits",
    opset: int = 18,
    ir_version: int = 8,
    **initializers: Any,
) -> ModelProto:
    """Return a model with the network's own weights and others, whether or not it needs them."""
    parsed = onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> classifier ({image}) => ({output}) {{ {body} }}'
    )
    for name, value in (CNN_WEIGHTS | initializers).items():
        parsed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return parsed


def content(body: str = CNN, **options: Any) -> bytes:
    """Return the bytes of a file; parameters as of ``model``."""
    return model(body, **options).SerializeToString()


def reference(file: bytes, x: Tensor) -> list[Tensor]:
    """Return what ONNX Runtime answers."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(answer) for answer in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(weights(*shape, seed=seed + 100))
