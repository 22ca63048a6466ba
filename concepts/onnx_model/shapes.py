"""Operators that move numbers, or compute with shapes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from concepts.onnx_model.numbers import Integers, Table, counted, integers, number, refuse_unless, together

_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


def to_tensor(proto: TensorProto) -> Tensor:
    """Return a tensor of an ONNX file as one of torch."""
    refuse_unless(proto.data_type in _DTYPES, f"tensor {proto.name!r} is of another type than torch's")
    dtype = _DTYPES[proto.data_type]
    array = onnx.numpy_helper.to_array(proto)
    if dtype == torch.bfloat16:  # numpy's own types end at half precision
        array = array.astype("float32")
    return torch.from_numpy(array.copy()).to(dtype)


def _constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    if value is not None:
        return value
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_float if value_floats is None else value_floats, dtype=torch.float32)
    return torch.tensor(value_int if value_ints is None else value_ints, dtype=torch.int64)


def _constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    return (torch.zeros(1) if value is None else value).reshape(()).expand(integers(shape))


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    refuse_unless(to in _DTYPES, f"Cast to {TensorProto.DataType.Name(to)}")
    return x.to(_DTYPES[to])


def _cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(like.dtype)


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(x.shape[:axis].numel(), -1)


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = integers(shape)
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(sizes)])


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(range(x.ndim))[::-1] if perm is None else tuple(perm))


def _squeeze(x: Tensor, axes: Integers | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(integers(axes))


def _unsqueeze(x: Tensor, axes: Integers) -> Tensor:
    chosen = integers(axes)
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _concat(*tensors: Tensor, axis: int) -> Tensor:
    return torch.cat(together(*tensors), axis)


def _split(
    x: Tensor, split: Integers | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    if split is not None:
        return torch.split(x, integers(split), axis)
    length, parts = x.shape[axis], num_outputs or 1
    return torch.split(x, -(-length // parts), axis)  # all as long but the last


def _slice(
    x: Tensor, starts: Integers, ends: Integers, axes: Integers | None = None, steps: Integers | None = None
) -> Tensor:
    first, last = integers(starts), integers(ends)
    chosen = integers(axes) if axes is not None else list(range(len(first)))
    strides = integers(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, chosen, strides, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            index = [slice(None)] * x.ndim
            index[axis] = slice(places.start, max(places.stop, places.start), step)
            x = x[tuple(index)]
        else:  # torch has no steps backwards
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    if indices.ndim == 0 and indices.device.type == "cpu":
        return x.select(axis, int(indices))
    axis = axis % x.ndim
    flat = counted(indices, x.shape[axis], x).flatten()
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, counted(indices, x.shape[axis], x))


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    return x[(*_batch_indices(indices, batch_dims), *indices.to(x.device).unbind(-1))]


def _batch_indices(indices: Tensor, batch_dims: int) -> list[Tensor]:
    """Return, for each leading axis that data and indices share, the number of each place on it."""
    shape = indices.shape[:-1]
    return [
        torch.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        for axis in range(batch_dims)
    ]


def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    refuse_unless(reduction in ("none", "add"), f"ScatterND with reduction {reduction!r}")
    x, updates = together(x, updates)
    return x.index_put(indices.to(x.device).unbind(-1), updates.to(x.dtype), accumulate=reduction == "add")


def _pad(
    x: Tensor,
    pads: Integers,
    constant_value: Tensor | None = None,
    axes: Integers | None = None,
    *,
    mode: str = "constant",
    value: float = 0.0,
) -> Tensor:
    counts = integers(pads)
    chosen = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in integers(axes)]
    around = dict(zip(chosen, zip(counts[: len(chosen)], counts[len(chosen) :], strict=True), strict=True))
    if mode == "constant":
        fill = value if constant_value is None else number(constant_value)
        return functional.pad(x, [n for axis in reversed(range(x.ndim)) for n in around.get(axis, (0, 0))], value=fill)
    for axis, (before, after) in around.items():
        if before or after:
            places = _places(torch.arange(-before, x.shape[axis] + after), x.shape[axis], mode)
            x = x.index_select(axis, places.to(x.device))
    return x


def _places(places: Tensor, length: int, mode: str) -> Tensor:
    """Return which place of an axis stands at each place beyond its ends."""
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    refuse_unless(mode == "reflect", f"Pad with mode {mode!r}")
    period = max(2 * (length - 1), 1)
    return (length - 1) - (places % period - (length - 1)).abs()


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    images, channels, height, width = x.shape
    side = blocksize
    if mode == "CRD":
        return functional.pixel_shuffle(x, side)
    blocks = x.reshape(images, side, side, channels // side**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(images, -1, height * side, width * side)


def _space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    images, channels, height, width = x.shape
    side = blocksize
    blocks = x.reshape(images, channels, height // side, side, width // side, side)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(images, -1, height // side, width // side)


def _trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if upper else x.tril(diagonal)


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, integers(shape)))


def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(integers(repeats))


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(number(start), number(limit), number(delta), dtype=start.dtype)


def _dropout(x: Tensor, ratio: Tensor | float = 0.5, training_mode: Tensor | None = None, *, seed: int = 0) -> Tensor:
    refuse_unless(training_mode is None or not training_mode, "Dropout in training mode")
    return x


SHAPES: Table = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": lambda x: x,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
