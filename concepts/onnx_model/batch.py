"""Freeing the batch axis of files that were exported for one image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

_FREE = "batch"


def free_batch_axis(model: ModelProto) -> None:
    """Let a model that was exported for a batch of one take any batch, as far as shapes written down stand against it.

    Parameters
    ----------
    model
        Changed in place: the first axis of input and outputs, and reshapings to a constant shape that starts with 1.
        What else counts on one image shows when the model is tried with two.
    """
    graph = model.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        if axes and axes[0].dim_value == 1:
            axes[0].dim_param = _FREE
    written = {tensor.name for tensor in graph.initializer}
    shapes = _shapes(model)
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[0] in written or node.input[1] not in shapes:
            continue
        shape = _freed(shapes[node.input[1]], node)
        if shape is not None:
            name = f"{node.output[0]}_shape"
            while name in taken:
                name += "_"
            taken.add(name)
            graph.initializer.append(numpy_helper.from_array(shape, name))
            node.input[1] = name


def _shapes(model: ModelProto) -> dict[str, NDArray[np.int64]]:
    """Return the lists of whole numbers that are written down, by name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = {}
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                tensors[node.output[0]] = attribute.t
            elif attribute.name == "value_ints":
                shapes[node.output[0]] = np.array(attribute.ints, np.int64)
    lists = {n: t for n, t in tensors.items() if t.data_type == TensorProto.INT64 and len(t.dims) == 1}
    return shapes | {name: numpy_helper.to_array(tensor) for name, tensor in lists.items()}


def _freed(shape: NDArray[np.int64], node: NodeProto) -> NDArray[np.int64] | None:
    """Return a target shape with a free first axis, or None where it has none of length 1."""
    freed = shape.copy()
    if len(freed) < 2 or freed[0] != 1:
        return None
    if -1 not in freed:
        freed[0] = -1
        return freed
    if any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute):
        return None
    freed[0] = 0  # as long as the first axis of what is reshaped
    return freed
