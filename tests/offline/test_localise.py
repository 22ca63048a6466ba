"""Localisation on the known-concepts world: concepts that are the truth score as such."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

from concepts.errors import CorruptData
from concepts.kinds.nmf import NmfCodec
from concepts.model import Model, ModelSpec
from concepts.preprocessing import Preprocessing
from offline.images import Stream, open_folder
from offline.localise import localise
from offline.truth import read_truth

SIDE = 16


class _Colours(nn.Module):
    """Its layer is the image itself: each channel is a concept."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ReLU()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(self.layer(x).mean((2, 3)))


@pytest.fixture
def world(tmp_path):
    """Images with a red or a green square, or both, and the truth about them."""
    g = np.random.default_rng(0)
    files, present, masks = [], [], []
    for number in range(12):
        pixels, mask = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((2, SIDE, SIDE), np.uint8)
        shown = [number % 2 == 0, number % 3 == 0]
        for channel in range(2):
            top = int(g.integers(0, 10))
            if shown[channel]:
                mask[channel, top : top + 5, 8 * channel : 8 * channel + 5] = 1
                pixels[..., channel] = 255 * mask[channel]
        files.append(f"{number:02d}.png")
        Image.fromarray(pixels).save(tmp_path / files[-1])
        present.append(shown)
        masks.append(mask)
    arrays = {"masks": np.packbits(np.stack(masks), axis=-1), "attributes": np.array(present, np.uint8)}
    save_file(arrays, tmp_path / "truth.safetensors")
    (tmp_path / "truth.json").write_text(json.dumps({"attributes": ["red", "green"], "files": files}))
    return tmp_path


def test_concepts_that_are_the_attributes_are_found(world):
    preprocessing = Preprocessing(SIDE, SIDE)
    model = Model(
        ModelSpec("m", "demo.none:none", preprocessing, ("a", "b"), ""),
        _Colours().eval().requires_grad_(False),
        torch.device("cpu"),
    )
    codec = NmfCodec(torch.eye(3)[[1, 2, 0]], [0, 0, 1])  # green, blue; red
    folder = open_folder(world)
    truth = read_truth(world)
    assert truth is not None
    found = localise(model, model.cut("layer"), codec, 3, Stream(folder, folder.keys, preprocessing, 5), truth)
    assert found is not None
    assert found["images"] == 12
    assert {name: record["concept"] for name, record in found["attributes"].items()} == {"red": 2, "green": 0}
    assert found["auroc"] == found["pointing_game"] == found["iou"] == 1


def test_truth_must_fit_together(world):
    names = json.loads((world / "truth.json").read_text())
    (world / "truth.json").write_text(json.dumps(names | {"files": names["files"][:5]}))
    with pytest.raises(CorruptData, match="names"):
        read_truth(world)
    (world / "truth.json").unlink()
    assert read_truth(world) is None
