"""Encoders: networks of the repository, ONNX files and the hub, all giving features on a grid."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from concepts.errors import InvalidCut, InvalidInput, UnknownLayer, UnknownModel
from concepts.model import ONNX, Model, ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import Repository
from offline.encoders import of_model, open_encoder
from offline.export import export
from tests.concepts.networks import tiny

CPU = torch.device("cpu")
SPEC = ModelSpec("net", "tests.concepts.networks:tiny", Preprocessing(12, 8, mean=(0.1, 0.2, 0.3)), ("a", "b"), "")
VIEWS = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Repository:
    """Hold a network, and the same as an ONNX file."""
    files = Repository(tmp_path_factory.mktemp("encoders"), ("tests.concepts",))
    torch.manual_seed(0)
    files.publish_model(SPEC, tiny().state_dict())
    content, _ = export(files.load_model("net"))
    files.publish_model(dataclasses.replace(SPEC, name="file", architecture=ONNX), content)
    return files


def by_hand(repository: Repository) -> torch.Tensor:
    """Return what the network's first part makes of the views in its own size."""
    fitted = np.stack([np.asarray(Image.fromarray(view).resize((8, 12), Image.Resampling.BILINEAR)) for view in VIEWS])
    x = (torch.from_numpy(fitted).permute(0, 3, 1, 2) / 255 - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)).float()
    return repository.load_model("net").module.layer3(x)


def test_a_network_encodes_views_of_any_size_by_a_layer(repository):
    encoder = open_encoder("net/layer3", repository, CPU)
    found = encoder(VIEWS)
    assert encoder.name == "net/layer3"
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(repository))
    assert found.shape == (5, 4, 10, 6)  # rows first: views are higher than wide
    torch.testing.assert_close(encoder(VIEWS[:2]), found[:2])


def test_an_onnx_file_encodes_as_the_network_does(repository):
    layers = [layer.name for layer in repository.load_model("file").layers()]
    encoders = [open_encoder(f"file/{layer}", repository, CPU)(VIEWS) for layer in layers]
    same = [found for found in encoders if found.shape == (5, 4, 10, 6) and bool((found >= 0).all())]
    torch.testing.assert_close(same[0], by_hand(repository), rtol=1e-4, atol=1e-5)


class _Tokens(nn.Module):
    """A token without a place, and six with one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Identity()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        cells = nn.functional.avg_pool2d(x, 4).flatten(2).mT
        return self.head(self.tokens(torch.cat([cells.mean(1, keepdim=True), cells], 1)).mean(1))


def test_tokens_lie_on_the_grid_of_the_image():
    spec = dataclasses.replace(SPEC, preprocessing=Preprocessing(12, 8))
    model = Model(spec, _Tokens().eval().requires_grad_(False), CPU)
    found = of_model(model, "tokens")(VIEWS)
    fitted = np.stack([np.asarray(Image.fromarray(view).resize((8, 12), Image.Resampling.BILINEAR)) for view in VIEWS])
    expected = fitted.reshape(5, 3, 4, 2, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        ("net", InvalidInput, "'net' must be MODEL/LAYER of the repository, or hub:"),
        ("", InvalidInput, "must be MODEL/LAYER"),
        ("net/", InvalidInput, "must be MODEL/LAYER"),
        ("other/layer3", UnknownModel, "no model 'other'; models: file, net"),
        ("net/layer4", UnknownLayer, "layer3"),
        ("net/layer3/1", UnknownLayer, "layer3"),
        ("../net/layer3", InvalidInput, "model"),
        ("hub:", InvalidInput, "cannot be the name of a network in the hub"),
        ("hub:../../else", InvalidInput, "cannot be the name of a network in the hub"),
    ],
)
def test_references_that_name_nothing_are_refused(repository, reference, error, words):
    with pytest.raises(error, match=words):
        open_encoder(reference, repository, CPU)


def test_layers_that_cannot_be_cut_are_refused():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head((x + self.one(x)).mean((2, 3)))

    with pytest.raises(InvalidCut, match="bypassed"):
        of_model(Model(SPEC, Skips().eval().requires_grad_(False), CPU), "one")


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """Let the hub be empty, and nothing be reached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


def test_a_hub_that_cannot_be_reached_is_said_with_the_remedy(repository, unreachable):
    with pytest.raises(InvalidInput, match=r"'dinov2_vits14' cannot be fetched from the hub: .*MODEL/LAYER") as refusal:
        open_encoder("hub:dinov2_vits14", repository, CPU)
    assert "127.0.0.1" not in refusal.value.message


_HUB = """
import torch
dependencies = ["torch"]

class Patches(torch.nn.Module):
    def forward_features(self, x):
        cells = torch.nn.functional.avg_pool2d(x, 14).flatten(2).mT
        return {"x_norm_patchtokens": cells, "x_norm_clstoken": cells[:, 0]}

def dinov2_small():
    return Patches()
"""


def test_what_the_hub_has_fetched_before_is_used(repository, unreachable):
    folder = unreachable / "facebookresearch_dinov2_main"
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(_HUB)
    encoder = open_encoder("hub:dinov2_small", repository, CPU)
    found = encoder(VIEWS)
    assert encoder.name == "hub:dinov2_small"
    large = np.stack([np.asarray(Image.fromarray(v).resize((224, 224), Image.Resampling.BILINEAR)) for v in VIEWS])
    normal = (large / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = normal.reshape(5, 16, 14, 16, 14, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    with pytest.raises(InvalidInput, match="cannot be fetched"):
        open_encoder("hub:dinov2_other", repository, CPU)
