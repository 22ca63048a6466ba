"""Geometry of crops: sizes, order, and where they lie in the original image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from concepts.errors import InvalidInput
from concepts.preprocessing import Box, Preprocessing
from offline.crops import CropGrid


def test_stride_is_four_fifths_rounded_down():
    grid = CropGrid.of(Preprocessing(224, 224), 64)
    assert (grid.stride, grid.rows, grid.columns, grid.count) == (51, 4, 4, 16)
    assert CropGrid.of(Preprocessing(32, 48), 16).count == 2 * 3


def test_crops_are_the_pixels_of_their_boxes():
    grid = CropGrid.of(Preprocessing(32, 48), 16, enlarge=False)
    inputs = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    crops = grid.crops(inputs)
    assert crops.shape == (3 * grid.count, 3, 16, 16)
    for index in range(grid.count):
        left, top, right, bottom = (int(edge) for edge in grid.box(index, Box(0, 0, 48, 32)))
        for image in range(3):
            assert torch.equal(crops[image * grid.count + index], inputs[image, :, top:bottom, left:right])


def test_enlarged_crops_are_bilinear_at_the_size_of_the_view():
    small, large = (CropGrid.of(Preprocessing(40, 32), 20, enlarge=enlarge) for enlarge in (False, True))
    inputs = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    patch = small.crops(inputs)[1]
    reference = [
        Image.fromarray(channel.numpy(), mode=None).resize((32, 40), Image.Resampling.BILINEAR) for channel in patch
    ]
    crop = large.crops(inputs)[1]
    assert crop.shape == (3, 40, 32)
    np.testing.assert_allclose(crop.numpy(), np.stack([np.asarray(channel) for channel in reference]), atol=1e-5)


def test_box_follows_resize_and_centre_crop():
    preprocessing = Preprocessing(64, 64, resize=80)
    pixels = np.zeros((200, 400, 3), np.uint8)
    _, view = preprocessing.fit(Image.fromarray(pixels))
    grid = CropGrid.of(preprocessing, 32)  # stride 25
    box = grid.box(3, view)
    # The view is 160 of 200 rows and 160 of 400 columns, from (120, 20); a view pixel is 2.5 image pixels.
    assert tuple(box) == pytest.approx((120 + 62.5, 20 + 62.5, 120 + 142.5, 20 + 142.5))


@pytest.mark.parametrize("patch_size", [0, 1, 33])
def test_patch_must_fit(patch_size):
    with pytest.raises(InvalidInput, match="ask for 2 to 32"):
        CropGrid.of(Preprocessing(32, 64), patch_size)
