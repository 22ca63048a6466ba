"""Preprocessing against torchvision's own transforms, on photographs of many shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from concepts.errors import InvalidImage, InvalidModel
from concepts.preprocessing import Box, Preprocessing
from tests.data import real_data

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def photos() -> list[Path]:
    return sorted((real_data() / "photos").glob("*.JPEG"))


def test_the_photographs_are_as_varied_as_they_should_be() -> None:
    shapes = []
    for path in photos():
        with Image.open(path) as image:
            shapes.append((image.mode, image.width / image.height, image.width))
    modes, aspects, widths = map(set, zip(*shapes, strict=True))
    assert modes >= {"L", "RGB"}
    assert min(aspects) < 0.7
    assert max(aspects) > 1.4
    assert min(widths) < 100
    assert max(widths) > 2000


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_are_torchvisions(interpolation: str) -> None:
    preprocessing = Preprocessing(64, 48, resize=72, interpolation=interpolation, **IMAGENET)  # type: ignore[arg-type]
    mode = InterpolationMode(interpolation)
    for path in photos():
        image = Image.open(path).convert("RGB")
        view, _ = preprocessing.fit(image)
        expected = reference.center_crop(reference.resize(image, [72], mode), [64, 48])
        assert view.shape == (64, 48, 3)
        assert view.dtype == np.uint8
        difference = np.abs(view.astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 1, (path.name, difference.max())
        tensor = preprocessing.normalize(torch.from_numpy(view.copy())[None])[0]
        wanted = reference.normalize(reference.to_tensor(expected), [*IMAGENET["mean"]], [*IMAGENET["std"]])
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1.01 / 255 / 0.224)


def test_without_a_resize_the_whole_image_is_stretched() -> None:
    preprocessing = Preprocessing(40, 56)
    for path in photos()[:8]:
        image = Image.open(path).convert("RGB")
        view, box = preprocessing.fit(image)
        expected = reference.resize(image, [40, 56])
        assert np.abs(view.astype(int) - np.asarray(expected).astype(int)).max() <= 1
        assert box == Box(0, 0, image.width, image.height)
    exact = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    assert np.array_equal(preprocessing.fit(exact)[0], np.asarray(exact))


@pytest.mark.parametrize(
    "size", [(300, 200), (200, 300), (641, 97), (97, 641), (72, 72), (71, 500), (1000, 73), (30, 20)]
)
@pytest.mark.parametrize("resize", [None, 72])
def test_a_bright_block_is_where_the_box_says(size: tuple[int, int], resize: int | None) -> None:
    """Where a block lands in the view, mapped through the box, is where it was in the original."""
    width, height = size
    preprocessing = Preprocessing(64, 48, resize=resize)
    _, box = preprocessing.fit(Image.new("RGB", size))
    for across, down in ((0.3, 0.3), (0.5, 0.7), (0.75, 0.4)):
        # A block within what the view shows, a tenth of it wide.
        left = box.left + across * (box.right - box.left)
        top = box.top + down * (box.bottom - box.top)
        edges = [left, top, left + (box.right - box.left) / 10, top + (box.bottom - box.top) / 10]
        block = [max(round(edge), 0) for edge in edges]
        block[2], block[3] = max(block[2], block[0] + 1), max(block[3], block[1] + 1)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[block[1] : block[3], block[0] : block[2]] = 255
        view, same_box = preprocessing.fit(Image.fromarray(pixels))
        assert same_box == box
        weight = view[..., 0] / view[..., 0].sum(dtype=float)
        seen_x = box.left + ((np.arange(48) + 0.5) * weight.sum(0)).sum() / 48 * (box.right - box.left)
        seen_y = box.top + ((np.arange(64) + 0.5) * weight.sum(1)).sum() / 64 * (box.bottom - box.top)
        # Half a pixel of the view, in pixels of the original: what 8-bit resampling of a small block can lose.
        assert seen_x == pytest.approx((block[0] + block[2]) / 2, abs=0.5 * max((box.right - box.left) / 48, 1))
        assert seen_y == pytest.approx((block[1] + block[3]) / 2, abs=0.5 * max((box.bottom - box.top) / 64, 1))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (641, 97), (97, 641)])
def test_the_crop_is_in_the_middle_and_keeps_the_aspect(size: tuple[int, int]) -> None:
    _, box = Preprocessing(64, 64, resize=72).fit(Image.new("RGB", size))
    scale = min(size) / 72
    assert box.right - box.left == pytest.approx(64 * scale, rel=0.02)
    assert box.bottom - box.top == pytest.approx(64 * scale, rel=0.02)
    assert (box.left + box.right) / 2 == pytest.approx(size[0] / 2, abs=scale)
    assert (box.top + box.bottom) / 2 == pytest.approx(size[1] / 2, abs=scale)


def test_inverse_channels() -> None:
    preprocessing = Preprocessing(5, 4, inverse=True)
    view = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8))
    before = view.clone()
    x = preprocessing.normalize(view)
    assert preprocessing.channels == 6
    assert x.shape == (2, 6, 5, 4)
    torch.testing.assert_close(x[:, :3], view.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(x[:, 3:], 1 - x[:, :3])
    assert torch.equal(view, before)
    assert Preprocessing(5, 4).normalize(view).shape == (2, 3, 5, 4)


def test_reversed_channels_and_other_ranges() -> None:
    """Keras's *caffe* mode: BGR from 0 to 255, less the mean of each."""
    mean = np.array([103.939, 116.779, 123.68])
    blue, green, red = (mean / 255).tolist()
    preprocessing = Preprocessing(5, 4, mean=(blue, green, red), std=(1 / 255,) * 3, bgr=True)
    view = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = view[..., ::-1].astype(float) - mean
    x = preprocessing.normalize(torch.from_numpy(view))
    torch.testing.assert_close(x.double(), torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=0, atol=1e-4)
    assert x.is_contiguous(memory_format=torch.channels_last)

    twice = Preprocessing(5, 4, inverse=True, bgr=True).normalize(torch.from_numpy(view))
    assert torch.equal(twice[:, :3], Preprocessing(5, 4).normalize(torch.from_numpy(view))[:, [2, 1, 0]])
    torch.testing.assert_close(twice[:, 3:], 1 - twice[:, :3])
    centred = Preprocessing(5, 4, mean=(0.5,) * 3, std=(0.5,) * 3).normalize(torch.from_numpy(view))
    torch.testing.assert_close(centred, torch.from_numpy(view / 127.5 - 1).float().permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, "no pixels"),
        ({"width": -3}, "no pixels"),
        ({"resize": 63}, "smaller than the crop"),
        ({"interpolation": "magic"}, "nearest, bilinear"),
        ({"std": (1.0, 0.0, 1.0)}, "positive"),
    ],
)
def test_what_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        Preprocessing(**{"height": 64, "width": 48, **changes})


def test_json_round_trip() -> None:
    preprocessing = Preprocessing(64, 48, resize=72, interpolation="bicubic", inverse=True, bgr=True, **IMAGENET)
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    older = {key: value for key, value in preprocessing.to_json().items() if key != "bgr"}
    assert Preprocessing.from_json(older) == replace(preprocessing, bgr=False)
    for wrong in ({"height": 3}, {**preprocessing.to_json(), "sise": 3}, {**preprocessing.to_json(), "mean": None}):
        with pytest.raises(InvalidModel, match="cannot be read"):
            Preprocessing.from_json(wrong)


def test_what_would_be_blown_up_is_refused() -> None:
    view = Preprocessing(32, 32, 40)
    view.fit(Image.new("RGB", (50, 2500)))
    for size in ((1, 10_000), (2501, 50)):
        with pytest.raises(InvalidImage, match="too narrow"):
            view.fit(Image.new("RGB", size))
    with pytest.raises(InvalidModel, match="8192 pixels at most"):
        Preprocessing(99_999_999, 32)
    with pytest.raises(InvalidModel, match="8192 pixels at most"):
        Preprocessing(32, 32, 999_999)
