"""The insertion test against plain loops, in a world where one small mark decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from concepts.bank import Concept, Exemplar
from concepts.model import Model
from concepts.preprocessing import Box, Preprocessing
from offline import exemplars
from offline.contrast import insertion
from offline.contrast.insertion import VARIANTS, Crop, Insertion, Pool, measure, paste, variants
from offline.exemplars import Excerpt
from offline.images import open_folder
from offline.progress import silent
from tests.offline.colours import COLOURS, SIDE
from tests.offline.colours import model as colours

RED, GREEN, BLUE = range(3)
MARK = 4
"""Side of the mark, in pixels."""


def marked(ground: str, noise: int, mark: bool) -> Image.Image:
    """Return a picture of a colour with some grain, and a blue mark in the lower right corner."""
    grain = np.random.default_rng(noise).integers(-20, 1, (SIDE, SIDE, 3))
    view = np.clip(np.array(COLOURS[ground]) + grain, 0, 255).astype(np.uint8)
    if mark:
        view[-MARK:, -MARK:] = COLOURS["blue"]
    return Image.fromarray(view)


def model() -> Model:
    """Return a model that takes any blue for red."""
    found = colours()
    found.module.head.weight.data[:] = torch.tensor([[10.0, 0, 1000], [0, 10, 0], [0, 0, 1]])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("marks")
    for index in range(7):
        marked("red", index, mark=index < 5).save(root / f"red{index}.png")
        marked("green", 100 + index, mark=False).save(root / f"green{index}.png")
    return open_folder(root)


def pool(folder, batch_size: int = 128, **members: int) -> Pool:
    counts = {"red": 7, "green": 7} | members
    keys = {list(COLOURS).index(name): [f"{name}{i}.png" for i in range(count)] for name, count in counts.items()}
    return Pool(model(), folder, keys, batch_size)


def crop(top: int, left: int, side: int = 8, ground: str = "red", seed: int = 5) -> Crop:
    view = np.asarray(marked(ground, seed, mark=True))
    return Crop(view[top : top + side, left : left + side], top, left)


def prototypes() -> list[Insertion]:
    """Return the mark from two places, plain red, and green, of several sizes."""
    corner = SIDE - 8
    return [
        Insertion(RED, GREEN, [crop(corner, corner), crop(corner - 2, corner - 4, 12)], 0),
        Insertion(RED, GREEN, [crop(3, 5)], 1),
        Insertion(GREEN, RED, [crop(0, 0, 8, "green", 9), crop(20, 1, 5, "green", 9)], 2),
        Insertion(RED, GREEN, [crop(0, 0, SIDE)], 3),
    ]


def test_a_crop_is_pasted_where_it_was_cut_and_nowhere_else():
    view = np.asarray(marked("green", 3, mark=False))
    before, one = view.copy(), crop(20, 11, 7)
    pasted = paste(view, one)
    inside = np.zeros((SIDE, SIDE), bool)
    inside[20:27, 11:18] = True
    assert np.array_equal(pasted[inside], np.asarray(marked("red", 5, mark=True))[inside])
    assert np.array_equal(pasted[~inside], before[~inside])
    assert np.array_equal(view, before)


def test_controls_cover_as_many_pixels_and_come_from_where_they_should():
    view = np.asarray(marked("green", 3, mark=False))
    source = np.stack([np.asarray(marked("red", seed, mark=False)) for seed in range(3)])
    one = Insertion(RED, GREEN, [crop(20, 11, 7)], 4)
    places = set()
    for row in range(20):
        made = variants(one, row, view, source, seed=1)
        rest = np.ones((SIDE, SIDE), bool)
        rest[20:27, 11:18] = False
        assert np.array_equal(made["blank"][rest], view[rest])
        blank = made["blank"][~rest]
        assert (blank == blank[0]).all()
        assert np.abs(blank[0] - view[20:27, 11:18].reshape(-1, 3).mean(0)).max() <= 0.5
        changed = (made["random"] != view).any(2)
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        assert (np.ptp(rows), np.ptp(columns)) == (6, 6)
        area = np.ix_(rows, columns)
        assert any(np.array_equal(made["random"][area], image[area]) for image in source)
        places.add((rows[0], columns[0]))
    assert len(places) > 10
    assert set(variants(one, 0, view, source[:0], seed=1)) == {"insertion", "blank"}


def test_effects_are_those_of_one_image_at_a_time(folder):
    wanted, here = prototypes(), pool(folder, batch_size=3)
    weights = here.model.module.head.weight.double()

    def asked(view: np.ndarray) -> np.ndarray:
        """The model once more: mean colours, weights, softmax."""
        logits = torch.tensor(view / 255.0).mean((0, 1)) @ weights.T
        return logits.softmax(0).numpy()

    for one, effect in zip(wanted, measure(here, wanted, 6, 0, silent), strict=True):
        assert list(effect.keys) == list(here.members[one.other])[:6]
        flips, gains = dict.fromkeys(VARIANTS, 0), dict.fromkeys(VARIANTS, 0.0)
        source = np.stack([np.asarray(folder.open(key)) for key in here.members[one.target][:6]])
        for row, key in enumerate(effect.keys):
            view = np.asarray(folder.open(key))
            used = one.crops[row % len(one.crops)]
            by_hand = view.copy()
            height, width, _ = used.pixels.shape
            for y in range(height):
                for x in range(width):
                    by_hand[used.top + y, used.left + x] = used.pixels[y, x]
            made = variants(one, row, view, source, seed=0)
            assert np.array_equal(made["insertion"], by_hand)
            for variant, edited in made.items():
                share = asked(edited)
                flips[variant] += int(share.argmax() == one.target)
                gains[variant] += share[one.target] - asked(view)[one.target]
        for variant in VARIANTS:
            assert effect.flips(variant) == flips[variant] / 6
            assert effect.gain(variant) == pytest.approx(gains[variant] / 6, abs=1e-5)


def test_the_mark_flips_and_controls_do_not(folder):
    mark, red, green, whole = measure(pool(folder), prototypes(), 7, 0, silent)
    assert mark.flips("insertion") == 1.0
    assert mark.gain("insertion") > 0.9
    assert mark.flips("blank") == 0.0
    assert mark.flips("random") <= 2 / 7  # unless it happens to show the mark
    assert red.flips("insertion") == green.flips("insertion") == 0.0
    assert whole.flips("insertion") == 1.0
    assert whole.flips("blank") == 0.0
    assert mark.statistics()["insertion_images"] == 7


def test_batches_and_neighbours_change_nothing(folder):
    wanted = prototypes()
    together = measure(pool(folder), wanted, 7, 0, silent)
    for number, one in enumerate(wanted):
        alone = measure(pool(folder, batch_size=1), [one], 7, 0, silent)[0]
        assert np.array_equal(alone.predicted, together[number].predicted)
        np.testing.assert_allclose(alone.after, together[number].after, atol=1e-6)
    other = measure(pool(folder), wanted, 7, 1, silent)
    assert not np.array_equal(other[0].after[2], together[0].after[2])  # another seed, other patches
    assert np.array_equal(other[0].after[:2], together[0].after[:2])


def test_images_that_do_not_fit_are_decoded_again(folder, monkeypatch):
    kept = measure(pool(folder), prototypes(), 7, 0, silent)
    monkeypatch.setattr(insertion, "_VIEWS_BYTES", 0)
    here = pool(folder)
    again = measure(here, prototypes(), 7, 0, silent)
    here.seen(BLUE, 7)
    assert len(here._kept) == 2
    for one, other in zip(kept, again, strict=True):
        assert np.array_equal(one.after, other.after)


def test_without_images_nothing_is_said(folder):
    mark, _, green, _ = measure(pool(folder, red=0), prototypes(), 7, 0, silent)
    assert green is None
    assert mark.flips("random") is None
    assert mark.gain("random") is None
    assert set(mark.statistics()) == {
        "insertion_images", "insertion_flips", "insertion_gain", "blank_flips", "blank_gain",
    }  # fmt: skip


def test_an_answer_that_is_no_number_flips_nothing(folder):
    here = pool(folder)
    here.members[GREEN] = here.members[GREEN][:2]
    here.seen(GREEN, 7)
    here.seen(RED, 7)
    here.model.module.head.weight.data[:] = torch.nan
    effect = measure(here, prototypes()[:1], 7, 0, silent)[0]
    assert effect.flips("insertion") == 0.0
    assert effect.after.max() == 0.0


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (64, 64), (32, 32)])
def test_exemplars_go_back_to_where_they_were_cut(tmp_path, size):
    """Through the picture in a bank, a crop comes out as the view shows it: same place, nearly the same pixels."""
    preprocessing = Preprocessing(24, 24, resize=26)
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "ramp.png")
    folder = open_folder(tmp_path)
    view, box = preprocessing.fit(folder.open("ramp.png"))
    scale = (box.right - box.left) / 24, (box.bottom - box.top) / 24
    chosen = [[], [_excerpt(box, scale, 12, 3, 6), _excerpt(box, scale, 18, 18, 6)], [_excerpt(box, scale, 0, 7, 6)]]
    drawn = exemplars.draw(folder, chosen)
    places = insertion.places(folder, chosen, preprocessing)
    assert places.shape == (3, 2, 4)
    assert places[0].isnan().all()
    assert places[2, 1].isnan().all()
    concepts = [Concept(n, class_index=0, other_index=1, exemplars=e) for n, e in enumerate(drawn.exemplars)]
    found = insertion.insertions(concepts, places, lambda e: drawn.pictures[e.file], preprocessing)
    assert [(one.number, one.target, one.other) for one in found] == [(1, 0, 1), (2, 0, 1)]
    made = [crop for one in found for crop in one.crops]
    assert [(crop.left, crop.top) for crop in made] == [(12, 3), (18, 18), (0, 7)]
    for crop in made:
        assert crop.pixels.shape == (6, 6, 3)
        shown = view[crop.top : crop.top + 6, crop.left : crop.left + 6]
        assert np.abs(crop.pixels.astype(float) - shown).max() < 12


def _excerpt(box: Box, scale: tuple[float, float], left: int, top: int, side: int) -> Excerpt:
    x, y = box.left + left * scale[0], box.top + top * scale[1]
    return Excerpt("ramp.png", Box(x, y, x + side * scale[0], y + side * scale[1]), 1.0)


def test_crops_stay_within_the_view():
    """The view may leave the image by the rounding of its size, and boxes with it."""
    picture = exemplars.picture(Image.new("RGB", (9, 9), "red"), Box(0, 0, 9, 9))
    concept = Concept(
        0, class_index=0, other_index=1, exemplars=(Exemplar("exemplars/0.webp", "k", Box(0, 0, 9, 9), 1.0),)
    )
    view = Preprocessing(24, 24)
    for place in ([-0.02, 0.8, 0.2, 1.03], [0.99, 0.99, 1.2, 1.2], [1.0, 1.0, 1.1, 1.1]):
        (crop,) = insertion.crops(concept, torch.tensor([place]), lambda _: picture, view)
        assert paste(np.zeros((24, 24, 3), np.uint8), crop).shape == (24, 24, 3)
        assert crop.top + crop.pixels.shape[0] <= 24
        assert crop.left + crop.pixels.shape[1] <= 24
