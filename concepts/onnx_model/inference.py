"""What ONNX can tell of the types and shapes of values without running anything."""

from __future__ import annotations

import math

from onnx import ModelProto, ValueInfoProto, shape_inference
from onnx.helper import make_graph, make_model, make_tensor_value_info

_LARGEST_SHAPE = 64
"""Elements of a constant that may still say something of a shape; larger ones are weights."""


def value_infos(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Return types and shapes of values by name, those of weights left out.

    Parameters
    ----------
    model
        Left as it is. Its weights are not copied, which is what takes long in large models.
    """
    graph = model.graph
    weights = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > _LARGEST_SHAPE]
    light = make_graph(
        graph.node,
        graph.name,
        [*graph.input, *(make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in weights)],
        graph.output,
        [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= _LARGEST_SHAPE],
        value_info=graph.value_info,
    )
    inferred = shape_inference.infer_shapes(
        make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version)
    ).graph
    return {info.name: info for info in (*inferred.value_info, *inferred.output)}
