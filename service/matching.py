"""How well concepts answer to a text: by what they look like, or by what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from concepts.bank import Bank, Concept

_SAME, _WORDS, _PART = 1.0, 0.9, 0.8
"""Scores of a label that is the text, that holds it as whole words, and that holds it."""
_OTHER_SAME, _OTHER_WORDS, _OTHER_PART = 0.6, 0.5, 0.4
"""The same of other words and phrases that were found for the concept."""


class Hit(NamedTuple):
    """A concept that answers to a text."""

    bank: Bank
    concept: Concept
    score: float


def by_meaning(bank: Bank, text: Tensor, most: int) -> list[Hit]:
    """Return the concepts of a bank that look most like a text, best first.

    Parameters
    ----------
    bank
        Without ``embeddings`` none of its concepts looks like anything.
    text
        Embedding of the text, ``[D]`` of norm 1.
    most
        How many to return.
    """
    if bank.embeddings is None:
        return []
    concepts = bank.all_concepts
    cosines = bank.embeddings @ text
    # Nothing is known of what a concept without exemplars looks like.
    cosines[~bank.embeddings.any(1)] = -torch.inf
    best = cosines.argsort(descending=True, stable=True)[:most].tolist()
    return [Hit(bank, concepts[index], float(cosines[index])) for index in best if cosines[index] > -torch.inf]


def by_label(bank: Bank, text: str) -> Iterator[Hit]:
    """Yield the concepts of a bank whose label, words or phrases hold a text, in the order of the bank."""
    wanted = _folded(text)
    whole = re.compile(rf"(?<!\w){re.escape(wanted)}(?!\w)")
    for concept in bank.all_concepts:
        label, others = _folded(concept.label), [_folded(other) for other in _others(concept)]
        score = max(
            _score(label, wanted, whole, (_SAME, _WORDS, _PART)),
            *(_score(other, wanted, whole, (_OTHER_SAME, _OTHER_WORDS, _OTHER_PART)) for other in others),
            0.0,
        )
        if score > 0:
            yield Hit(bank, concept, score)


def ranked(hits: Iterable[Hit]) -> list[Hit]:
    """Return hits best first; equal ones by bank and id."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.bank.reference, hit.concept.id))


def in_turn(rankings: Sequence[Sequence[Hit]]) -> list[Hit]:
    """Merge rankings whose scores cannot be compared: the best of each, then the second best of each, and so on."""
    return [hit for rank in zip_longest(*rankings) for hit in rank if hit is not None]


def _others(concept: Concept) -> Iterator[str]:
    """Yield what a machine says of a concept, beside its label."""
    if concept.naming is not None:
        yield concept.naming.label
        yield from (word.text for word in (*concept.naming.words, *concept.naming.phrases))


def _score(held: str, wanted: str, whole: re.Pattern[str], scores: tuple[float, float, float]) -> float:
    same, words, part = scores
    if held == wanted:
        return same
    if whole.search(held):
        return words
    return part if wanted in held else 0.0


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
