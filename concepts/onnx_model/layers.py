"""Operators with weights or windows: convolutions, pools, normalisations and products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from concepts.onnx_model.numbers import Table, refuse_unless

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_MAX_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


class _Windows(NamedTuple):
    """Where windows lie on the spatial axes."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    """Padding at the start of each axis."""
    after: list[int]

    @property
    def symmetric(self) -> bool:
        return self.before == self.after


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
) -> _Windows:
    rank = x.ndim - 2
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * (2 * rank)
    before, after = list(pads[:rank]), list(pads[rank:])
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        total = [
            max((-(-length // stride) - 1) * stride + span - length, 0)
            for length, stride, span in zip(x.shape[2:], strides, spans, strict=True)
        ]
        less, more = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
        before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    elif auto_pad == "VALID":
        before = after = [0] * rank
    return _Windows(list(kernel), list(strides), list(dilations), before, after)


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the spatial axes, or crop them where the numbers are negative."""
    pads = [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]
    return functional.pad(x, pads, value=value) if any(pads) else x


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    windows = _windows(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    padding = windows.before if windows.symmetric else 0
    if not windows.symmetric:
        x = _padded(x, windows.before, windows.after)
    return _CONVOLUTIONS[x.ndim - 2](x, weight, bias, windows.strides, padding, windows.dilations, group)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    whole = _TRANSPOSED[rank](x, weight, bias, strides, 0, 0, group, dilations)
    before, after = list((pads or [0] * (2 * rank))[:rank]), list((pads or [0] * (2 * rank))[rank:])
    extra = output_padding or [0] * rank
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [length * stride for length, stride in zip(x.shape[2:], strides, strict=True)]
    if output_shape is not None:
        total = [a + b - c for a, b, c in zip(whole.shape[2:], extra, output_shape, strict=True)]
        less, more = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
        before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    cropped = [b - a for a, b in zip(after, extra, strict=True)]
    return _padded(whole, [-pad for pad in before], cropped)


def _with_ceil(x: Tensor, windows: _Windows) -> _Windows:
    """Pad the ends so far that a last window fits that only begins within the image."""
    after = []
    for axis, length in enumerate(x.shape[2:]):
        span = (windows.kernel[axis] - 1) * windows.dilations[axis] + 1
        stride, start = windows.strides[axis], windows.before[axis]
        steps = -(-(length + start + windows.after[axis] - span) // stride)
        if steps * stride >= length + start:
            steps -= 1
        after.append(max(steps * stride + span - length - start, windows.after[axis]))
    return windows._replace(after=after)


def _max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor:
    windows = _windows(x, kernel_shape, strides, dilations, pads, auto_pad)
    windows = _with_ceil(x, windows) if ceil_mode else windows
    padding: list[int] | int = windows.before
    if not windows.symmetric or any(2 * pad > size for pad, size in zip(windows.before, kernel_shape, strict=True)):
        x, padding = _padded(x, windows.before, windows.after, -math.inf), 0
    return _MAX_POOLS[x.ndim - 2](x, windows.kernel, windows.strides, padding, windows.dilations)


def _average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    exact = _windows(x, kernel_shape, strides, dilations, pads, auto_pad)
    windows = _with_ceil(x, exact) if ceil_mode else exact
    plain = windows.symmetric and set(windows.dilations) == {1} and windows == exact
    if plain and all(2 * pad <= size for pad, size in zip(windows.before, kernel_shape, strict=True)):
        pool = _AVERAGE_POOLS[x.ndim - 2]
        return pool(x, windows.kernel, windows.strides, windows.before, False, bool(count_include_pad))
    # Every window's sum over the number of places that count in it.
    counts = x.new_ones(1, 1, *x.shape[2:])
    if count_include_pad:
        counts = _padded(counts, exact.before, exact.after, 1.0)
        counts = _padded(counts, [0] * len(exact.after), _less(windows.after, exact.after))
    else:
        counts = _padded(counts, windows.before, windows.after)
    sums = _window_sums(_padded(x, windows.before, windows.after), windows)
    return sums / _window_sums(counts, windows)


def _less(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [i - j for i, j in zip(a, b, strict=True)]


def _window_sums(x: Tensor, windows: _Windows) -> Tensor:
    """Return each window's sum, channel by channel."""
    ones = x.new_ones(1, 1, *windows.kernel)
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONVOLUTIONS[x.ndim - 2](planes, ones, None, windows.strides, 0, windows.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    refuse_unless(not training_mode, "BatchNormalization in training mode")
    return functional.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


def _affine(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if scale is None else x * scale
    return x if bias is None else x + bias


def _layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return functional.layer_norm(x, shape, scale, bias, epsilon)
    return _affine(functional.layer_norm(x, shape, eps=epsilon), scale, bias)


def _rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return functional.rms_norm(x, x.shape[axis:], eps=epsilon) * scale


def _instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return functional.group_norm(x, x.shape[1], scale, bias, epsilon)


def _group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    # Until opset 21 there is one number for each group, and not for each channel.
    repeats = x.shape[1] // len(scale)
    scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


def _lrn(x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int) -> Tensor:
    around = [0, 0] * (x.ndim - 2) + [(size - 1) // 2, size // 2]
    sums = functional.pad(x.square(), around).unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * sums) ** beta


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 1,
) -> Tensor:
    refuse_unless(not softcap, "Attention with a soft cap")
    refuse_unless(not is_causal or mask is None, "Attention with a mask of its own that is causal as well")
    merged = query.ndim == 3
    if merged:
        query = query.unflatten(2, (q_num_heads or 1, -1)).transpose(1, 2)
        key, value = (x.unflatten(2, (kv_num_heads or 1, -1)).transpose(1, 2) for x in (key, value))
    mask = mask if mask is None else mask.to(query.device)
    grouped = query.shape[1] != key.shape[1]
    answer = functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=bool(is_causal), scale=scale, enable_gqa=grouped
    )
    return answer.transpose(1, 2).flatten(2) if merged else answer


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    a, b = a.T if transA else a, b.T if transB else b
    return alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha)


def _einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *tensors)


LAYERS: Table = {
    "Attention": _attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_normalization,
}
