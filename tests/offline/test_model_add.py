"""``whence-bank model add``: what need not be said, what overrides it, and what is not published."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models

from concepts.architectures import build
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from demo.cifar import CLASS_NAMES
from demo.models import MODELS
from demo.onnx_classifier import keras_style
from tests.offline import networks
from tests.offline.test_cli import refused, run
from tests.offline.worlds import cifar

SQUEEZENET = "squeezenet1_1-b8a52dc0.pth"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Weights files: random, and named as torchvision names its own."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(build("torchvision:squeezenet1_1").state_dict(), folder / SQUEEZENET)
    torch.save(build("torchvision:squeezenet1_1", {"num_classes": 3}).state_dict(), folder / "three.pth")
    torch.save(build("torchvision:mnasnet0_5").state_dict(), folder / "mnasnet0.5_top1_67.823-3ffadce67e.pth")
    save_file(networks.Pooled(2).state_dict(), folder / "pooled.safetensors")
    return folder


def add(root: Path, *arguments: object) -> str:
    code, out, err = run("model", "add", "m", "--repository", root, *arguments)
    assert code == 0, err
    return re.sub(r" +", " ", out)


def spec(root: Path) -> Any:
    return Repository(root, ["demo", "tests.offline.networks"]).model_spec("m")


def test_a_published_file_needs_no_more_than_its_name(tmp_path, files):
    out = add(tmp_path, "--weights", files / SQUEEZENET)
    found = spec(tmp_path)
    assert found.architecture == "torchvision:squeezenet1_1"
    assert found.preprocessing == Preprocessing(224, 224, 256, **IMAGENET)
    assert found.class_names == tuple(models.SqueezeNet1_1_Weights.DEFAULT.meta["categories"])
    assert found.options == {}
    loaded = Repository(tmp_path).load_model("m")
    state = torch.load(files / SQUEEZENET)
    assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())
    for words in (
        "torchvision:squeezenet1_1",
        found.weights_digest,
        "224×224 pixels, 3 channels",
        "shorter side to 256 (bilinear), centre 224×224, RGB in [0, 1], minus (0.485, 0.456, 0.406), divided by (0.22",
        "m @ " + found.weights_digest[:12] + ", 1000 classes",
        "│ tench, goldfish, great white shark, …",
        "torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1: the weights file is named so",
        "whence-bank layers m",
    ):
        assert words in out, words


def test_networks_that_ask_for_the_version_of_their_weights(tmp_path, files):
    add(tmp_path, "--weights", files / "mnasnet0.5_top1_67.823-3ffadce67e.pth")
    assert spec(tmp_path).architecture == "torchvision:mnasnet0_5"


def test_other_classes_make_another_head(tmp_path, files):
    own = ("--architecture", "torchvision:squeezenet1_1", "--weights", files / "three.pth")
    out = add(tmp_path, *own, "--classes", "cat,dog,[red]")
    found = spec(tmp_path)
    assert found.class_names == ("cat", "dog", "[red]")
    assert found.options == {"num_classes": 3}
    assert found.preprocessing == Preprocessing(224, 224, 256, **IMAGENET)
    assert "│ cat, dog, [red] │" in out
    assert '{"num_classes": 3}' in out
    # The same, with the option said.
    add(tmp_path, *own, "--classes", "cat,dog,[red]", "--options", '{"num_classes": 3}')
    # With fewer outputs than ImageNet has, its names are nobody's.
    assert "give --classes: " in refused(
        "model", "add", "x", "--repository", tmp_path, *own, "--options", '{"num_classes": 3}'
    )


def test_class_names_come_from_a_file_or_a_list(tmp_path, files):
    own = ("--architecture", "torchvision:squeezenet1_1", "--weights", files / "three.pth")
    names = tmp_path / "names.txt"
    names.write_text("Köter\n\n a, b \nc\n", encoding="utf-8")
    add(tmp_path / "r", *own, "--classes", names)
    assert spec(tmp_path / "r").class_names == ("Köter", "a, b", "c")
    at = ("model", "add", "m", "--repository", tmp_path / "s", *own)
    assert "neither a file nor a list" in refused(*at, "--classes", tmp_path / "nams.txt")
    long = ",".join(f"a class with a name that goes on and on {index}" for index in range(400))
    assert "not [400]" in refused(*at, "--classes", long)
    names.write_bytes("Köter\nKatze".encode("latin-1"))
    assert "not a text file in UTF-8" in refused(*at, "--classes", names)
    assert "class names, each different" in refused(*at, "--classes", "a,b,a")


def test_options_override_one_field_each(tmp_path, files):
    out = add(
        tmp_path, "--weights", files / SQUEEZENET, "--size", "96x80", "--resize", 100, "--interpolation", "bicubic",
        "--mean", "103.939/255,116.779/255,123.68/255", "--std", "1/255", "--bgr",
    )  # fmt: skip
    mean = (103.939 / 255, 116.779 / 255, 123.68 / 255)
    assert spec(tmp_path).preprocessing == Preprocessing(96, 80, 100, "bicubic", mean, (1 / 255,) * 3, bgr=True)
    assert "BGR in [0, 1], minus (0.4076, 0.458, 0.485), divided by (0.003922, " in out
    assert "not its height, width, resize, interpolation, mean, std, bgr" in out
    add(tmp_path, "--weights", files / SQUEEZENET, "--resize", 0, "--replace")
    assert spec(tmp_path).preprocessing == Preprocessing(224, 224, None, **IMAGENET)
    at = ("model", "add", "m", "--repository", tmp_path, "--weights", files / SQUEEZENET)
    assert "give --resize with --size: the preset's (256)" in refused(*at, "--size", 64)
    assert "smaller than the crop" in refused(*at, "--size", 512, "--resize", 256)
    for text in ("1,2", "a", "1/0", "1,2,3,4", ""):
        assert "neither a number nor three" in refused(*at, "--mean", text)


def test_bcos_networks_bring_their_preprocessing(tmp_path):
    add(tmp_path, "--architecture", "bcos:cifar10_resnet20", "--weights", cifar() / "bcos_resnet20.safetensors")
    assert spec(tmp_path).preprocessing == Preprocessing(32, 32, inverse=True)
    assert spec(tmp_path).class_names == CLASS_NAMES
    model = Repository(tmp_path).load_model("m")
    right = 0
    for index, name in enumerate(CLASS_NAMES):
        images = [Image.open(path).convert("RGB") for path in sorted((cifar() / "test" / name).glob("*.jpg"))[:40]]
        with torch.no_grad():
            logits = model.module(model.inputs(np.stack([np.asarray(image) for image in images])))
        right += int((logits.argmax(1) == index).sum())
    assert right / 400 > 0.66  # 0.6967 on all test images (bcos_resnet20.json)


def test_the_preset_of_weights_one_names(tmp_path, files):
    at = ("model", "add", "m", "--repository", tmp_path)
    own = ("--architecture", "torchvision:squeezenet1_1", "--weights", files / "three.pth", "--classes", "a,b,c")
    assert "Weights.IMAGENET1K_V1: named by --like" in add(tmp_path, *own, "--like", "IMAGENET1K_V1")
    assert "--like 'V9' is none of IMAGENET1K_V1" in refused(*at, *own, "--like", "V9")
    assert "weights of torchvision's" in refused(
        *at, "--architecture", "demo.cifar:resnet20", "--like", "IMAGENET1K_V1"
    )


def test_what_no_preset_knows_is_asked_for_at_once(tmp_path, files):
    at = ("model", "add", "m", "--repository", tmp_path)
    assert "give --weights, --classes, --size: " in refused(*at, "--architecture", "demo.cifar:resnet20")
    assert "give --architecture, --weights, --classes, --size: " in refused(*at)
    assert "give --architecture, --classes, --size: " in refused(*at, "--weights", files / "pooled.safetensors")
    assert "give --weights: " in refused(*at, "--architecture", "bcos:resnet18")
    assert "give --size: " in refused(
        *at, "--architecture", "demo.cifar:resnet20", "--weights", "x", "--classes", "a,b"
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_weights_are_fetched_by_name(tmp_path, files, monkeypatch):
    """From torch's cache, which is where they are fetched to."""
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / SQUEEZENET).write_bytes((files / SQUEEZENET).read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    root = tmp_path / "repository"
    for arguments in (
        ("--architecture", "torchvision:squeezenet1_1", "--weights", "IMAGENET1K_V1"),
        ("--architecture", "torchvision:squeezenet1_1"),
        ("--weights", "SqueezeNet1_1_Weights.IMAGENET1K_V1"),
    ):
        add(root, *arguments)
        assert spec(root).architecture == "torchvision:squeezenet1_1"
    (cache / SQUEEZENET).write_bytes(b"something else")
    line = refused("model", "add", "m", "--repository", root, "--weights", "SqueezeNet1_1_Weights.IMAGENET1K_V1")
    assert "cannot be fetched" in line


def test_without_a_network_the_address_to_fetch_from_is_named(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    line = refused(
        "model", "add", "m", "--repository", tmp_path / "r", "--architecture", "torchvision:resnet50", "--weights",
        "IMAGENET1K_V2",
    )  # fmt: skip
    assert "fetch https://download.pytorch.org/models/resnet50-11ad3fa6.pth elsewhere" in line
    assert "--weights" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("factory", "more", "words"),
    [
        ("a_map", (), "logits of shape [2, n_classes] are needed"),
        ("a_pair", (), "the model answers tuple where logits"),
        ("picky", (), "only 48 pixels will do"),
        ("pooled", ("--classes", "a,b,c"), "2 outputs but 3 class names"),
        ("pooled", ("--options", '{"num_classes": 3}'), "head.weight is [2, 4], not [3, 4]"),
        ("pooled", ("--options", '{"depth": 3}'), "depth"),
        ("pooled", ("--inverse",), "to have 3 channels, but got 6 channels"),
        ("pooled", ("--interpolation", "magic"), "nearest, bilinear"),
        ("pooled", ("--std", "0"), "std must be positive"),
        ("raises", (), "out of luck"),
        ("not_a_module", (), "returned a Tensor"),
        ("nowhere", (), "no factory"),
    ],
)
def test_models_that_do_not_work_are_not_published(tmp_path, files, factory, more, words):
    given = {"--classes": "a,b", "--options": "{}", **dict(zip(more[::2], more[1::2], strict=False))}
    line = refused(
        "model", "add", "m", "--architecture", f"tests.offline.networks:{factory}", "--weights",
        files / "pooled.safetensors", "--size", 32, "--trust", "tests.offline.networks", "--repository", tmp_path,
        *(word for pair in given.items() for word in pair), *more[2 * (len(more) // 2) :],
    )  # fmt: skip
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_weights_that_answer_with_nan_are_not_published(tmp_path, files):
    state = load_file(files / "pooled.safetensors")
    state["head.bias"][1] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    line = refused(
        "model", "add", "m", "--architecture", "tests.offline.networks:pooled", "--classes", "a,b", "--size", 32,
        "--weights", tmp_path / "nan.safetensors", "--trust", "tests.offline.networks", "--repository", tmp_path / "r",
    )  # fmt: skip
    assert "NaN" in line
    assert not (tmp_path / "r").exists()


def test_the_description_is_what_was_printed(tmp_path, files):
    add(tmp_path, "--weights", files / SQUEEZENET)
    stored = json.loads((tmp_path / "models" / "m" / "model.json").read_text())
    assert Preprocessing.from_json(stored["preprocessing"]) == spec(tmp_path).preprocessing
    assert stored["preprocessing"]["bgr"] is False


@pytest.fixture(scope="module")
def keras(tmp_path_factory) -> Path:
    """The demo's network as another framework would have written it: NHWC, softmax at the end."""
    path = tmp_path_factory.mktemp("onnx") / "classifier.onnx"
    path.write_bytes(keras_style(MODELS["cnn"].load()))
    return path


WORLD = ("--classes", ",".join(MODELS["cnn"].class_names), "--mean", "0.5", "--std", "0.25")


def test_an_onnx_file_tells_its_input(tmp_path, keras):
    out = add(tmp_path, "--architecture", keras, *WORLD)
    found = spec(tmp_path)
    assert (found.architecture, found.weights_digest) == ("onnx", hashlib.sha256(keras.read_bytes()).hexdigest())
    assert found.preprocessing == MODELS["cnn"].preprocessing
    assert "64×64 pixels, 3 channels" in out
    assert "the file: NHWC input, opset" in out
    assert "its Softmax taken off" in out
    layers = run("layers", "m", "--repository", tmp_path)[1]
    assert re.search(r"cnn_stage3_1_Relu_0 +│ +96×16×16 +│ +16×16 .* yes +│ affine", layers)


def test_an_onnx_file_may_be_named_as_the_weights(tmp_path, keras):
    add(tmp_path, "--weights", keras, *WORLD)
    assert spec(tmp_path).architecture == "onnx"


def test_onnx_files_that_cannot_be_models(tmp_path, keras):
    at = ("model", "add", "m", "--repository", tmp_path)
    assert "give --classes" in refused(*at, "--architecture", keras)
    assert "15 outputs but 2 class names" in refused(*at, "--architecture", keras, "--classes", "a,b")
    assert "takes images of 3×64×64" in refused(*at, "--architecture", keras, *WORLD, "--size", 32)
    assert "no ONNX file" in refused(*at, "--architecture", tmp_path / "none.onnx", *WORLD)
    assert "takes no --options" in refused(*at, "--architecture", keras, *WORLD, "--options", '{"a": 1}')
    assert "needs no --onnx" in refused(*at, "--architecture", keras, *WORLD, "--onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(keras.read_bytes()[:5000])
    assert "damaged" in refused(*at, "--architecture", damaged, *WORLD)
    model = onnx.load(keras)
    model.graph.node[1].op_type = "Frobnicate"
    unknown = tmp_path / "unknown.onnx"
    unknown.write_bytes(model.SerializeToString())
    assert "Frobnicate" in refused(*at, "--architecture", unknown, *WORLD)
    assert Repository(tmp_path).models() == []


def test_a_network_can_be_exported_when_it_is_added(tmp_path, files):
    own = ("--architecture", "tests.offline.networks:Pooled", "--options", '{"num_classes": 2}', "--size", 16)
    out = add(
        tmp_path, *own, "--weights", files / "pooled.safetensors", "--classes", "a,b", "--onnx",
        "--trust", "tests.offline.networks",
    )  # fmt: skip
    found = spec(tmp_path)
    assert set(found.exported.values) == {"layer", "head"}
    assert f"ONNX file {found.exported.digest}, 2 layers" in out


def test_a_network_that_cannot_be_exported_is_not_added(tmp_path, files):
    own = ("--architecture", "tests.offline.networks:Moody", "--options", '{"num_classes": 2}', "--size", 16)
    common = (*own, "--weights", files / "pooled.safetensors", "--classes", "a,b", "--trust", "tests.offline.networks")
    at = ("model", "add", "m", "--repository", tmp_path)
    assert "add it without --onnx" in refused(*at, *common, "--onnx")
    assert Repository(tmp_path).models() == []
    assert run(*at, *common)[0] == 0
