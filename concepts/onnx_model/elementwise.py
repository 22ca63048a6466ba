"""Operators that work on each number for itself, and reductions of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from concepts.onnx_model.numbers import Integers, Table, integers, number, together


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: function(*together(a, b))


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: reduce(function, together(*tensors))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    a, b = together(a, b)
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _mean(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, together(*tensors)) / len(tensors)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    condition, a, b = together(condition, a, b)
    return torch.where(condition, a, b)


def _clip(
    x: Tensor,
    min: float | Tensor | None = None,  # noqa: A002 - ONNX's own names
    max: float | Tensor | None = None,  # noqa: A002
) -> Tensor:
    if min is None and max is None:
        return x
    return torch.clamp(x, None if min is None else number(min), None if max is None else number(max))


def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return functional.leaky_relu(x, alpha)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.elu(x, alpha)


def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.celu(x, alpha)


def _selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * functional.elu(x, alpha)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _softmax_of(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    return lambda x, *, axis=-1: function(x, axis)


def _old_softmax_of(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """Before opset 13, all axes from the given one on are one."""
    return lambda x, *, axis=1: function(x.flatten(axis), -1).reshape(x.shape)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """Return an ONNX reduction from one over listed axes."""

    def reduction(
        x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        chosen = integers(axes) if axes is not None else []
        if not chosen and noop_with_empty_axes:
            return function(x.unsqueeze(0), [0], False)
        return function(x, [axis % x.ndim for axis in chosen] or list(range(x.ndim)), bool(keepdims))

    return reduction


def _product(x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep)
    return x


ELEMENTWISE: Table = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Add": _pair(torch.add),
    "And": _pair(torch.logical_and),
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Celu": _celu,
    "Clip": _clip,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Div": _pair(_divide),
    "Elu": _elu,
    "Equal": _pair(torch.eq),
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gelu": _gelu,
    "Greater": _pair(torch.gt),
    "GreaterOrEqual": _pair(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan,
    "LeakyRelu": _leaky_relu,
    "Less": _pair(torch.lt),
    "LessOrEqual": _pair(torch.le),
    "Log": torch.log,
    "LogSoftmax": {1: _old_softmax_of(torch.log_softmax), 13: _softmax_of(torch.log_softmax)},
    "Max": _many(torch.maximum),
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mish": functional.mish,
    "Mod": _modulo,
    "Mul": _pair(torch.mul),
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": _pair(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _pair(_power),
    "Reciprocal": torch.reciprocal,
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceLogSum": _reduction(lambda x, axes, keep: x.sum(axes, keep).log()),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(torch.sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": torch.relu,
    "Round": torch.round,
    "Selu": _selu,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softmax": {1: _old_softmax_of(torch.softmax), 13: _softmax_of(torch.softmax)},
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Sub": _pair(torch.sub),
    "Sum": _many(torch.add),
    "Swish": _swish,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
    "Xor": _pair(torch.logical_xor),
}
