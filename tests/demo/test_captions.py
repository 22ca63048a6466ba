"""Captions: true of what they are said of, distinct, and complete."""

from __future__ import annotations

import numpy as np
import pytest

from demo.attributes import ATTRIBUTES, FAMILIES, SPURIOUS, index_of
from demo.captions import (
    FAMILY_OF,
    PEBBLES,
    PHRASINGS,
    THINGS,
    captions,
    crops,
    describe,
    random_caption,
    says,
    seen,
    truth,
)
from demo.world import SIDE, Batch, World

N = 400
RED_DISC = frozenset({"red", "disc"})


@pytest.fixture(scope="module")
def heldout() -> Batch:
    return World(7).sample(N, "heldout")


@pytest.fixture(scope="module")
def whole(heldout: Batch) -> np.ndarray:
    corner = np.zeros(N, np.int64)
    return seen(heldout, corner, corner, SIDE)


def test_captions_are_distinct_and_a_few_thousand() -> None:
    texts = captions()
    assert len(set(texts)) == len(texts)
    assert 2_000 < len(texts) < 10_000
    assert {*THINGS, "striped disc", "a striped red disc in the night", "grey pebbles", "grey"} <= set(texts)


def test_the_sentence_of_every_image_is_among_them(heldout: Batch) -> None:
    assert set(heldout.captions) <= set(captions())


def test_a_caption_names_at_most_one_of_each_family_and_something() -> None:
    for text in captions():
        things = says(text)
        assert things
        families = [FAMILY_OF[name] for name in things if name in FAMILY_OF]
        assert len(families) == len(set(families)), text


@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_a_description_names_what_it_was_given(phrasing: str) -> None:
    dice = np.random.default_rng(0)
    for _ in range(200):
        chosen = [names[dice.integers(len(names))] for names in (*FAMILIES.values(), (SPURIOUS,), (PEBBLES,))]
        things = frozenset(name for name in chosen if dice.random() < 0.5) or RED_DISC
        assert says(describe(things, phrasing)) == things


@pytest.mark.parametrize(
    ("things", "phrasing", "text"),
    [
        (RED_DISC, "tag", "red disc"),
        (RED_DISC | {"night", SPURIOUS, PEBBLES}, "phrase", "a red disc in the night, with grey pebbles and a sticker"),
        (frozenset({"red", "striped"}), "sentence", "a picture of something striped and red"),
        (frozenset({"sand"}), "phrase", "on sand"),
        (frozenset({SPURIOUS}), "tag", SPURIOUS),
    ],
)
def test_wording(things: frozenset[str], phrasing: str, text: str) -> None:
    assert describe(things, phrasing) == text


def test_says_knows_words_in_any_case_and_no_parts_of_words() -> None:
    assert says("RED, Disc!") == RED_DISC
    assert says("a bored ringmaster's sandal") == frozenset()


def test_a_whole_image_shows_its_attributes(heldout: Batch, whole: np.ndarray) -> None:
    np.testing.assert_array_equal(whole[:, : len(ATTRIBUTES)] == 1, heldout.attributes)
    np.testing.assert_array_equal(whole[:, : len(ATTRIBUTES)] == -1, ~heldout.attributes)


def test_a_crop_shows_nothing_that_the_image_does_not(heldout: Batch) -> None:
    dice = np.random.default_rng(1)
    for side in (16, 24, 33, 48):
        tops, lefts = dice.integers(0, SIDE - side + 1, (2, N))
        told = seen(heldout, tops, lefts, side)
        assert not (told[:, : len(ATTRIBUTES)] == 1)[~heldout.attributes].any()
        masks = np.stack([crops(mask, tops, lefts, side) for mask in heldout.masks.transpose(1, 0, 2, 3)], axis=1)
        pixels = masks.sum((2, 3))
        assert (pixels[told[:, : len(ATTRIBUTES)] == 1] >= 12).all()
        absent = (told[:, : len(ATTRIBUTES)] == -1) & heldout.attributes
        assert (pixels[absent] == 0).all()


def test_an_objects_colour_is_told_from_less_of_it_than_its_shape(heldout: Batch) -> None:
    dice = np.random.default_rng(2)
    told = seen(heldout, *dice.integers(0, SIDE - 24 + 1, (2, N)), 24)
    counts = {
        family: (told[:, [index_of(name) for name in names]] == 1).any(1).sum() for family, names in FAMILIES.items()
    }
    assert counts["shape"] < counts["texture"] < counts["colour"] < counts["background"]
    shape = told[:, [index_of(name) for name in FAMILIES["shape"]]]
    assert ((shape == 0).all(1) | (shape != 0).all(1)).all()  # one shape cannot be excluded before another


def test_crops_are_the_squares_asked_for(heldout: Batch) -> None:
    tops, lefts = np.arange(N) % 40, np.arange(N) % 37
    cut = crops(heldout.images, tops, lefts, 20)
    for row in (0, 17, N - 1):
        expected = heldout.images[row, tops[row] : tops[row] + 20, lefts[row] : lefts[row] + 20]
        np.testing.assert_array_equal(cut[row], expected)


def test_truth_follows_from_what_each_text_names(heldout: Batch) -> None:
    dice = np.random.default_rng(3)
    told = seen(heldout, *dice.integers(0, SIDE - 32 + 1, (2, N)), 32)
    texts = (*captions()[::97], "a picture")
    state = [dict(zip(THINGS, row, strict=True)) for row in told]
    answer = truth(told, texts)
    for column, text in enumerate(texts):
        # The least certain of what it names; nothing named is true.
        expected = [min((row[name] for name in says(text)), default=1) for row in state]
        np.testing.assert_array_equal(answer[:, column], expected)
    assert set(np.unique(answer)) == {-1, 0, 1}


def test_random_captions_are_true_known_and_repeatable(heldout: Batch) -> None:
    dice = np.random.default_rng(4)
    told = seen(heldout, *dice.integers(0, SIDE - 28 + 1, (2, N)), 28)
    said = [random_caption(row, np.random.default_rng(row_number)) for row_number, row in enumerate(told)]
    assert said == [random_caption(row, np.random.default_rng(row_number)) for row_number, row in enumerate(told)]
    for row, text in zip(told, said, strict=True):
        assert (text in set(captions())) if (row == 1).any() else text == ""
        assert truth(row[None], (text,)) == 1
    assert set().union(*map(says, said)) >= set(ATTRIBUTES) - set(FAMILIES["shape"]) - {SPURIOUS}
    assert random_caption(np.zeros(len(THINGS), np.int8), dice) == ""
