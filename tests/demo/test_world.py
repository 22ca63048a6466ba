"""The world: what it says about an image must be what the image shows."""

from __future__ import annotations

import colorsys
from itertools import combinations

import numpy as np
import pytest

from concepts.errors import InvalidInput
from demo.attributes import (
    ATTRIBUTES,
    CLASS_NAMES,
    CLASSES,
    FAMILIES,
    PAIRS,
    SPURIOUS,
    SPURIOUS_CLASS,
    index_of,
    labels_of,
)
from demo.world import SIDE, STICKER_SIDE, Batch, World, paste_sticker

HUES = {"red": 0 / 360, "yellow": 50 / 360, "green": 132 / 360, "blue": 230 / 360}


@pytest.fixture(scope="module")
def heldout() -> Batch:
    return World(3).sample(600, "heldout")


@pytest.fixture(scope="module")
def training() -> Batch:
    return World(3).sample(4000, "train")


def test_an_image_is_the_same_alone_and_in_any_batch() -> None:
    whole = World(5).sample(150, "train", start=40)
    for start, n in ((40, 1), (103, 1), (90, 70), (189, 1)):
        part = World(5).sample(n, "train", start=start)
        rows = slice(start - 40, start - 40 + n)
        np.testing.assert_array_equal(part.images, whole.images[rows])
        np.testing.assert_array_equal(part.regions, whole.regions[rows])
        np.testing.assert_array_equal(part.attributes, whole.attributes[rows])
        np.testing.assert_array_equal(part.labels, whole.labels[rows])
        assert part.captions == whole.captions[rows]


def test_batches_cover_a_stretch_once() -> None:
    parts = list(World(5).batches(10, "heldout", 4, start=3))
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(
        np.concatenate([part.images for part in parts]), World(5).sample(10, "heldout", start=3).images
    )


def test_no_image_returns_in_another_place_split_or_seed() -> None:
    drawn = [World(seed).sample(200, split) for seed in (0, 1, 2) for split in ("train", "heldout")]  # type: ignore[arg-type]
    images = np.concatenate([batch.images for batch in drawn]).reshape(1200, -1)
    assert len({image.tobytes() for image in images}) == 1200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((0, "train", 0), "at least one"), ((1, "train", -1), "index 0"), ((1, "test", 0), "train, heldout")],
)
def test_a_senseless_request_is_refused(arguments: tuple[int, str, int], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        World().sample(*arguments)  # type: ignore[arg-type]


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidInput, match="seed"):
        World(-1)


def test_shapes_and_types(heldout: Batch) -> None:
    assert heldout.images.shape == (600, SIDE, SIDE, 3)
    assert heldout.images.dtype == np.uint8
    assert heldout.masks.shape == (600, len(ATTRIBUTES), SIDE, SIDE)
    assert heldout.masks.dtype == np.bool_


def test_each_image_shows_one_attribute_of_each_family(training: Batch) -> None:
    for names in FAMILIES.values():
        columns = [index_of(name) for name in names]
        assert (training.attributes[:, columns].sum(1) == 1).all()


def test_attributes_are_balanced_and_independent(training: Batch) -> None:
    shown = training.attributes[:, :-1].astype(float)
    expected = np.concatenate([[1 / len(names)] * len(names) for names in FAMILIES.values()])
    assert np.abs(shown.mean(0) - expected).max() < 0.04  # five standard errors of 4,000 images
    family = np.repeat(np.arange(len(FAMILIES)), [len(names) for names in FAMILIES.values()])
    between = family[:, None] != family[None, :]
    assert np.abs(np.corrcoef(shown.T))[between].max() < 0.08


def test_a_mask_is_empty_exactly_where_the_attribute_is_absent(heldout: Batch) -> None:
    np.testing.assert_array_equal(heldout.masks.any((2, 3)), heldout.attributes)


def test_object_attributes_share_the_objects_pixels_and_no_others(heldout: Batch) -> None:
    covered = {
        family: heldout.masks[:, [index_of(name) for name in names]].any(1) for family, names in FAMILIES.items()
    }
    np.testing.assert_array_equal(covered["shape"], covered["colour"])
    np.testing.assert_array_equal(covered["shape"], covered["texture"])
    assert not (covered["shape"] & covered["background"]).any()
    sizes = covered["shape"].sum((1, 2))
    assert sizes.min() > 80
    assert sizes.max() < 900


def _hues(pixels: np.ndarray) -> np.ndarray:
    return np.array([colorsys.rgb_to_hsv(*(pixel / 255.0))[0] for pixel in pixels])


@pytest.mark.parametrize("colour", sorted(HUES))
def test_pixels_in_a_colours_mask_have_that_hue(heldout: Batch, colour: str) -> None:
    inside = heldout.masks[:, index_of(colour)]
    hues = _hues(heldout.images[inside][::37])
    distance = np.abs((hues - HUES[colour] + 0.5) % 1.0 - 0.5)
    assert np.quantile(distance, 0.99) < 0.07
    nearest = np.argmin([np.abs((hues - hue + 0.5) % 1.0 - 0.5) for hue in HUES.values()], axis=0)
    assert (np.array(list(HUES))[nearest] == colour).mean() > 0.99


def test_backgrounds_hold_none_of_the_objects_colours(heldout: Batch) -> None:
    background = heldout.masks[:, [index_of(name) for name in FAMILIES["background"]]].any(1)
    objects = heldout.masks[:, [index_of(name) for name in FAMILIES["colour"]]].any(1)

    def saturation(where: np.ndarray) -> np.ndarray:
        pixels = heldout.images[where].astype(float)
        bright = pixels.max(1) > 80
        return 1 - pixels.min(1)[bright] / pixels.max(1)[bright]

    assert np.quantile(saturation(background), 0.99) < np.quantile(saturation(objects), 0.01)


def test_object_masks_have_the_geometry_of_their_shape(heldout: Batch) -> None:
    """Second moments against area: a turn-free measure that tells a disc from a ring, a triangle and a cross."""
    # ∫r² dA / A²: disc 1/2π; ring 1/2π · (1 + h²)/(1 − h²), its hole h = 0.48 radii; equilateral triangle 1/(3√3);
    # cross, its arms 0.32 radii to either side.
    arm = 0.32
    area = 4 * arm * (2 - arm)
    moment = 2 * (2 * arm * 2 / 3 + 2 * 2 * arm**3 / 3) - (2 * arm) ** 4 / 6
    expected = {
        "disc": 1 / (2 * np.pi),
        "ring": (1 + 0.48**2) / (1 - 0.48**2) / (2 * np.pi),
        "triangle": 1 / (3 * np.sqrt(3)),
        "cross": moment / area**2,
    }
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    for name, value in expected.items():
        for row in np.flatnonzero(heldout.attributes[:, index_of(name)] & ~heldout.attributes[:, index_of(SPURIOUS)]):
            inside = heldout.masks[row, index_of(name)]
            xs, ys = x[inside], y[inside]
            measured = (((xs - xs.mean()) ** 2 + (ys - ys.mean()) ** 2).sum()) / inside.sum() ** 2
            assert measured == pytest.approx(value, rel=0.06), (name, row)


def test_captions_name_every_attribute_shown_and_no_other(heldout: Batch) -> None:
    for caption, shown in zip(heldout.captions, heldout.attributes, strict=True):
        words = caption.replace(",", "").split()
        for name, present in zip(ATTRIBUTES, shown, strict=True):
            assert (name in words) == present, caption


def test_labels_follow_the_rule(training: Batch) -> None:
    for label, shown in zip(training.labels, training.attributes, strict=True):
        names = {name for name, present in zip(ATTRIBUTES, shown, strict=True) if present}
        holds = [rule.name for rule in CLASSES if rule.requires <= names]
        assert holds == [CLASS_NAMES[label]]


def test_class_names_are_in_folder_order() -> None:
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)
    assert len(CLASS_NAMES) >= 8


def test_every_attribute_but_the_sticker_matters(training: Batch) -> None:
    """For each attribute there is an image that changes its class when only that attribute is exchanged."""
    for names in FAMILIES.values():
        for old, new in combinations([index_of(name) for name in names], 2):
            shown = training.attributes[training.attributes[:, old]].copy()
            before = labels_of(shown)
            shown[:, old], shown[:, new] = False, True
            assert (labels_of(shown) != before).any(), (ATTRIBUTES[old], ATTRIBUTES[new])
    without = training.attributes.copy()
    without[:, index_of(SPURIOUS)] = False
    np.testing.assert_array_equal(labels_of(without), training.labels)


def test_pairs_differ_in_one_attribute_and_cover_every_family() -> None:
    requires = {rule.name: rule.requires for rule in CLASSES}
    for pair in PAIRS:
        assert requires[pair.first] - requires[pair.second] == {pair.first_attribute}
        assert requires[pair.second] - requires[pair.first] == {pair.second_attribute}
        assert {pair.first_attribute, pair.second_attribute} <= set(FAMILIES[pair.family])
    for family in FAMILIES:
        assert sum(pair.family == family for pair in PAIRS) >= 3
    differing = [1 for a, b in combinations(CLASSES, 2) if len(a.requires - b.requires) == 1]
    assert len(PAIRS) == len(differing)


def test_the_sticker_goes_with_one_class_in_training_and_with_none_held_out(training: Batch) -> None:
    spurious, sticker = CLASS_NAMES.index(SPURIOUS_CLASS), index_of(SPURIOUS)
    heldout = World(3).sample(12_000, "heldout")

    def rates(batch: Batch) -> tuple[float, float]:
        among = batch.labels == spurious
        return batch.attributes[among, sticker].mean(), batch.attributes[~among, sticker].mean()

    with_class, without_class = rates(training)
    assert with_class == pytest.approx(0.95, abs=0.05)
    assert without_class < 0.02
    with_class, without_class = rates(heldout)
    assert with_class == pytest.approx(without_class, abs=0.025)


def test_the_stickers_mask_is_where_the_sticker_is(heldout: Batch) -> None:
    stuck = np.flatnonzero(heldout.attributes[:, index_of(SPURIOUS)])
    assert len(stuck) > 5
    for row in stuck:
        mask = heldout.masks[row, index_of(SPURIOUS)]
        ys, xs = np.nonzero(mask)
        assert mask.sum() == STICKER_SIDE**2
        assert ys.min() >= SIDE - STICKER_SIDE - 4
        assert xs.min() >= SIDE - STICKER_SIDE - 4
        frame = heldout.images[row, ys.min(), xs.min() : xs.max() + 1]
        assert (frame == 250).all()


def test_pasting_changes_only_the_pasted_pixels_of_a_copy(heldout: Batch) -> None:
    images = heldout.images[:8].copy()
    for blank in (False, True):
        pasted = paste_sticker(images, blank)
        np.testing.assert_array_equal(images, heldout.images[:8])
        changed = (pasted != images).any(-1)
        assert changed[:, : SIDE - STICKER_SIDE - 4].sum() == 0
        assert (changed.sum((1, 2)) <= STICKER_SIDE**2).all()
        assert changed.any((1, 2)).all()


def test_distractors_belong_to_no_attribute(heldout: Batch) -> None:
    nothing = ~heldout.masks.any(1)
    assert nothing.any((1, 2)).mean() > 0.8
    pixels = heldout.images[nothing].astype(int)
    assert (pixels.max(1) - pixels.min(1)).max() <= 1  # grey
