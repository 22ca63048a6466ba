"""Maps over pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from service.overlay import overlay


def drawn(view: np.ndarray, values: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(overlay(view, values.astype(np.float32)))) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def test_colour_lies_where_the_map_is_and_nowhere_else() -> None:
    view = np.full((40, 60, 3), 128, np.uint8)
    values = np.zeros((4, 6))
    values[0, 5] = 1.0  # top right
    values[3, 0] = -1.0  # bottom left
    picture = drawn(view, values)
    assert picture.shape == (40, 60, 3)
    red, green, blue = picture[2, 57]
    assert red > 200
    assert blue < 60
    assert green < 80
    red, green, blue = picture[37, 2]
    assert blue > 200
    assert red < 80
    assert (picture[20, 30] == 128).all()
    assert (picture[37, 57] == 128).all()


def test_nothing_shows_the_image_itself() -> None:
    view = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    assert np.array_equal(drawn(view, np.zeros((3, 3))), view)


def test_the_scale_of_the_map_does_not_matter() -> None:
    view = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    values = np.random.default_rng(1).normal(size=(4, 4))
    assert np.abs(drawn(view, values) - drawn(view, values * 1e-6)).max() <= 1
