"""The demo's convolutional network as an ONNX file such as converters write of Keras models.

Images come channels last, each convolution has its batch normalisation folded in, and a softmax ends the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from torch import Tensor, nn

from demo.networks import IMAGE_SIDE

BLOCKS = ("stem", "stage1", "stage2.0", "stage2.1", "stage3.0", "stage3.1")
"""Convolutions with what follows each, in order, as the network names them."""


def keras_style(network: nn.Module) -> bytes:
    """Return an ONNX file that answers normalised images ``[N, 64, 64, 3]`` with probabilities ``[N, n_classes]``.

    Parameters
    ----------
    network
        What `demo.networks.cnn` builds, on the CPU and in evaluation mode. The answer of its block ``stage3.1`` is the
        file's value ``cnn/stage3_1/Relu:0``, and so on.
    """
    head = cast(nn.Linear, network.get_submodule("head"))
    weights: dict[str, NDArray[np.generic]] = {
        "cnn/pool/axes": np.array([1, 2]),
        "cnn/head/MatMul/kernel:0": head.weight.detach().T.numpy(),
        "cnn/head/BiasAdd/bias:0": head.bias.detach().numpy(),
    }
    nodes = [make_node("Transpose", ["image"], ["cnn/stem/Conv2D__6:0"], perm=[0, 3, 1, 2])]
    for block in BLOCKS:
        nodes += _block(block, network.get_submodule(block), nodes[-1].output[0], weights)
    nodes += [
        make_node("Transpose", [nodes[-1].output[0]], ["cnn/pool/Mean__28:0"], perm=[0, 2, 3, 1]),
        make_node("ReduceMean", ["cnn/pool/Mean__28:0"], ["cnn/pool/Mean:0"], axes=[1, 2], keepdims=1),
        make_node("Squeeze", ["cnn/pool/Mean:0", "cnn/pool/axes"], ["cnn/pool/Mean_Squeeze__30:0"]),
        make_node("MatMul", ["cnn/pool/Mean_Squeeze__30:0", "cnn/head/MatMul/kernel:0"], ["cnn/head/MatMul:0"]),
        make_node("Add", ["cnn/head/MatMul:0", "cnn/head/BiasAdd/bias:0"], ["cnn/head/BiasAdd:0"]),
        make_node("Softmax", ["cnn/head/BiasAdd:0"], ["probabilities"], axis=-1),
    ]
    graph = make_graph(
        nodes,
        "cnn",
        [make_tensor_value_info("image", TensorProto.FLOAT, ["N", IMAGE_SIDE, IMAGE_SIDE, 3])],
        [make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", head.out_features])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 15)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _block(block: str, module: nn.Module, given: str, weights: dict[str, NDArray[np.generic]]) -> Iterator[NodeProto]:
    """Yield convolution and ReLU, and add to the weights those with the batch normalisation folded in."""
    convolution = cast(nn.Conv2d, module.get_submodule("0"))
    fused = nn.utils.fuse_conv_bn_eval(convolution, cast(nn.BatchNorm2d, module.get_submodule("1")))
    name = f"cnn/{block.replace('.', '_')}"
    weights[f"{name}/Conv2D/kernel:0"] = fused.weight.detach().numpy()
    weights[f"{name}/BiasAdd/bias:0"] = cast(Tensor, fused.bias).detach().numpy()
    height, width = cast(tuple[int, int], convolution.padding)
    yield make_node(
        "Conv",
        [given, f"{name}/Conv2D/kernel:0", f"{name}/BiasAdd/bias:0"],
        [f"{name}/BiasAdd:0"],
        kernel_shape=convolution.kernel_size,
        strides=convolution.stride,
        pads=[height, width, height, width],
    )
    yield make_node("Relu", [f"{name}/BiasAdd:0"], [f"{name}/Relu:0"])
