"""Words and phrases of captions."""

from __future__ import annotations

import random

import pytest

from offline.naming.words import CLOSED, LONGEST_PHRASE, candidates, lemma, runs


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a striped red disc in the night", [["striped", "red", "disc"], ["night"]]),
        ("Red, ring; STRIPED!", [["red"], ["ring"], ["striped"]]),
        ("two dogs (brown) & a cat", [["two", "dogs"], ["brown"], ["cat"]]),
        ("it's a dog, they’re not dogs, don’t", [["dog"], ["dogs"]]),
        ("a man's T-shirt", [["man's", "t-shirt"]]),
        ("3 cats in 1984, model_t", [["cats"], ["model"]]),
        ("Café über naïve", [["café", "über", "naïve"]]),
        ("e\u0301te\u0301 en ville", [["été", "en", "ville"]]),
        ("собака 犬犬", [["собака", "犬犬"]]),
        ("x ray of a b c", [["ray"]]),
        ("   \t ", []),
        ("", []),
        ("the of and with", []),
        ("🐶 ... 12 —", []),
    ],
)
def test_runs_are_what_lies_between_words_that_say_nothing(caption: str, expected: list[list[str]]) -> None:
    assert list(runs(caption)) == expected


def test_no_closed_word_is_ever_a_candidate() -> None:
    text = " ".join(f"{word} disc" for word in sorted(CLOSED))
    assert candidates([text, text.upper(), text.replace("'", "’")]) == (["disc"], [])
    assert candidates([f"{word}’s {word}'ll" for word in CLOSED if "'" not in word]) == ([], [])


def test_phrases_are_runs_of_two_to_the_most() -> None:
    words, phrases = candidates(["a big striped red disc on sand"])
    assert words == ["big", "disc", "red", "sand", "striped"]
    run = ["big", "striped", "red", "disc"]
    expected = [run[i:j] for i in range(4) for j in range(i + 2, min(i + LONGEST_PHRASE, 4) + 1)]
    assert phrases == sorted(map(" ".join, expected))
    assert not any("sand" in phrase for phrase in phrases)  # another run


def test_words_of_a_lemma_are_one_in_their_most_frequent_form() -> None:
    assert lemma("discs") == lemma("disc") == "disc"
    assert candidates(["discs", "a disc", "two discs"]).words == ["discs", "two"]
    assert candidates(["discs", "disc"]).words == ["disc"]  # as often: the first in the alphabet
    assert candidates(["red discs", "the red discs", "a red disc"]).phrases == ["red discs"]
    assert candidates(["Discs", "DISCS", "disc"]).words == ["discs"]


def test_the_order_of_captions_does_not_matter() -> None:
    captions = ["red rings", "a red ring", "blue discs", "disc on sand", "a striped disc", "stripes", "red rings, disc"]
    expected = candidates(captions)
    for seed in range(20):
        random.Random(seed).shuffle(captions)
        assert candidates(captions) == expected
    assert candidates(iter(captions)) == expected
    assert candidates([]) == ([], [])
