"""ONNX's operators as functions of torch tensors: inputs by position, attributes by name.

All functions of floating-point numbers can be differentiated and leave their inputs alone. What later opsets made an
input of and earlier ones an attribute has the same name in both, so that one function serves them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import NodeProto, TensorProto

from concepts.onnx_model.elementwise import ELEMENTWISE
from concepts.onnx_model.layers import LAYERS
from concepts.onnx_model.numbers import Operator, Table
from concepts.onnx_model.resizing import RESIZING
from concepts.onnx_model.shapes import SHAPES, to_tensor

OPERATORS: Table = {**ELEMENTWISE, **LAYERS, **RESIZING, **SHAPES}
"""All that are known."""


def operator(name: str, opset: int) -> Operator:
    """Return the function of an operator as an opset means it."""
    found = OPERATORS[name]
    return found[max(since for since in found if since <= opset)] if isinstance(found, Mapping) else found


def attributes(node: NodeProto) -> dict[str, object]:
    """Return a node's attributes as its operator's function takes them."""
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for name, value in found.items():
        if isinstance(value, TensorProto):
            found[name] = to_tensor(value)
        elif isinstance(value, bytes):
            found[name] = value.decode()
    if node.op_type == "Split":  # before opset 18, the outputs alone say how many parts there are
        found.setdefault("num_outputs", len(node.output))
    return found
