"""Freeing the batch axis of files that were exported for one image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node

from concepts.onnx_model.inference import value_infos

_FREE = "batch"


def free_batch_axis(model: ModelProto) -> None:
    """Let a model that was exported for a batch of one take any batch, as far as that can be told from its nodes.

    Three things stand against it: the declared shapes, reshapings to a constant shape, and constants such as a class
    token that are joined to each image's values. What else counts on one image shows when two are tried.

    Parameters
    ----------
    model
        Changed in place.
    """
    graph = model.graph
    ranks = _ranks(model)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        if axes and axes[0].dim_value == 1:
            axes[0].dim_param = _FREE
    shapes = _written_shapes(graph)
    images = {graph.input[0].name}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if images.intersection(node.input):
            if node.op_type == "Reshape" and node.input[0] in images and node.input[1] in shapes:
                _free_reshape(graph, node, shapes[node.input[1]])
            elif node.op_type == "Concat":
                nodes += _widenings(graph, node, images, ranks)
            images.update(node.output)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _ranks(model: ModelProto) -> dict[str, int]:
    """Return the number of axes of the values whose first axis has length 1."""
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for name, info in value_infos(model).items():
        shapes[name] = [axis.dim_value for axis in info.type.tensor_type.shape.dim]
    return {name: len(shape) for name, shape in shapes.items() if shape and shape[0] == 1}


def _written_shapes(graph: GraphProto) -> dict[str, NDArray[np.int64]]:
    """Return the lists of whole numbers that are written down, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {}
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                tensors[node.output[0]] = attribute.t
            elif attribute.name == "value_ints":
                shapes[node.output[0]] = np.array(attribute.ints, np.int64)
    lists = {name: tensor for name, tensor in tensors.items() if tensor.data_type == TensorProto.INT64}
    return shapes | {name: numpy_helper.to_array(tensor) for name, tensor in lists.items() if len(tensor.dims) == 1}


def _free_reshape(graph: GraphProto, node: NodeProto, shape: NDArray[np.int64]) -> None:
    """Leave the length of the first axis open, where it is the one that the batch is part of."""
    zero_is_zero = any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
    freed = shape.copy()
    if -1 not in shape and len(shape) > 1 and shape[0] != 0:
        freed[0] = -1
    elif -1 in shape[1:] and shape[0] == 1 and not zero_is_zero:
        freed[0] = 0  # as long as the first axis of what is reshaped
    else:
        return
    node.input[1] = _add(graph, f"{node.output[0]}/free_batch/shape", freed)


def _widenings(graph: GraphProto, node: NodeProto, images: set[str], ranks: Mapping[str, int]) -> Iterator[NodeProto]:
    """Yield nodes that repeat, for every image, the constants that a node joins to the images' values."""
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    like = next(name for name in node.input if name in images)
    for position, name in enumerate(node.input):
        if name in images or axis % ranks.get(name, 1) == 0:
            continue
        base = f"{node.output[0]}/free_batch/{position}"
        zero = _add(graph, f"{base}_zero", np.zeros(1, np.int64))
        ones = _add(graph, f"{base}_ones", np.ones(ranks[name] - 1, np.int64))
        yield make_node("Shape", [like], [f"{base}_like"])
        yield make_node("Gather", [f"{base}_like", zero], [f"{base}_batch"])
        yield make_node("Concat", [f"{base}_batch", ones], [f"{base}_shape"], axis=0)
        yield make_node("Expand", [name, f"{base}_shape"], [f"{base}_each"])
        node.input[position] = f"{base}_each"


def _add(graph: GraphProto, name: str, value: NDArray[np.int64]) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name
