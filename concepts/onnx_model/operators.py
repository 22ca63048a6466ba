"""ONNX's operators as functions of torch tensors: inputs by position, attributes by name.

All functions of floating-point numbers can be differentiated and leave their inputs alone. What later opsets made an
input of and earlier ones an attribute has the same name in both, so that one function serves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from concepts.onnx_model.elementwise import ELEMENTWISE
from concepts.onnx_model.layers import LAYERS
from concepts.onnx_model.resizing import RESIZING
from concepts.onnx_model.shapes import SHAPES

Operator = Callable[..., Tensor | tuple[Tensor, ...]]

OPERATORS: dict[str, Any] = {**ELEMENTWISE, **LAYERS, **RESIZING, **SHAPES}
"""By name: a function, or functions by the opset that each came with."""


def operator(name: str, opset: int) -> Operator:
    """Return the function of an operator as an opset means it."""
    found: Operator | dict[int, Operator] = OPERATORS[name]
    return found[max(since for since in found if since <= opset)] if isinstance(found, dict) else found
