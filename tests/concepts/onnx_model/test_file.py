"""Reading ONNX files: what is asked of them, and what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.helper import make_tensor_value_info

from concepts.errors import InvalidModel
from concepts.onnx_model.file import OPSETS, OnnxFile
from concepts.onnx_model.network import OnnxNetwork
from tests.concepts.onnx_model.files import CNN, content, model, noise, reference, weights

BEFORE_CLASSES = CNN.rpartition("logits")[0]
"""Body of the network up to its pooled features."""


def test_a_file_tells_what_it_takes() -> None:
    file = OnnxFile.parse(content())
    assert (file.input_name, file.output_name, file.opset, file.stripped) == ("image", "logits", 18, None)
    assert (file.layout, file.channels, file.height, file.width) == ("nchw", 3, 8, 8)
    onnx.checker.check_model(file.model)


@pytest.mark.parametrize(
    ("image", "layout", "channels", "height", "width"),
    [
        ("float[N, 3, H, W] image", "nchw", 3, None, None),
        ("float[N, 6, 8, 16] image", "nchw", 6, 8, 16),
        ("float[N, 1, 8, 8] image", "nchw", 1, 8, 8),
        ("float[N, 8, 16, 3] image", "nhwc", 3, 8, 16),
        ("float[N, H, W, 1] image", "nhwc", 1, None, None),
        ("float[N, 3, 8, 3] image", "nchw", 3, 8, 3),
        ("float[?, 3, ?, 8] image", "nchw", 3, None, 8),
    ],
)
def test_layouts(image: str, layout: str, channels: int, height: int | None, width: int | None) -> None:
    file = OnnxFile.parse(content("p = GlobalMaxPool (image) logits = Flatten (p)", image=image))
    assert (file.layout, file.channels, file.height, file.width) == (layout, channels, height, width)


@pytest.mark.parametrize(
    ("end", "opset", "stripped"),
    [
        ("logits = Softmax (l)", 18, "Softmax"),
        ("logits = Softmax <axis=1> (l)", 18, "Softmax"),
        ("logits = Softmax (l)", 11, "Softmax"),
        ("logits = LogSoftmax <axis=-1> (l)", 13, "LogSoftmax"),
        ("s = Softmax (l) logits = Identity (s)", 18, "Softmax"),
        ("s = Softmax (l) t = Cast <to=10> (s) u = Identity (t) logits = Cast <to=1> (u)", 18, "Softmax"),
        ("m = Reshape (l, four) s = Softmax <axis=1> (m) logits = Flatten (s)", 18, "Softmax"),
        ("m = Reshape (l, four) s = Softmax <axis=1> (m) logits = Squeeze (s, ends)", 18, "Softmax"),
        ("m = Reshape (l, four) s = Softmax (m) logits = Flatten (s)", 9, "Softmax"),
        ("m = Reshape (l, four) s = Softmax <axis=1> (m) t = Identity (s) logits = Flatten (t)", 18, "Softmax"),
        ("m = Reshape (l, last) s = Softmax (m) logits = Reshape (s, flat)", 18, "Softmax"),
        ("logits = Softmax <axis=0> (l)", 18, None),
        ("m = Reshape (l, four) s = Softmax <axis=2> (m) logits = Flatten (s)", 18, None),
        ("m = Reshape (l, pair) s = Softmax <axis=1> (m) logits = Flatten (s)", 18, None),
        ("s = Softmax (l) logits = Neg (s)", 18, None),
        ("logits = Sigmoid (l)", 18, None),
    ],
)
def test_a_softmax_over_the_classes_is_taken_off(end: str, opset: int, stripped: str | None) -> None:
    shapes = {"four": [-1, 6, 1, 1], "last": [-1, 1, 1, 6], "pair": [-1, 3, 2], "flat": [-1, 6], "ends": [2, 3]}
    whole = content(
        f"{BEFORE_CLASSES} l = MatMul (f, square) {end}",
        output="float[N, 6] logits",
        opset=opset,
        square=weights(6, 6),
        **{name: np.array(shape) for name, shape in shapes.items()},
    )
    file, x = OnnxFile.parse(whole), noise(1, 3, 8, 8)
    assert file.stripped == stripped
    onnx.checker.check_model(file.model)
    logits = OnnxNetwork(file)(x) if stripped else reference(file.truncated([file.output_name]), x)[0]
    changed = {"Softmax": logits.softmax(1), "LogSoftmax": logits.log_softmax(1), None: logits}[stripped]
    torch.testing.assert_close(changed, reference(whole, x)[0], rtol=1e-3, atol=1e-3)


def test_weights_that_are_listed_as_inputs_are_none() -> None:
    old = model(opset=9, ir_version=3)
    for tensor in old.graph.initializer:
        old.graph.input.append(make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    file, x = OnnxFile.parse(old.SerializeToString()), noise(2, 3, 8, 8)
    assert file.input_name == "image"
    onnx.checker.check_model(file.model)
    torch.testing.assert_close(OnnxNetwork(file)(x), reference(old.SerializeToString(), x)[0])


def test_what_the_first_output_does_not_need_is_left_out() -> None:
    whole = content(CNN + "other = Det (image)", output="float[N, 5] logits, float[N, 3] other", spare=weights(9))
    file = OnnxFile.parse(whole)
    assert [node.op_type for node in file.model.graph.node][-1] == "Gemm"
    assert {tensor.name for tensor in file.model.graph.initializer} == {"filters", "classes", "constant"}


def test_functions_of_the_file_s_own_are_written_out() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 18, "own" : 1]>
        classifier (float[N, 3, 8, 8] image) => (float[N, 3] logits) {
            doubled = own.twice (image)
            pooled = GlobalAveragePool (doubled)
            logits = Flatten (pooled)
        }
        <domain: "own", opset_import: ["" : 18]>
        twice (x) => (y) { y = Add (x, x) }
    """
    file, x = OnnxFile.parse(onnx.parser.parse_model(text).SerializeToString()), noise(2, 3, 8, 8)
    torch.testing.assert_close(OnnxNetwork(file)(x), 2 * x.mean((2, 3)))


def external() -> bytes:
    whole = model()
    tensor = whole.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return whole.SerializeToString()


def external_in_a_node() -> bytes:
    whole = model("k = Constant <value = float[1] {1}> ()" + CNN)
    tensor = whole.graph.node[0].attribute[0].t
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return whole.SerializeToString()


def fused() -> bytes:
    whole = model()
    whole.graph.node[0].domain = "com.microsoft"
    whole.opset_import.add(domain="com.microsoft", version=1)
    return whole.SerializeToString()


def unsound() -> bytes:
    whole = model()
    whole.graph.node.reverse()
    return whole.SerializeToString()


def sparse() -> bytes:
    whole = model()
    entry = whole.graph.sparse_initializer.add(dims=[4])
    entry.values.CopyFrom(numpy_helper.from_array(weights(1), "spare"))
    entry.indices.CopyFrom(numpy_helper.from_array(np.array([2]), "places"))
    return whole.SerializeToString()


def images(shape: str, **options: Any) -> bytes:
    return content("p = GlobalMaxPool (image) logits = Flatten (p)", image=shape, **options)


def answers(shape: str, body: str = "logits = GlobalMaxPool (image)") -> bytes:
    return content(body, output=shape)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "not an ONNX file"),
        (b"PK\x03\x04 no protobuf at all", "not an ONNX file"),
        (content()[:-100], "not an ONNX file"),
        (external(), "weights in other files; export it with its weights inside"),
        (external_in_a_node(), "weights in other files"),
        (content(opset=OPSETS[0] - 1), "opset 8; export it with one from 9 to 26, such as 18"),
        (content(opset=OPSETS[-1] + 1, ir_version=10), "opset 27"),
        (unsound(), "not sound"),
        (sparse(), "sparse weights"),
        (fused(), r"not known here: com\.microsoft\.Conv; export it"),
        (content("n = NonZero (image) d = Det (image)" + CNN.replace("Relu (c)", "Bernoulli (c)")), "here: Bernoulli;"),
        (
            content(CNN.replace("Relu (c)", "Bernoulli (c)").replace("Flatten", "Hardmax")),
            "here: Bernoulli, Hardmax; export it in evaluation mode",
        ),
        (images("float[N, 3, 8, 8] image, float[N, 3, 8, 8] mask"), "needs one input, .* has 'image', 'mask'"),
        (images("uint8[N, 3, 8, 8] image"), "4-D uint8; export the model with float32 images"),
        (images("float[N, 3, 8] image"), "3-D float"),
        (images("float[N, 5, 8, 8] image"), r"shape \[\?, 5, 8, 8\]: neither"),
        (images("float[N, C, H, W] image"), "export the model with a fixed number of channels"),
        (images("float[4, 3, 8, 8] image"), "batches of 4 alone; export it with a dynamic batch axis"),
        (
            answers("float[N, 3, 1, 1] logits"),
            r"4-D float where logits \[N, n_classes\] are needed; .* flattened",
        ),
        (answers("int64[N, 3] logits", "f = Flatten (image) logits = Cast <to=7> (f)"), "2-D int64"),
    ],
)
def test_bad_files_are_refused_with_a_remedy(file: bytes, message: str) -> None:
    with pytest.raises(InvalidModel, match=message) as refusal:
        OnnxFile.parse(file)
    assert "/" not in refusal.value.message
    assert len(refusal.value.message) < 400


def test_the_newest_opset_known_is_one_that_onnx_runtime_runs() -> None:
    whole, x = content(opset=OPSETS[-1], ir_version=10), noise(2, 3, 8, 8)
    torch.testing.assert_close(OnnxNetwork(OnnxFile.parse(whole))(x), reference(whole, x)[0])


def test_a_truncated_model_gives_the_values_asked_for_and_holds_no_more() -> None:
    whole = OnnxFile.parse(content(CNN + "probabilities = Softmax (logits)", output="float[N, 5] probabilities"))
    x = noise(3, 3, 8, 8)
    part = whole.truncated(["r", "c"])
    onnx.checker.check_model(part)
    graph = onnx.load_model_from_string(part).graph
    assert ([node.op_type for node in graph.node], [tensor.name for tensor in graph.initializer]) == (
        ["Conv", "Relu"],
        ["filters"],
    )
    r, c = reference(part, x)
    torch.testing.assert_close(r, c.relu())
    torch.testing.assert_close(reference(whole.truncated(["logits"]), x)[0], OnnxNetwork(whole)(x))
    with pytest.raises(InvalidModel, match="no values 'z', 'probabilities'"):
        whole.truncated(["r", "z", "probabilities"])


FIXED = {
    "flattened": "f = Reshape (p, one_any)",
    "flattened in full": "f = Reshape (p, one_six)",
    "flattened by a constant": "s = Constant <value = int64[2] {1, -1}> () f = Reshape (p, s)",
    "flattened by numbers": "s = Constant <value_ints = [1, 6]> () f = Reshape (p, s)",
    "grouped": "g = Reshape (p, grouped) h = Transpose <perm=[0, 2, 1]> (g) f = Reshape (h, one_any)",
    "windowed": "g = Reshape (p, windows) h = Neg (g) f = Reshape (h, one_six)",
    "joined": "t = Flatten (p) u = Concat <axis=1> (token, t) f = Slice (u, zero, six, second)",
    "computed": "v = Neg (token) t = Flatten (p) u = Concat <axis=-1> (v, t) f = Slice (u, zero, six, second)",
}


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_batch_of_one_is_made_free(name: str) -> None:
    body = CNN.replace("f = Flatten (p)", FIXED[name])
    shapes = {"one_any": [1, -1], "one_six": [1, 6], "grouped": [1, 2, 3], "windows": [3, 2]}
    numbers = {"zero": [0], "six": [6], "second": [1]}
    whole = content(
        body,
        image="float[1, 3, 8, 8] image",
        output="float[1, 5] logits",
        token=weights(1, 2),
        **{key: np.array(value) for key, value in (shapes | numbers).items()},
    )
    file, x = OnnxFile.parse(whole), noise(3, 3, 8, 8)
    onnx.checker.check_model(file.model)
    each = torch.cat([reference(whole, image)[0] for image in x.split(1)])
    torch.testing.assert_close(OnnxNetwork(file)(x), each, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference(file.truncated(["logits"]), x)[0], each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_files_that_mix_images_are_refused(axis: int) -> None:
    whole = content(
        CNN.replace("Flatten (p)", "Flatten (q)").replace("f =", "m = ReduceMean (p, axes) q = Sub (p, m) f ="),
        image="float[1, 3, 8, 8] image",
        output="float[1, 5] logits",
        axes=np.array([axis]),
    )
    file = OnnxFile.parse(whole)
    if axis == 1:
        assert OnnxNetwork(file)(noise(3, 3, 8, 8)).shape == (3, 5)
    else:
        with pytest.raises(InvalidModel, match="export it with a dynamic batch axis"):
            OnnxNetwork(file)
