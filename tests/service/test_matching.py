"""Which concepts answer to a text, and how well."""

from __future__ import annotations

import pytest
import torch

from concepts.bank import Bank, Concept, Naming, Word
from service import matching
from service.matching import Hit


def bank(*concepts: Concept, name: str = "n", embeddings: torch.Tensor | None = None) -> Bank:
    return Bank("nmf", "m", "l", name, "w", 8, concepts, {}, embeddings=embeddings)


def named(id_: int, label: str, *words: str, phrases: tuple[str, ...] = (), by_person: bool = False) -> Concept:
    found = Naming("machine's", 0.5, False, tuple(Word(w, 0.5) for w in words), tuple(Word(p, 0.5) for p in phrases))
    return Concept(id_, label, named_by_person=by_person, naming=found)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("red ring", 1.0),
        ("RED \t ring", 1.0),
        ("ring", 0.9),
        ("red", 0.9),
        ("in", 0.8),
        ("d r", 0.8),
        ("Straße", 0.6),
        ("STRASSE", 0.6),
        ("a photo of it", 0.6),
        ("photo of", 0.5),
        ("stras", 0.4),
        ("machine's", 0.6),
        ("blue", None),
        ("red.ring", None),
        ("ring red", None),
    ],
)
def test_scores_of_labels(text: str, score: float | None) -> None:
    concept = named(0, "Red Ring", "straße", "striped", phrases=("a photo of it",))
    assert [hit.score for hit in matching.by_label(bank(concept), text)] == ([score] if score else [])


def test_a_text_that_is_a_pattern_is_text() -> None:
    concepts = [named(0, "ring (red)"), named(1, "ring xred"), named(2, "red [")]
    assert [hit.concept.id for hit in matching.by_label(bank(*concepts), "(red)")] == [0]
    assert [hit.concept.id for hit in matching.by_label(bank(*concepts), "[")] == [2]


def test_concepts_without_a_label_answer_to_nothing() -> None:
    hits = matching.by_label(bank(Concept(0), Concept(1, "ear")), "r")
    assert [hit.concept.id for hit in hits] == [1]


def test_meaning_is_the_cosine_and_zero_rows_answer_to_nothing() -> None:
    rows = torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    held = bank(*map(Concept, range(5)), embeddings=rows)
    hits = matching.by_meaning(held, torch.tensor([1.0, 0.0]), 9)
    assert [(hit.concept.id, round(hit.score, 6)) for hit in hits] == [(3, 1.0), (0, 0.6), (4, 0.6), (2, -1.0)]
    assert matching.by_meaning(held, torch.tensor([1.0, 0.0]), 2) == hits[:2]
    assert torch.equal(held.embeddings, rows), "the bank stays as it is"  # type: ignore[arg-type]
    assert matching.by_meaning(bank(Concept(0)), torch.tensor([1.0, 0.0]), 2) == []


def test_equal_scores_come_by_bank_and_id() -> None:
    first, second = (bank(Concept(0), Concept(1), name=name) for name in "ab")
    hits = [Hit(held, held.concepts[id_], 0.5) for held in (second, first) for id_ in (1, 0)]
    hits.append(Hit(second, second.concepts[0], 0.75))
    order = [(hit.bank.name, hit.concept.id) for hit in matching.ranked(hits)]
    assert order == [("b", 0), ("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_rankings_that_cannot_be_compared_take_turns() -> None:
    held = bank(*map(Concept, range(6)))
    one, two = (
        [Hit(held, held.concepts[id_], score) for id_, score in rows]
        for rows in (((0, 0.9), (1, 0.8), (2, 0.7)), ((3, 0.2),))
    )
    assert [hit.concept.id for hit in matching.in_turn([one, two])] == [0, 3, 1, 2]
    assert matching.in_turn([]) == []
