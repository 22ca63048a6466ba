"""The gallery, against a choice made with all images at hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concepts.codec import SparseCodes
from concepts.kinds.sae import SaeCodec
from concepts.layout import Layout
from concepts.preprocessing import Box, Preprocessing
from offline.gallery import Gallery, most_active

GRID = Layout("btc", 4, (3, 5), 2)
"""Two tokens without a place, and three rows of five cells."""
VIEW = Preprocessing(30, 60)
CONCEPTS, IMAGES, K = 12, 40, 3


def world(seed: int, levels: int) -> tuple[torch.Tensor, torch.Tensor, list[str], list[Box]]:
    """Return values, concepts, keys and boxes of images; few levels make many equal peaks."""
    g = np.random.default_rng(seed)
    values = torch.from_numpy(g.integers(0, levels, (IMAGES, GRID.positions, K)).astype(np.float32))
    values[5] = 0  # an image that excites nothing
    wanted = g.permuted(np.tile(np.arange(1, CONCEPTS), (IMAGES, GRID.positions, 1)), axis=2)[..., :K]
    boxes = [Box(*(left := g.uniform(0, 50, 2)), *(left + g.uniform(20, 90, 2))) for _ in range(IMAGES)]
    return values, torch.from_numpy(wanted), [f"{row}.png" for row in range(IMAGES)], boxes


def expected(values, concepts, keys, boxes, count: int, side: int) -> list[list[tuple[str, Box, float]]]:
    found = []
    for concept in range(CONCEPTS):
        maps = (values * (concepts == concept)).sum(2).numpy()
        order = sorted(range(IMAGES), key=lambda row: (-maps[row].max(), row))
        found.append(
            [
                (keys[row], square(int(maps[row].argmax()), boxes[row], side), float(maps[row].max()))
                for row in order[:count]
                if maps[row].max() > 0
            ]
        )
    return found


def square(position: int, box: Box, side: int) -> Box:
    """Return a position's square: as near to its cell's centre as the view allows."""
    if position < GRID.tokens:
        return box
    row, column = divmod(position - GRID.tokens, 5)
    high, wide = min(side, 30), min(side, 60)
    top = np.clip(10 * row + 5 - high / 2, 0, 30 - high)
    left = np.clip(12 * column + 6 - wide / 2, 0, 60 - wide)
    xs = np.interp([left, left + wide], [0, 60], [box.left, box.right])
    ys = np.interp([top, top + high], [0, 30], [box.top, box.bottom])
    return Box(xs[0], ys[0], xs[1], ys[1])


@pytest.mark.parametrize("batch_size", [1, 7, 40])
@pytest.mark.parametrize(("levels", "side"), [(1000, 16), (4, 16), (4, 45), (1000, 1000)])
def test_the_best_are_chosen_as_with_all_at_hand(levels, side, batch_size):
    values, concepts, keys, boxes = world(levels, levels)
    gallery = Gallery(CONCEPTS, 6, GRID, VIEW, side)
    for first in range(0, IMAGES, batch_size):
        rows = slice(first, first + batch_size)
        gallery.add(keys[rows], boxes[rows], SparseCodes.of(values[rows], concepts[rows]))
    found = gallery.excerpts(range(CONCEPTS))
    wanted = expected(values, concepts, keys, boxes, 6, side)
    assert found[0] == []  # never active
    assert any(box in boxes for excerpts in found for _, box, _ in excerpts)  # a token without a place
    for mine, theirs in zip(found, wanted, strict=True):
        assert [excerpt.key for excerpt in mine] == [key for key, _, _ in theirs]
        assert [excerpt.activation for excerpt in mine] == [peak for _, _, peak in theirs]
        for excerpt, (_, box, _) in zip(mine, theirs, strict=True):
            assert excerpt.box == pytest.approx(box)
            view = boxes[keys.index(excerpt.key)]
            assert excerpt.box.left >= view.left - 1e-9
            assert excerpt.box.top >= view.top - 1e-9
            assert excerpt.box.right <= view.right + 1e-9
            assert excerpt.box.bottom <= view.bottom + 1e-9


def test_only_what_is_wanted_is_returned():
    values, concepts, keys, boxes = world(0, 1000)
    gallery = Gallery(CONCEPTS, 2, GRID, VIEW, 10)
    gallery.add(keys, boxes, SparseCodes.of(values, concepts))
    found = gallery.excerpts([3, 7])
    assert [len(excerpts) for excerpts in found] == [2 * (concept in (3, 7)) for concept in range(CONCEPTS)]
    none = Gallery(CONCEPTS, 0, GRID, VIEW, 10)
    none.add(keys, boxes, SparseCodes.of(values, concepts))
    assert none.excerpts(range(CONCEPTS)) == [[]] * CONCEPTS


def test_codes_of_a_bank_are_taken_as_they_come():
    """A grid of one cell shows the square in the middle."""
    codec = SaeCodec(torch.eye(4), torch.eye(4), 2)
    a = torch.tensor([[[3.0, 1.0, 2.0, 0.0]], [[0.0, 5.0, -1.0, -1.0]]])
    gallery = Gallery(4, 1, Layout("bc", 4, (1, 1), 0), Preprocessing(8, 8), 4)
    gallery.add(["a", "b"], [Box(0, 0, 16, 8), Box(0, 0, 8, 8)], codec.encode(a, torch.zeros(2, dtype=torch.int64)))
    found = gallery.excerpts(range(4))
    assert found == [[("a", Box(4, 2, 12, 6), 3)], [("b", Box(2, 2, 6, 6), 5)], [("a", Box(4, 2, 12, 6), 2)], []]


def test_the_most_active_are_those_on_most_images():
    counts = torch.tensor([0.0, 5, 2, 5, 1])
    assert most_active(counts, 2) == [1, 3]
    assert most_active(counts, 3) == [1, 2, 3]
    assert most_active(counts, 99) == [1, 2, 3, 4]
    assert most_active(counts, 0) == []
