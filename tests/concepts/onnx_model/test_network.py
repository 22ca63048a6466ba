"""ONNX files as torch networks that can be cut."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from concepts.cut import Cut, Layout, layers
from concepts.errors import InvalidCut, InvalidModel, UnknownLayer
from concepts.model import NAME
from concepts.onnx_model.file import OnnxFile
from concepts.onnx_model.network import OnnxNetwork
from tests.concepts.onnx_model.files import CNN, CNN_WEIGHTS, content, noise, reference, weights


def network(body: str = CNN, **options: Any) -> OnnxNetwork:
    return OnnxNetwork(OnnxFile.parse(content(body, **options)))


def children(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


def test_a_network_answers_as_its_file_and_is_frozen() -> None:
    ours, x = network(), noise(3, 3, 8, 8)
    torch.testing.assert_close(ours(x), reference(content(), x)[0])
    assert not ours.training
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert children(ours) == ["c", "r", "p", "f", "logits"]
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == {
        "c.input_1": (6, 3, 3, 3),
        "logits.input_1": (5, 6),
        "logits.input_2": (5,),
    }


def test_images_come_channels_first_whatever_the_file_s_layout() -> None:
    body = "first = Transpose <perm=[0, 3, 1, 2]> (image)" + CNN.replace(
        "Conv <pads=[1, 1, 1, 1]> (image", "Conv (first"
    )
    ours = network(body, image="float[N, 8, 10, 3] image")
    x = noise(2, 3, 8, 10)
    conv = torch.nn.functional.conv2d(x, torch.from_numpy(CNN_WEIGHTS["filters"]))
    torch.testing.assert_close(Cut(ours, "c", x).trunk(x), conv)
    assert Cut(ours, "first", x).trunk(x).data_ptr() == x.data_ptr()


def test_names_are_those_of_the_values_as_far_as_layers_may_have_them() -> None:
    values = ["/block.0/conv/Conv:0", "_block_0_conv_Conv_0", "train", "forward", "ünïcode", "--", "x" * 200, "x" * 201]
    steps, last = [], "image"
    for index, _value in enumerate(values):
        steps.append(f"v{index} = Neg ({last})")
        last = f"v{index}"
    parsed = OnnxFile.parse(content(" ".join(steps) + CNN.replace("image", last)))
    renamed = dict(zip((f"v{index}" for index in range(len(values))), values, strict=True))
    for node in parsed.model.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    ours = OnnxNetwork(parsed)
    found = children(ours)[: len(values)]
    assert found[:4] == ["block_0_conv_Conv_0", "block_0_conv_Conv_0_2", "train_2", "forward_2"]
    assert found[4:] == ["n_code", "value", "x" * 128, "x" * 126 + "_2"]
    assert [ours.value_name(name) for name in found] == values
    assert all(NAME.fullmatch(name) and "." not in name for name in found)
    assert dict(ours.named_modules()).keys() >= set(found)
    with pytest.raises(UnknownLayer, match="no layer 'v9'"):
        ours.value_name("v9")


SHAPED = """
    c = Conv <pads=[1, 1, 1, 1]> (image, filters)
    s = Shape (c)
    b = Gather (s, zero)
    n = Cast <to=1> (b)
    half = Div (n, two)
    twice = Mul (half, two)
    back = Cast <to=7> (twice)
    target = Concat <axis=0> (back, rest)
    t = Reshape (c, target)
    m = ReduceMean <keepdims=0> (t, last)
    logits = Gemm <transB=1> (m, classes, constant)
"""
NUMBERS = {"zero": np.array([0]), "two": np.array([2], np.float32), "rest": np.array([6, 64]), "last": np.array([2])}


def test_shapes_are_computed_anew_and_are_no_layers() -> None:
    ours, x = network(SHAPED, **NUMBERS), noise(5, 3, 8, 8)
    assert children(ours) == ["c", "t", "m", "logits"]
    for layer in children(ours):
        cut = Cut(ours, layer, x[:2])
        torch.testing.assert_close(cut.head(cut.trunk(x)), ours(x))


def test_a_class_token_and_booleans() -> None:
    body = """
        c = Conv <strides=[4, 4], kernel_shape=[3, 3]> (image, filters)
        s = Shape <start=0, end=1> (c)
        flat = Concat <axis=0> (s, rest)
        rows = Reshape (c, flat)
        patches = Transpose <perm=[0, 2, 1]> (rows)
        size = Concat <axis=0> (s, ones)
        first = Expand (token, size)
        tokens = Concat <axis=1> (first, patches)
        mask = Greater (tokens, nothing)
        kept = Where (mask, tokens, nothing)
        m = ReduceMax <keepdims=0> (kept, middle)
        logits = Gemm <transB=1> (m, classes, constant)
    """
    numbers = {"rest": np.array([6, 4]), "ones": np.array([1, 1]), "middle": np.array([1])}
    given = {**numbers, "token": weights(1, 1, 6), "nothing": np.zeros(1, np.float32)}
    ours, x = network(body, **given), noise(3, 3, 8, 8)
    torch.testing.assert_close(ours(x), reference(content(body, **given), x)[0])
    assert set(children(ours)) == {"c", "rows", "patches", "first", "tokens", "kept", "m", "logits"}
    assert Cut(ours, "kept", x).layout == Layout("btc", 6, (2, 2), 1)
    for layer in ("patches", "tokens", "kept", "m"):
        cut = Cut(ours, layer, x[:2])
        torch.testing.assert_close(cut.head(cut.trunk(x)), ours(x))


def test_single_numbers_stay_where_they_can_be_read() -> None:
    body = CNN.replace("f = Flatten (p)", "s = Mul (p, factor) k = Clip (s, low, ) f = Flatten (k)")
    given = {"factor": np.float32(3), "low": np.array([0.1], np.float32)}
    ours, x = network(body, **given), noise(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), reference(content(body, **given), x)[0])
    assert not any(name.startswith(("s.", "k.")) for name in ours.state_dict())


def test_what_never_changes_is_computed_once() -> None:
    body = "g = Neg (filters) h = Transpose <perm=[1, 0]> (columns)" + CNN.replace("filters", "g").replace(
        "Gemm <transB=1> (f, classes, constant)", "MatMul (f, h)"
    )
    ours, x = network(body, columns=weights(5, 6)), noise(2, 3, 8, 8)
    assert children(ours) == ["c", "r", "p", "f", "logits"]
    torch.testing.assert_close(ours(x), reference(content(body, columns=weights(5, 6)), x)[0])


def test_weights_are_shared_where_the_file_shares_them() -> None:
    body = (
        CNN.replace("(c)", "(d)")
        .replace("r =", "d = Conv <pads=[1, 1, 1, 1]> (e, square) r =")
        .replace("d =", "e = Conv <pads=[1, 1, 1, 1]> (c, square) d =")
    )
    ours = network(body, square=weights(6, 6, 3, 3))
    parameters = dict(ours.named_parameters(remove_duplicate=False))
    assert parameters["d.input_1"] is parameters["e.input_1"]
    double, x = ours.double(), noise(2, 3, 8, 8).double()
    assert double(x).dtype == torch.float64


def test_the_parts_of_a_split_come_as_a_tuple_and_cannot_be_cut() -> None:
    body = CNN.replace(
        "r = Relu (c)", "low, high = Split <axis=1, num_outputs=2> (c) g = Sigmoid (low) r = Mul (g, high)"
    )
    ours, x = network(body, classes=weights(5, 3)), noise(3, 3, 8, 8)
    parts = ours.get_submodule("low")(x.repeat(1, 2, 1, 1))
    assert [part.shape for part in parts] == [(3, 3, 8, 8), (3, 3, 8, 8)]
    with pytest.raises(InvalidCut, match=r"one tensor of activations; nearest layers that can be cut: c, r"):
        Cut(ours, "low", x[:2])
    cut = Cut(ours, "r", x[:2])
    torch.testing.assert_close(cut.head(cut.trunk(x)), ours(x))


def test_values_are_dropped_when_nothing_needs_them_any_more() -> None:
    ours, seen = network(), dict[str, weakref.ref[Tensor]]()
    gone: list[bool] = []
    ours.get_submodule("c").register_forward_hook(lambda _m, _i, output: seen.update(c=weakref.ref(output)))
    ours.get_submodule("p").register_forward_pre_hook(lambda *_: gone.append(seen["c"]() is None))
    with torch.no_grad():
        ours(noise(1, 3, 8, 8))
    assert gone == [True]


def test_a_head_runs_what_comes_after_its_layer_alone() -> None:
    ours, x = network(), noise(2, 3, 8, 8)
    ran: list[str] = []
    for name, child in ours.named_children():
        child.register_forward_hook(lambda _child, _inputs, _output, name=name: ran.append(name))
    cut = Cut(ours, "p", x)
    a = cut.trunk(x)
    ran.clear()
    logits = cut.head(a)
    assert ran == ["p", "f", "logits"]
    torch.testing.assert_close(logits, ours(x))
    with pytest.raises(RuntimeError), ours.beginning_at("p"):
        raise RuntimeError
    ran.clear()
    ours(x)
    assert ran == children(ours)


def test_gradients_through_a_cut_are_those_of_finite_differences() -> None:
    body = CNN.replace("Relu", "Sigmoid")
    ours, x = network(body).double(), noise(2, 3, 8, 8).double()
    cut = Cut(ours, "r", x)
    a = cut.trunk(x)
    targets, direction, step = torch.tensor([1, 4]), noise(*a.shape, seed=1).double(), 1e-6
    logits, gradient = cut.head_gradient(a, targets)
    up, down = cut.head(a + step * direction), cut.head(a - step * direction)
    slope = (up - down).gather(1, targets.view(-1, 1)).squeeze(1) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logits, ours(x))
    assert cut.facts.form == "affine"


def test_sizes_left_open_are_tried_at_a_size_of_choice() -> None:
    body = CNN.replace("GlobalAveragePool (r)", "AveragePool <kernel_shape=[16, 16]> (r)")
    file = OnnxFile.parse(content(body, image="float[N, 3, H, W] image"))
    assert OnnxNetwork(file, open_size=(16, 16))(noise(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(InvalidModel, match="Gemm fails to compute value 'logits' for an image of 224×224 pixels"):
        OnnxNetwork(file)


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        (CNN.replace("Flatten", "Identity"), {}, "Gemm fails to compute value 'logits' for an image of 8×8 pixels"),
        ("k = Identity (columns) " + CNN.replace("classes", "k"), {"columns": weights(2, 2)}, "Gemm fails"),
        ("k = MatMul (classes, classes)" + CNN.replace("classes", "k"), {}, "MatMul fails to compute value 'k'"),
        ("logits = Identity (constants)", {"constants": weights(1, 5)}, "answers one image with a constant"),
        ("logits = ReduceMean <keepdims=0> (image, axes)", {"axes": np.array([3])}, r"one image with \[1, 3, 8\]"),
        (
            "q, i = MaxPool <kernel_shape=[8, 8]> (image) d = Cast <to=1> (i) logits = Flatten (d)",
            {},
            "output 'i' of operator MaxPool is not known here",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(body: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        network(body, **options)


def test_an_operator_s_own_refusal_names_its_value() -> None:
    body = 'r = Resize <mode="cubic"> (image, , twice) p = GlobalMaxPool (r) logits = Flatten (p)'
    with pytest.raises(InvalidModel, match="value 'r': Resize with mode 'cubic'; that is not known here: export"):
        network(body, output="float[N, 3] logits", twice=np.array([1, 1, 2, 2], np.float32))


def test_half_precision_within() -> None:
    body = "h = Cast <to=10> (image)" + CNN.replace("image", "h").replace("logits", "l") + "logits = Cast <to=1> (l)"
    halves = {name: value.astype(np.float16) for name, value in CNN_WEIGHTS.items()}
    ours, x = network(body, **halves), noise(2, 3, 8, 8)
    assert ours(x).dtype == torch.float32
    with pytest.raises(InvalidCut, match="answers in float16, not in float32"):  # what heads are given is float32
        Cut(ours, "r", x)
    torch.testing.assert_close(ours(x), network()(x), rtol=1e-2, atol=1e-2)


# Whole networks, as PyTorch's exporters write them

SIDE = {"resnet18": 64, "mobilenet_v2": 64, "vit": 32, "swin": 32, "convnext": 64, "shufflenet": 64}


@cache
def torchvision(name: str) -> nn.Module:
    """Build a network with random weights, small where that can be had, with different logits for different images."""
    torch.manual_seed(0)
    build: dict[str, Callable[[], nn.Module]] = {
        "resnet18": lambda: models.resnet18(num_classes=10),
        "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=10),
        "vit": lambda: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
        "swin": lambda: models.SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=10),
        "convnext": lambda: models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=10),
        "shufflenet": lambda: models.shufflenet_v2_x0_5(num_classes=10),
    }
    module = build[name]()
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.3)
    return module.eval().requires_grad_(False)


@cache
def exported(name: str, exporter: str, opset: int, batch: str) -> bytes:
    module, x = torchvision(name), noise(2 if batch == "free" else 1, 3, SIDE[name], SIDE[name])
    free, file = batch == "free", BytesIO()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an operator of its own, which the old exporter does not know
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn of themselves
            if exporter == "dynamo":
                shapes = ({0: torch.export.Dim("batch")},) if free else None
                torch.onnx.export(module, (x,), file, opset_version=opset, dynamic_shapes=shapes, verbose=False)
            else:
                axes, names = ({"x": {0: "batch"}} if free else None), ["x"]
                options = {"dynamo": False, "input_names": names, "dynamic_axes": axes}
                torch.onnx.export(module, (x,), file, opset_version=opset, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return file.getvalue()


EXPORTS = [
    ("resnet18", "dynamo", 18, "free"),
    ("resnet18", "old", 9, "one"),
    ("mobilenet_v2", "old", 17, "free"),
    ("vit", "dynamo", 18, "free"),
    ("vit", "dynamo", 23, "free"),
    ("vit", "old", 17, "free"),
    ("swin", "dynamo", 20, "free"),
    ("swin", "old", 17, "free"),
    ("convnext", "old", 11, "one"),
    ("shufflenet", "old", 13, "one"),
]


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: "-".join(map(str, export)))
def test_exported_networks(export: tuple[str, str, int, str]) -> None:
    file = OnnxFile.parse(exported(*export))
    ours, x = OnnxNetwork(file), noise(3, 3, SIDE[export[0]], SIDE[export[0]])
    logits = ours(x)
    scale = float(logits.abs().max())
    close = {"rtol": 0.0, "atol": 1e-4 * scale}
    torch.testing.assert_close(logits, torchvision(export[0])(x), **close)
    torch.testing.assert_close(logits, reference(file.truncated([file.output_name]), x)[0], **close)
    found = list(layers(ours, x[:2]))
    assert len(found) >= 12
    for layer in found[::6]:
        cut = Cut(ours, layer.name, x[:2])
        a = cut.trunk(x)
        torch.testing.assert_close(cut.head(a), logits, **close)
        (same,) = reference(file.truncated([ours.value_name(layer.name)]), x)
        torch.testing.assert_close(same, a, rtol=0, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: "-".join(map(str, export)))
def test_networks_go_to_another_device_as_a_whole(export: tuple[str, str, int, str]) -> None:
    """To one that holds no numbers: reading one there fails, as does joining what is there with what is not."""
    ours = OnnxNetwork(OnnxFile.parse(exported(*export))).to("meta")
    logits = ours(torch.empty(3, 3, SIDE[export[0]], SIDE[export[0]], device="meta"))
    assert logits.is_meta
    assert logits.shape == (3, 10)


def test_layers_are_those_of_the_network_in_torch() -> None:
    ours = OnnxNetwork(OnnxFile.parse(exported("resnet18", "dynamo", 18, "free")))
    x = noise(2, 3, 64, 64)
    theirs = Cut(torchvision("resnet18"), "layer3", x)
    same = Cut(ours, "relu_12", x)
    assert same.layout == theirs.layout == Layout("bchw", 256, (4, 4), 0)
    torch.testing.assert_close(same.trunk(x), theirs.trunk(x), rtol=1e-4, atol=1e-5)
    assert same.facts.form == theirs.facts.form
    assert same.non_negative


def test_a_transformer_that_counts_on_one_image_is_refused() -> None:
    file = OnnxFile.parse(exported("vit", "dynamo", 18, "one"))
    with pytest.raises(InvalidModel, match="dynamic batch axis"):
        OnnxNetwork(file)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "export", [e for e in EXPORTS if e[0] in ("vit", "swin", "resnet18")], ids=lambda e: "-".join(map(str, e))
)
def test_networks_run_on_a_gpu(export: tuple[str, str, int, str]) -> None:
    ours, x = OnnxNetwork(OnnxFile.parse(exported(*export))), noise(3, 3, SIDE[export[0]], SIDE[export[0]])
    expected = ours(x)
    ours, x = ours.to("cuda").to(memory_format=torch.channels_last), x.to("cuda")
    torch.testing.assert_close(ours(x).cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    with torch.autocast("cuda", torch.bfloat16):
        assert ours(x).isfinite().all()
    layer = list(layers(ours, x[:2]))[-3].name
    cut = Cut(ours, layer, x[:2])
    torch.testing.assert_close(cut.head(cut.trunk(x)), ours(x))
