"""Weights files as training scripts and publishers write them, and files that must not be read."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import densenet
from torchvision.models.vision_transformer import VisionTransformer

from concepts.errors import InvalidInput
from offline.weights import read_weights


def a_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_wrappers_are_taken_off(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    state: dict[str, Any] = {prefix + key: value for key, value in a_state().items()}
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), a_state())
    save_file(state, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"), a_state())


def test_older_forms_of_files(tmp_path: Path) -> None:
    torch.save(a_state(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "w.pt"), a_state())


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "within"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "w.pth"
    trap = _Trap(mark)
    if form == "pickle":
        file.write_bytes(pickle.dumps({"state_dict": trap}))
    else:
        content = {**a_state(), "extra": trap} if form == "within" else trap
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(InvalidInput, match="holds more than tensors and is not read"):
        read_weights(file)
    assert not mark.exists()
    with file.open("rb") as stream:  # the trap works
        if form == "pickle":
            pickle.load(stream)
        else:
            torch.load(stream, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 3}, "not a state dictionary"),
        ([torch.zeros(2)], "not a state dictionary"),
        (torch.zeros(2), "not a state dictionary"),
        ({"state_dict": {"a": "b"}}, "not a state dictionary"),
        (nn.Linear(2, 2), "holds more than tensors"),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InvalidInput, match=words):
        read_weights(tmp_path / "w.pth")


def test_old_names_of_densenets(tmp_path: Path) -> None:
    """Against torchvision's own loader of its published files."""
    torch.manual_seed(0)
    network = densenet.DenseNet(growth_rate=4, block_config=(2, 1, 2, 1), num_init_features=8, num_classes=3)
    state = network.state_dict()
    dots = {f"{part}{n}": f"{part}.{n}" for part in ("norm", "conv") for n in (1, 2)}
    old = {
        ".".join(dots.get(part, part) if "denselayer" in key else part for part in key.split(".")): value
        for key, value in state.items()
    }
    assert "features.denseblock1.denselayer2.norm.1.running_var" in old
    torch.save(old, tmp_path / "densenet.pth")
    assert same(read_weights(tmp_path / "densenet.pth", "torchvision:densenet121"), state)
    theirs = densenet.DenseNet(growth_rate=4, block_config=(2, 1, 2, 1), num_init_features=8, num_classes=3)
    published = {key: value for key, value in old.items() if not key.endswith("num_batches_tracked")}
    densenet._load_state_dict(theirs, SimpleNamespace(get_state_dict=lambda **_: published), progress=False)  # type: ignore[arg-type]
    assert same(theirs.state_dict(), state)
    assert not same(read_weights(tmp_path / "densenet.pth", "demo.x:y"), state)


def test_old_names_of_vits(tmp_path: Path) -> None:
    """Against what torchvision's own blocks do when they load old files."""

    def vit() -> VisionTransformer:
        return VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)

    torch.manual_seed(0)
    state = vit().state_dict()
    old = {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for key, v in state.items()}
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
    save_file(old, tmp_path / "vit.safetensors")
    assert same(read_weights(tmp_path / "vit.safetensors", "torchvision:vit_b_16"), state)
    theirs = vit()
    theirs.load_state_dict(dict(old))
    assert same(theirs.state_dict(), state)
