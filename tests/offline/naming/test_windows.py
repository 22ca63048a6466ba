"""Windows over images: where they lie, and what a layer sees in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from concepts.layout import Layout
from concepts.preprocessing import Box, Preprocessing
from offline.naming.windows import Seen, WindowGrid

PLAIN = Preprocessing(64, 64)


def activations(layout: Layout, images: int = 3) -> torch.Tensor:
    shape = (images, layout.positions, layout.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


GRIDS = [
    WindowGrid(Layout("bchw", 5, (8, 8), 0), PLAIN, 0.5),
    WindowGrid(Layout("bhwc", 3, (16, 16), 0), PLAIN, 0.2),
    WindowGrid(Layout("bchw", 4, (7, 7), 0), PLAIN, 0.34),
    WindowGrid(Layout("bchw", 4, (32, 32), 0), PLAIN, 0.05),
    WindowGrid(Layout("btc", 6, (4, 4), 1), PLAIN, 0.5),
    WindowGrid(Layout("btc", 6, (4, 8), 5), Preprocessing(32, 64), 1.0),
    WindowGrid(Layout("bc", 4, (1, 1), 0), PLAIN, 0.3),
    WindowGrid(Layout("bchw", 2, (6, 12), 0), Preprocessing(48, 96), 0.4),
    WindowGrid(Layout("bchw", 2, (5, 5), 0), PLAIN, 1.0),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.layout.grid} {grid.side}")
def test_windows_are_the_means_of_what_their_boxes_show(grid: WindowGrid) -> None:
    """Each window's mean, by a loop over the cells whose middle its box holds."""
    layout, view = grid.layout, Box(0, 0, grid.view.width, grid.view.height)
    a = activations(layout)
    means = grid.means(a)
    rows, columns = layout.grid
    cells = a[:, layout.tokens :].double().numpy()
    boxes = [grid.box(window, view) for window in range(means.shape[1])]
    assert len(set(boxes)) == len(boxes) <= 25
    for window, box in enumerate(boxes):
        assert 0 <= box.left < box.right <= view.right + 1e-9
        assert 0 <= box.top < box.bottom <= view.bottom + 1e-9
        inside = [
            row * columns + column
            for row in range(rows)
            for column in range(columns)
            if box.left <= (column + 0.5) * view.right / columns <= box.right
            and box.top <= (row + 0.5) * view.bottom / rows <= box.bottom
        ]
        assert len(inside) == math.prod(grid.size)
        np.testing.assert_allclose(means[:, window], cells[:, inside].mean(1), atol=1e-5)
        # What is measured of an exemplar that is a window is what the window has.
        for image in range(len(a)):
            torch.testing.assert_close(grid.mean_within(a[image], box, view), means[image, window])


def test_windows_have_the_size_of_exemplars_and_overlap() -> None:
    assert GRIDS[0].size == (4, 4)
    assert GRIDS[0].stride == (2, 2)
    assert GRIDS[7].size == (2, 2)  # of 48 × 96 pixels, 19 are 2 of 6 rows and 2 of 12 columns
    assert GRIDS[3].size == (2, 2)
    assert GRIDS[3].stride == (8, 8)  # at most five along a side
    assert GRIDS[6].means(activations(GRIDS[6].layout)).shape == (3, 1, 4)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 100), (90, 300), (33, 47)])
@pytest.mark.parametrize("resize", [None, 36])
def test_boxes_are_in_pixels_of_images_that_are_resized_and_cropped(
    width: int, height: int, resize: int | None
) -> None:
    """A bright square of an image is found again through what the model sees of it, and the other way round."""
    preprocessing = Preprocessing(32, 32, resize=resize)
    grid = WindowGrid(Layout("bhwc", 3, (32, 32), 0), preprocessing, 0.25)
    bare = np.zeros((height, width, 3), np.uint8)
    _, view = preprocessing.fit(Image.fromarray(bare))
    for window in (0, 6, 12, 24):
        box = grid.box(window, view)
        shown = bare.copy()
        top, left = max(round(box.top), 0), max(round(box.left), 0)
        shown[top : round(box.bottom), left : round(box.right)] = 255
        positions = torch.from_numpy(np.array(preprocessing.fit(Image.fromarray(shown))[0])).flatten(0, 1).float() / 255
        inside = grid.mean_within(positions, box, view)
        assert float(inside.min()) > 0.75
        means = grid.means(positions.unsqueeze(0))[0, :, 0]
        assert int(means.argmax()) == window
        assert float(means[window]) == pytest.approx(float(inside[0]))
        assert float(positions.mean()) < 0.12


def test_boxes_beyond_what_the_model_sees_have_a_cell_at_least() -> None:
    grid = GRIDS[0]
    a, view = activations(grid.layout)[0], Box(0, 0, 64, 64)
    cells = a.unflatten(0, (8, 8))
    torch.testing.assert_close(grid.mean_within(a, Box(-9, -9, -1, -1), view), cells[0, 0])
    torch.testing.assert_close(grid.mean_within(a, Box(70, 8, 90, 16), view), cells[1, 7])
    torch.testing.assert_close(grid.mean_within(a, Box(25, 33, 25.5, 33.5), view), cells[4, 3])
    torch.testing.assert_close(grid.mean_within(a, Box(-8, -8, 72, 72), view), a.mean(0))


def test_what_was_seen_is_of_probes_and_within_boxes_of_any_image() -> None:
    grid = GRIDS[4]
    a, view = activations(grid.layout, 4), Box(0, 0, 64, 64)
    other = Box(10, 0, 74, 64)
    boxes = {"b": {Box(0, 0, 16, 16), Box(16, 16, 64, 64)}, "d": {Box(10, 0, 26, 16)}, "absent": {view}}
    seen = Seen(grid)
    seen.add(["a", "b"], [view, view], a[:2], boxes, frozenset("acd"))
    seen.add(["c", "d"], [view, other], a[2:], boxes, frozenset("acd"))
    seen.add(["b"], [view], a[1:2], boxes, frozenset())
    assert seen.keys == ["a", "c", "d"]
    assert seen.views == [view, view, other]
    torch.testing.assert_close(torch.cat(seen.windows), grid.means(a[[0, 2, 3]]))
    assert seen.within.keys() == {("b", box) for box in boxes["b"]} | {("d", Box(10, 0, 26, 16))}
    torch.testing.assert_close(seen.within["b", Box(0, 0, 16, 16)], a[1, 1])  # position 0 is the class token
    torch.testing.assert_close(seen.within["d", Box(10, 0, 26, 16)], a[3, 1])
