"""Resizing of images and feature maps, axis by axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from concepts.onnx_model.numbers import Integers, Table, integers, refuse_unless

_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Integers | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    refuse_unless(mode in ("nearest", "linear"), f"Resize with mode {mode!r}")
    refuse_unless(not antialias, "Resize with antialiasing")
    refuse_unless(keep_aspect_ratio_policy == "stretch", f"Resize with policy {keep_aspect_ratio_policy!r}")
    chosen = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes]
    if sizes is not None:
        lengths = integers(sizes)
        factors = [length / x.shape[axis] for length, axis in zip(lengths, chosen, strict=True)]
    else:
        factors = [] if scales is None else scales.flatten().tolist()
        lengths = [int(x.shape[axis] * factor) for factor, axis in zip(factors, chosen, strict=True)]
    for axis, length, factor in zip(chosen, lengths, factors, strict=True):
        if factor != 1:
            at = _coordinates(length, factor, x.shape[axis], coordinate_transformation_mode)
            rounding = ("ceil" if factor < 1 else "floor") if nearest_mode == "simple" else nearest_mode
            x = _linear(x, axis, at) if mode == "linear" else _nearest(x, axis, _ROUNDINGS[rounding](at))
    return x


def _early_resize(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Resize as of opset 10, and Upsample."""
    return _resize(x, None, scales, coordinate_transformation_mode="asymmetric", mode=mode, nearest_mode="simple")


def _coordinates(length: int, factor: float, before: int, mode: str) -> Tensor:
    """Return where each place of the result lies on an axis of what is resized, float32 as in ONNX Runtime."""
    places = torch.arange(length, dtype=torch.float32)
    scale = torch.tensor(factor, dtype=torch.float32)
    if mode == "asymmetric":
        return places / scale
    if mode == "align_corners":
        return places * (before - 1) / max(length - 1, 1)
    if mode == "tf_half_pixel_for_nn":
        return (places + 0.5) / scale
    if mode == "pytorch_half_pixel" and length == 1:
        return torch.zeros(1)
    half = (places + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        return half + before / 2 * (1 - length / (factor * before))
    refuse_unless(mode in ("half_pixel", "pytorch_half_pixel"), f"Resize with coordinates {mode!r}")
    return half


def _nearest(x: Tensor, axis: int, at: Tensor) -> Tensor:
    return x.index_select(axis, at.clamp(0, x.shape[axis] - 1).long().to(x.device))


def _linear(x: Tensor, axis: int, at: Tensor) -> Tensor:
    at = at.clamp(0, x.shape[axis] - 1)
    low = at.floor()
    share = (at - low).to(x).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return _nearest(x, axis, low) * (1 - share) + _nearest(x, axis, low + 1) * share


RESIZING: Table = {
    "Resize": {10: _early_resize, 11: _resize},
    "Upsample": _early_resize,
}
