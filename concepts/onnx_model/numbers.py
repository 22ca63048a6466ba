"""What operators share: their type, and reading numbers out of attributes and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from concepts.errors import InvalidModel

Operator = Callable[..., Tensor | tuple[Tensor, ...]]
"""An operator of ONNX: inputs by position, attributes by name."""

Table = Mapping[str, Operator | Mapping[int, Operator]]
"""Operators by name: a function, or functions by the opset that each came with."""

Integers = Sequence[int] | Tensor
"""Numbers of an attribute, or of an input where a later opset made one of it."""


def integers(values: Integers) -> list[int]:
    """Return numbers as Python's own, whether they came as an attribute or as a tensor."""
    return [int(value) for value in (values.flatten().tolist() if isinstance(values, Tensor) else values)]


def number(value: float | Tensor) -> float:
    """Return one number as Python's own."""
    return value.item() if isinstance(value, Tensor) else value


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Move tensors to where the first one is that is not on the CPU.

    What is computed from shapes stays on the CPU, and meets the activations here. Single numbers need no moving.
    """
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None:
        return tensors
    return tuple(tensor if tensor.ndim == 0 else tensor.to(device) for tensor in tensors)


def counted(indices: Tensor, length: int, data: Tensor) -> Tensor:
    """Return indices beside the data, those below zero counted from the end."""
    indices = indices.to(data.device, torch.int64)
    return torch.where(indices < 0, indices + length, indices)


def refuse_unless(condition: bool, message: str) -> None:
    """Raise InvalidModel for a variant of an operator that is not known here."""
    if not condition:
        raise InvalidModel(f"{message}; that is not known here: export the model without it")
