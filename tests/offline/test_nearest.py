"""The nearest places, against a search with all images at hand, in float64."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from concepts.layout import Layout
from concepts.preprocessing import Box, Preprocessing
from offline import nearest as module
from offline.nearest import Nearest, Place, corner, excerpt

IMAGES, CHANNELS, CONCEPTS = 40, 5, 6
VIEW = Preprocessing(30, 60)
OWNERS = [0, 0, 1, 1, 2, 2]
LAYOUTS = [Layout("btc", CHANNELS, (3, 5), 2), Layout("bchw", CHANNELS, (1, 1), 0), Layout("bchw", CHANNELS, (4, 1), 0)]


def world(layout: Layout):
    g = torch.Generator().manual_seed(0)
    positions = torch.rand(IMAGES, layout.positions, CHANNELS, generator=g)
    positions[7:12] = positions[3]  # equals: the first stays
    dictionary = torch.rand(CONCEPTS, CHANNELS, generator=g)
    predicted = torch.randint(0, 4, (IMAGES,), generator=g)
    boxes = [Box(row, 2 * row, row + 60, 2 * row + 30) for row in range(IMAGES)]
    return positions, dictionary, predicted, [f"{row}.png" for row in range(IMAGES)], boxes


def expected(layout: Layout, positions, direction, allowed, count: int) -> list[tuple[int, tuple[float, float], float]]:
    """Return image, centre and cosine of the nearest windows of one concept, one an image."""
    rows, columns = layout.grid
    high, wide = min(2, rows), min(2, columns)
    found = []
    for image in np.flatnonzero(allowed):
        grid = positions[image, layout.tokens :].double().numpy().reshape(rows, columns, -1)
        windows = {}
        for row in range(rows - high + 1):
            for column in range(columns - wide + 1):
                mean = grid[row : row + high, column : column + wide].mean((0, 1))
                cosine = mean @ direction / np.linalg.norm(mean) / np.linalg.norm(direction)
                windows[(row + high / 2) / rows, (column + wide / 2) / columns] = cosine
        best = max(windows, key=windows.get)
        found.append((image, best, windows[best]))
    return sorted(found, key=lambda place: -round(place[2], 6))[:count]


def test_images_are_compared_one_by_one_where_memory_asks_for_it(monkeypatch):
    """Chunks are hidden: the answer is that of all at once."""
    positions, dictionary, predicted, keys, boxes = world(LAYOUTS[0])
    found = []
    for most in (1, 2**25):
        monkeypatch.setattr(module, "_COSINES", most)
        nearest = nearest_of(LAYOUTS[0], dictionary)
        nearest.add(keys, boxes, positions, predicted)
        found.append(nearest.found())
    for one, all_at_once in zip(chain(*found[0].nearest.values()), chain(*found[1].nearest.values()), strict=True):
        assert [place._replace(cosine=0.0) for place in one] == [place._replace(cosine=0.0) for place in all_at_once]


def nearest_of(layout: Layout, dictionary: torch.Tensor) -> Nearest:
    dictionaries = {target: dictionary[torch.tensor(OWNERS) == target] for target in range(3)}
    return Nearest(layout, dictionaries, 5, torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 7, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_nearest_are_found_as_with_all_at_hand(layout, batch_size):
    positions, dictionary, predicted, keys, boxes = world(layout)
    nearest = nearest_of(layout, dictionary)
    for first in range(0, IMAGES, batch_size):
        rows = slice(first, first + batch_size)
        nearest.add(keys[rows], boxes[rows], positions[rows], predicted[rows])
    for others, found in enumerate(nearest.found()):
        for concept, places in enumerate(chain(*found.values())):
            allowed = (predicted != OWNERS[concept]).numpy() if others else np.ones(IMAGES, bool)
            wanted = expected(layout, positions, dictionary[concept].double().numpy(), allowed, 5)
            assert [place.key for place in places] == [keys[image] for image, _, _ in wanted]
            for place, (image, centre, cosine) in zip(places, wanted, strict=True):
                assert place.view == boxes[image]
                assert place.centre == pytest.approx(centre)
                assert place.cosine == pytest.approx(cosine, abs=1e-6)


def test_there_may_be_fewer_places_than_are_wanted():
    layout = LAYOUTS[0]
    positions, dictionary, _, keys, boxes = world(layout)
    nearest = nearest_of(layout, dictionary)
    nearest.add(keys[:3], boxes[:3], positions[:3], torch.tensor([0, 1, 0]))
    assert [[len(places) for places in found] for found in nearest.found().elsewhere.values()] == [
        [1, 1],
        [2, 2],
        [3, 3],
    ]
    nothing = nearest_of(layout, dictionary)
    nothing.add(keys[:3], boxes[:3], torch.zeros(3, layout.positions, CHANNELS), torch.zeros(3, dtype=torch.int64))
    assert nothing.found().nearest == {target: [[], []] for target in range(3)}


@pytest.mark.parametrize(
    ("centre", "upper_left"), [((0.5, 0.5), (10, 20)), ((0.0, 0.0), (0, 0)), ((1.0, 0.9), (20, 40))]
)
def test_rectangles_stay_within_the_view(centre, upper_left):
    assert corner(Place("x", Box(0, 0, 60, 30), centre, 1.0), VIEW, 10, 20) == upper_left


def test_what_is_shown_of_a_place_lies_in_the_pixels_of_the_original():
    place = Place("x", Box(100, 200, 220, 230), (0.5, 0.5), 0.75)  # 120×30 pixels, seen as 60×30
    shown = excerpt(place, Layout("bchw", 4, (6, 6), 0), VIEW)
    assert shown == ("x", Box(130, 208, 190, 223), 0.75)
    assert excerpt(place, Layout("bchw", 4, (1, 1), 0), VIEW).box == place.view  # the window is all of it
