"""Every operator against ONNX Runtime, and its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
    np_dtype_to_tensor_dtype,
)
from torch import Tensor

from concepts.errors import InvalidModel
from concepts.onnx_model.operators import OPERATORS, attributes, operator

Array = NDArray[Any]

NOT_COMPARED = {"CastLike"}
"""Tested below, by itself."""


NOT_DIFFERENTIABLE = {
    *("Cast", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Range", "Shape", "Size"),
    "Round",  # compared where it jumps
}


@dataclass(frozen=True)
class Case:
    """One use of an operator."""

    op: str
    inputs: tuple[Array | None, ...]
    attributes: dict[str, Any]
    opset: int
    outputs: int

    @property
    def node(self) -> NodeProto:
        names = ["" if value is None else f"i{position}" for position, value in enumerate(self.inputs)]
        return make_node(self.op, names, [f"o{position}" for position in range(self.outputs)], **self.attributes)

    def ours(self) -> Callable[..., Any]:
        return partial(operator(self.op, self.opset), **attributes(self.node))

    def reference(self) -> list[Array]:
        """Return what ONNX Runtime answers."""
        given = {f"i{position}": value for position, value in enumerate(self.inputs) if value is not None}
        inputs = [
            make_tensor_value_info(name, np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.node.output]
        model = make_model(
            make_graph([self.node], "case", inputs, outputs),
            opset_imports=[make_opsetid("", self.opset)],
            ir_version=10,
        )
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers: list[Array] = session.run(None, given)
        return answers


def values(given: Any, seed: int) -> Array | None:
    """Return an array: a tuple is a shape of standard normal numbers, a list whole numbers, a float one number."""
    if given is None or isinstance(given, np.ndarray):
        return given
    if isinstance(given, tuple):
        return np.random.default_rng(seed).standard_normal(given).astype(np.float32)
    return np.array(given, np.float32 if isinstance(given, float) else np.int64)


def case(op: str, *inputs: Any, opsets: tuple[int, ...] = (18,), outputs: int = 1, **options: Any) -> Iterator[Any]:
    arrays = tuple(values(given, seed) for seed, given in enumerate(inputs))
    for opset in opsets:
        shown = ",".join(f"{name}={value}" for name, value in options.items())
        yield pytest.param(Case(op, arrays, options, opset, outputs), id=f"{op}-{opset}-{shown}")


def positive(*shape: int) -> Array:
    return np.random.default_rng(7).uniform(0.3, 2, shape).astype(np.float32)


def flags(*shape: int) -> Array:
    return np.random.default_rng(8).uniform(size=shape) < 0.5


def floats(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


X = (2, 3, 5, 7)
"""Shape of the usual feature map."""

ALL = (9, 13, 18, 23)
ELEMENTWISE = [
    *(
        c
        for op in ("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "LeakyRelu", "Neg", "Relu")
        for c in case(op, X, opsets=(9, 18))
    ),
    *(
        c
        for op in ("Celu", "HardSwish", "Identity", "Mish", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus")
        for c in case(op, X)
    ),
    *(c for op in ("Softsign", "Tan", "Tanh", "ThresholdedRelu", "Sinh", "Cosh", "Atan") for c in case(op, X)),
    *(c for op in ("Log", "Sqrt", "Reciprocal") for c in case(op, positive(2, 3, 4))),
    *(c for op in ("Acos", "Asin") for c in case(op, positive(2, 3) / 3)),
    *(c for op in ("Add", "Sub", "Mul", "Div") for c in case(op, X, (3, 1, 1), opsets=ALL)),
    *(c for op in ("Add", "Sub", "Mul", "Div") for c in case(op, [7, -7, 9], [2, 2, -4])),
    *(c for op in ("Min", "Max", "Sum", "Mean") for c in case(op, X, (1, 3, 1, 7), (7,))),
    *(c for op in ("Min", "Max", "Sum", "Mean") for c in case(op, X)),
    *case("Celu", X, alpha=0.7),
    *case("Elu", X, alpha=0.7),
    *case("Gelu", X, opsets=(20, 23)),
    *case("Gelu", X, opsets=(20,), approximate="tanh"),
    *case("HardSigmoid", X, alpha=0.3, beta=0.4),
    *case("LeakyRelu", X, alpha=0.3),
    *case("Selu", X, alpha=1.5, gamma=1.2),
    *case("Swish", X, opsets=(24,), alpha=1.5),
    *case("ThresholdedRelu", X, alpha=0.2),
    *case("PRelu", X, (3, 1, 1)),
    *case("Round", floats(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)),
    *case("Pow", positive(2, 3), (3,)),
    *case("Pow", (2, 3), [2]),
    *case("Pow", [2, 3], [3, 2]),
    *case("Mod", [7, -7, 7], [3, 3, -3]),
    *case("Mod", (2, 3), positive(3), fmod=1),
    *case("Clip", X, opsets=(9,), min=-0.5, max=0.5),
    *case("Clip", X, opsets=(9,), min=0.0),
    *case("Clip", X, -0.5, 0.5, opsets=(11, 13)),
    *case("Clip", X, None, 0.5),
    *case("Clip", X),
    *case("Where", flags(2, 3, 1, 7), X, (5, 1)),
    *(c for op in ("Equal", "Greater", "Less") for c in case(op, [1, 2, 3], [3, 2, 1])),
    *(c for op in ("GreaterOrEqual", "LessOrEqual", "Greater") for c in case(op, (2, 3), (3,))),
    *(c for op in ("And", "Or", "Xor") for c in case(op, flags(4), flags(3, 1))),
    *case("Not", flags(5)),
    *case("IsNaN", floats(1, np.nan, np.inf)),
    *(c for op in ("Softmax", "LogSoftmax") for c in case(op, X, opsets=ALL)),
    *(c for op in ("Softmax", "LogSoftmax") for c in case(op, X, opsets=(9, 13), axis=2)),
    *case("Softmax", X, opsets=(11, 13), axis=-2),
]

REDUCTIONS = [
    *(
        c
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare")
        for c in (
            *case(op, X, opsets=(9, 13), axes=[2, 3], keepdims=0),
            *case(op, X, [-1, 1], opsets=(18, 23)),
            *case(op, X, opsets=(13, 18), keepdims=0),
        )
    ),
    *(c for op in ("ReduceLogSumExp", "ReduceLogSum") for c in case(op, positive(*X), opsets=(13,), axes=[-2])),
    *(c for op in ("ReduceLogSumExp", "ReduceLogSum") for c in case(op, positive(*X), [1, 2], keepdims=0)),
    *case("ReduceSum", X, opsets=(9, 11), axes=[1, -1]),
    *case("ReduceSum", X, [1, -1], opsets=(13, 18)),
    *case("ReduceSum", X, np.zeros(0, np.int64), noop_with_empty_axes=1),
    *case("ReduceMean", X, np.zeros(0, np.int64), noop_with_empty_axes=1),
    *case("ReduceMean", X, np.zeros(0, np.int64)),
]

SAME = ("SAME_UPPER", "SAME_LOWER")
CONVOLUTIONS = [
    *case("Conv", (2, 4, 7, 6), (6, 4, 3, 3), (6,), opsets=(9, 11, 22), pads=[1, 1, 1, 1]),
    *case("Conv", (2, 4, 7, 6), (6, 2, 3, 2), group=2, pads=[2, 0, 1, 1], strides=[2, 1], kernel_shape=[3, 2]),
    *case("Conv", (2, 4, 9, 8), (4, 1, 3, 3), group=4, dilations=[2, 2]),
    *(c for pad in SAME for c in case("Conv", (1, 2, 7, 6), (3, 2, 4, 3), (3,), auto_pad=pad, strides=[2, 3])),
    *(c for pad in SAME for c in case("Conv", (1, 2, 7, 6), (3, 2, 2, 2), auto_pad=pad)),
    *case("Conv", (1, 2, 7, 6), (3, 2, 3, 3), auto_pad="VALID", strides=[2, 2]),
    *case("Conv", (2, 4, 9), (3, 4, 3), (3,), pads=[1, 1], strides=[2]),
    *case("Conv", (2, 4, 9), (3, 4, 3), pads=[0, 1]),
    *case("Conv", (1, 2, 4, 5, 3), (3, 2, 2, 2, 2), pads=[1, 0, 0, 0, 1, 0]),
    *case("ConvTranspose", (2, 4, 5, 4), (4, 3, 3, 3), (3,), opsets=(9, 11, 22)),
    *case("ConvTranspose", (2, 4, 5, 4), (4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    *case("ConvTranspose", (2, 4, 5, 4), (4, 2, 3, 2), strides=[2, 3], pads=[0, 1, 2, 0], group=2),
    *case("ConvTranspose", (1, 2, 5, 4), (2, 3, 3, 3), dilations=[2, 2]),
    *case("ConvTranspose", (1, 2, 5, 4), (2, 3, 3, 3), strides=[2, 2], output_shape=[10, 8]),
    *(c for pad in SAME for c in case("ConvTranspose", (1, 2, 5, 4), (2, 3, 4, 3), strides=[2, 2], auto_pad=pad)),
    *case("ConvTranspose", (1, 2, 5), (2, 3, 3), strides=[2]),
]

POOLS = [
    *case("GlobalAveragePool", X),
    *case("GlobalAveragePool", (2, 3, 5)),
    *case("GlobalMaxPool", X),
    *(c for op in ("MaxPool", "AveragePool") for c in case(op, X, opsets=(9, 11, 19), kernel_shape=[3, 2])),
    *(
        c
        for op in ("MaxPool", "AveragePool")
        for c in (
            *case(op, X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
            *case(op, X, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
            *case(op, X, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1),
            *case(op, X, kernel_shape=[2, 3], strides=[3, 3], ceil_mode=1, pads=[1, 1, 1, 1]),
            *case(op, X, kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
            *case(op, X, opsets=(19,), kernel_shape=[2, 2], dilations=[2, 3]),
            *case(op, (2, 3, 9), kernel_shape=[3], strides=[2], pads=[1, 0]),
            *case(op, X, kernel_shape=[3, 2], auto_pad="VALID"),
            *(c for pad in SAME for c in case(op, X, kernel_shape=[2, 3], strides=[2, 2], auto_pad=pad)),
        )
    ),
    *(
        c
        for pads in ([1, 1, 1, 1], [0, 1, 1, 0])
        for c in case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 1], pads=pads, count_include_pad=1)
    ),
    *case("AveragePool", X, opsets=(19,), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, count_include_pad=1),
]

NORMALISATIONS = [
    *case("BatchNormalization", X, (3,), (3,), (3,), positive(3), opsets=(9, 14, 18), epsilon=1e-3),
    *case("BatchNormalization", (2, 3), (3,), (3,), (3,), positive(3)),
    *case("InstanceNormalization", X, (3,), (3,), epsilon=1e-3),
    *case("LayerNormalization", X, (7,), (7,), epsilon=1e-3),
    *case("LayerNormalization", X, (7,)),
    *case("LayerNormalization", X, (5, 7), (5, 7), axis=2),
    *case("LayerNormalization", X, (1, 7), (5, 1), axis=-2),
    *case("RMSNormalization", X, (7,), opsets=(23,), epsilon=1e-3),
    *case("RMSNormalization", X, (5, 7), opsets=(23,), axis=-2),
    *case("GroupNormalization", (2, 6, 4, 5), (3,), (3,), opsets=(18,), num_groups=3, epsilon=1e-3),
    *case("GroupNormalization", (2, 6, 4, 5), (6,), (6,), opsets=(21,), num_groups=3),
    *case("LRN", (2, 6, 4, 5), size=3, alpha=0.1, beta=0.7, bias=1.5),
    *case("LRN", (2, 3, 4, 5), size=5, alpha=0.5),
]

PRODUCTS = [
    *case("MatMul", (2, 3, 4, 5), (5, 6)),
    *case("MatMul", (2, 1, 4, 5), (3, 5, 6)),
    *case("MatMul", (4,), (4, 3)),
    *case("Gemm", (4, 5), (5, 6), opsets=(11,)),
    *case("Gemm", (4, 5), (6, 5), (6,), opsets=(9, 18), transB=1),
    *case("Gemm", (5, 4), (5, 6), (4, 1), transA=1, alpha=0.5, beta=2.0),
    *case("Gemm", (4, 5), (5, 6), 1.5),
    *case("Einsum", (2, 3, 4), (2, 4, 5), equation="b i j, b j k -> b i k"),
    *case("Einsum", (2, 3, 4), equation="...ij->...ji"),
    *case("Attention", (2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), opsets=(23,)),
    *case("Attention", (2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), (4, 5), opsets=(23,), scale=0.3),
    *case("Attention", (2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8), opsets=(23,), is_causal=1),
    *case("Attention", (2, 4, 24), (2, 5, 24), (2, 5, 18), opsets=(23,), q_num_heads=3, kv_num_heads=3),
    *case("Attention", (2, 4, 32), (2, 5, 16), (2, 5, 16), opsets=(23,), q_num_heads=4, kv_num_heads=2),
    *case("Attention", (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), np.tri(3, dtype=bool), opsets=(23,)),
]

END = np.iinfo(np.int64).max
SHAPES = [
    *(c for axis in (0, 1, 2, -1) for c in case("Flatten", X, opsets=(11,), axis=axis)),
    *case("Flatten", X, opsets=(9, 18)),
    *case("Reshape", X, [0, -1]),
    *case("Reshape", X, [2, 0, 5, 7], opsets=(9, 14)),
    *case("Reshape", (0, 3), [3, 0], allowzero=1),
    *case("Transpose", X, perm=[0, 2, 3, 1]),
    *case("Transpose", (2, 3, 4)),
    *case("Squeeze", (2, 1, 3, 1), opsets=(9, 11), axes=[1, -1]),
    *case("Squeeze", (2, 1, 3, 1), [1, -1]),
    *case("Squeeze", (2, 1, 3, 1), opsets=(9, 18)),
    *case("Unsqueeze", (2, 3), opsets=(9, 11), axes=[0, 3]),
    *case("Unsqueeze", (2, 3), [-1, 1]),
    *case("Concat", (2, 3), (2, 4), axis=1),
    *case("Concat", (2, 3), (1, 3), (4, 3), axis=-2),
    *case("Split", (2, 6), opsets=(9, 13), outputs=3, axis=1),
    *case("Split", (2, 7), opsets=(9, 11), outputs=2, axis=-1, split=[3, 4]),
    *case("Split", (2, 7), [3, 4], opsets=(13, 18), outputs=2, axis=1),
    *case("Split", (2, 7), outputs=3, axis=1, num_outputs=3),
    *case("Slice", X, opsets=(9,), starts=[1, 0], ends=[END, -1], axes=[2, 3]),
    *case("Slice", X, opsets=(9,), starts=[0, 1], ends=[1, 3]),
    *case("Slice", X, [1, 0], [END, -1], [-2, 3], [2, 3], opsets=(10, 13)),
    *case("Slice", X, [-1, 5], [-END, 1], [2, 3], [-1, -2]),
    *case("Slice", X, [0], [2]),
    *case("Slice", X, [4], [2], [3]),
    *case("Gather", X, [[0, -1], [2, 1]], opsets=(11, 18), axis=1),
    *case("Gather", X, 2, axis=2),
    *case("Gather", X, -1, axis=-1),
    *case("GatherElements", (3, 4), [[0, -1, 2], [1, 1, 0]], axis=1),
    *case("GatherND", (3, 4, 5), [[0, 1], [2, -1]]),
    *case("GatherND", (2, 3, 4), [[[1, 0]], [[2, 3]]], batch_dims=1),
    *case("ScatterND", (4, 3), [[1], [-1]], (2, 3), opsets=(11, 18)),
    *case("ScatterND", (4, 3), [[1, 0], [1, 0]], (2,), reduction="add"),
    *case("Shape", X),
    *case("Shape", X, start=1, end=-1),
    *case("Size", X),
    *case("Cast", floats(-1.7, 0, 2.6), to=TensorProto.INT64),
    *case("Cast", floats(-1.7, 0, 2.6), to=TensorProto.BOOL),
    *case("Cast", [1, 0, 3], opsets=(9, 23), to=TensorProto.FLOAT),
    *case("Constant", value=onnx.numpy_helper.from_array(floats(1, 2))),
    *case("Constant", value_float=1.5),
    *case("Constant", value_floats=[1.5, 2]),
    *case("Constant", value_int=3),
    *case("Constant", value_ints=[3, 4]),
    *case("ConstantOfShape", [2, 3]),
    *case("ConstantOfShape", [2], value=onnx.numpy_helper.from_array(np.array([7]))),
    *case("Dropout", X, opsets=(9, 11), ratio=0.9),
    *case("Dropout", X, 0.9, np.array(False)),
    *case("Pad", X, opsets=(9,), pads=[0, 0, 1, 2, 0, 0, 3, 0], value=1.5),
    *case("Pad", X, [0, 0, 1, 2, 0, 0, 3, -1], 1.5, opsets=(11, 13)),
    *case("Pad", X, [1, 2, 3, 0], None, [-1, 2]),
    *(c for m in ("reflect", "edge") for c in case("Pad", X, [1, 2, 4, 0, 0, 1, 2, 3], mode=m)),
    *case("Pad", X, [0, 0, 1, 2, 0, 0, 3, 1], opsets=(19,), mode="wrap"),
    *case("Pad", [1, 2, 3], [1, 2], 7),
    *case("Expand", (3, 1), [2, 1, 4]),
    *case("Expand", (3, 4), [1, 1]),
    *case("Tile", (2, 3), [2, 1]),
    *case("Range", 1, 10, 3),
    *case("Range", 1.0, -1.0, -0.5),
    *(c for upper in (0, 1) for c in case("Trilu", (2, 4, 5), upper=upper)),
    *case("Trilu", (4, 5), -1, upper=1),
    *(c for mode in ("DCR", "CRD") for c in case("DepthToSpace", (2, 8, 3, 2), opsets=(11,), blocksize=2, mode=mode)),
    *case("SpaceToDepth", (2, 3, 4, 6), blocksize=2),
]

COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
RESIZING = [
    *(
        c
        for at in COORDINATES
        for to in ([2, 3, 8, 10], [2, 3, 3, 4], [2, 3, 1, 1])
        for mode in ("nearest", "linear")
        for c in case("Resize", X, None, None, to, opsets=(13,), coordinate_transformation_mode=at, mode=mode)
    ),
    *(
        c
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        for scale in (2, 0.6, 1.7)
        for c in case("Resize", X, None, floats(1, 1, scale, scale), nearest_mode=rounding)
    ),
    *case("Resize", X, floats(), floats(1, 1, 2, 1.5), opsets=(11,), mode="linear"),
    *case(
        "Resize", X, floats(), floats(1, 1, 2, 3), opsets=(11,), coordinate_transformation_mode="tf_half_pixel_for_nn"
    ),
    *case("Resize", X, None, floats(2.5, 2), axes=[2, 3], mode="linear"),
    *case(
        "Resize",
        X,
        None,
        floats(1, 1, 1.3, 2.2),
        opsets=(19,),
        mode="linear",
        coordinate_transformation_mode="half_pixel_symmetric",
    ),
    *(c for mode in ("nearest", "linear") for c in case("Resize", X, floats(1, 1, 2, 3), opsets=(10,), mode=mode)),
    *case("Resize", X, floats(1, 1, 0.5, 0.4), opsets=(10,), mode="nearest"),
    *(c for mode in ("nearest", "linear") for c in case("Upsample", X, floats(1, 1, 2, 3), opsets=(9,), mode=mode)),
]

CASES = [
    *ELEMENTWISE,
    *REDUCTIONS,
    *CONVOLUTIONS,
    *POOLS,
    *NORMALISATIONS,
    *PRODUCTS,
    *SHAPES,
    *RESIZING,
]


def tensors(given: Case) -> list[Tensor | None]:
    return [None if value is None else torch.from_numpy(value.copy()) for value in given.inputs]


@pytest.mark.parametrize("given", CASES)
def test_answers_are_those_of_onnx_runtime(given: Case) -> None:
    result = given.ours()(*tensors(given))
    answers = (result,) if isinstance(result, Tensor) else result
    for answer, expected in zip(answers, given.reference(), strict=True):
        assert answer.dtype == torch.from_numpy(np.atleast_1d(expected)).dtype
        np.testing.assert_allclose(answer.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", CASES)
def test_inputs_are_left_alone(given: Case) -> None:
    inputs = tensors(given)
    given.ours()(*inputs)
    for x, before in zip(inputs, tensors(given), strict=True):
        assert (x is None and before is None) or torch.equal(x, before) or x.isnan().any()


def differentiable(given: Case) -> bool:
    """Whether the first input and what comes of it are floating-point numbers."""
    first = given.inputs[0] if given.inputs else None
    return first is not None and first.dtype == np.float32 and first.size > 0 and given.op not in NOT_DIFFERENTIABLE


@pytest.mark.parametrize("given", [c for c in CASES if differentiable(c.values[0])])
def test_gradients_are_those_of_finite_differences(given: Case) -> None:
    inputs = [x.double() if x is not None and x.dtype == torch.float32 else x for x in tensors(given)]
    run = given.ours()
    assert torch.autograd.gradcheck(lambda x: run(x, *inputs[1:]), inputs[0].requires_grad_(), fast_mode=True)


READ_AS_NUMBERS = {"Clip", "Resize", "Upsample"}
"""Operators whose inputs but the first are read, and so must be on the CPU."""


@pytest.mark.parametrize("given", [c for c in CASES if differentiable(c.values[0])])
def test_whole_numbers_and_masks_may_stay_on_the_cpu(given: Case) -> None:
    """On a device that holds no numbers, none can be read, and whatever is left on the CPU shows."""
    inputs = tensors(given)
    for position, x in enumerate(inputs):
        number = x is None or x.ndim == 0 or (position > 0 and given.op in READ_AS_NUMBERS)
        if x is not None and x.dtype == torch.float32 and not number:
            inputs[position] = x.to("meta")
    answer = given.ours()(*inputs)
    assert all(part.is_meta for part in ((answer,) if isinstance(answer, Tensor) else answer))


def test_every_operator_is_compared() -> None:
    assert {c.values[0].op for c in CASES} | NOT_COMPARED == set(OPERATORS)


def test_cast_like_takes_the_type_alone() -> None:
    like = operator("CastLike", 18)(torch.tensor([1.7, -2.2]), torch.zeros(0, dtype=torch.int64))
    assert isinstance(like, Tensor)
    assert like.tolist() == [1, -2]


@pytest.mark.parametrize(
    ("op", "inputs", "options", "message"),
    [
        ("Resize", ((1, 1, 4, 4), None, floats(1, 1, 2, 2)), {"mode": "cubic"}, "mode 'cubic'"),
        ("Resize", ((1, 1, 4, 4), None, floats(1, 1, 0.5, 0.5)), {"antialias": 1, "mode": "linear"}, "antialiasing"),
        (
            "Resize",
            ((1, 1, 4, 4), None, floats(1, 1, 2, 2)),
            {"coordinate_transformation_mode": "tf_crop_and_resize"},
            "tf_crop_and_resize",
        ),
        ("Pad", ((2, 3), [1, 1, 1, 1]), {"mode": "other"}, "mode 'other'"),
        ("BatchNormalization", (X, (3,), (3,), (3,), positive(3)), {"training_mode": 1}, "training mode"),
        ("Dropout", (X, 0.5, np.array(True)), {}, "training mode"),
        ("ScatterND", ((4, 3), [[1]], (1, 3)), {"reduction": "mul"}, "reduction 'mul'"),
        ("Cast", (X,), {"to": TensorProto.STRING}, "STRING"),
        ("Attention", (X, X, X), {"softcap": 1.0}, "soft cap"),
        ("Attention", (X, X, X, (5, 5)), {"is_causal": 1}, "causal"),
    ],
)
def test_what_is_not_known_is_refused(op: str, inputs: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    given = next(case(op, *inputs, **options)).values[0]
    with pytest.raises(InvalidModel, match=message):
        given.ours()(*tensors(given))
