"""How labels are shown: the one place that decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_WORDS = 4
"""Shown beside a label."""


class Labelled(Protocol):
    """A concept, or its part in a prediction."""

    @property
    def id(self) -> int: ...

    @property
    def label(self) -> str: ...

    @property
    def weak_label(self) -> bool: ...


def shown(concept: Labelled) -> str:
    """The label as people see it: a weak one with a question mark; empty where there is none."""
    return f"{concept.label}?" if concept.label and concept.weak_label else concept.label


def name(concept: Labelled, what: str = "concept") -> str:
    """The label as it is shown, or the id where there is none."""
    return shown(concept) or f"{what} {concept.id}"


def numbered(concept: Labelled) -> str:
    """The label as it is shown, and the id."""
    return f"{shown(concept)} (#{concept.id})" if concept.label else f"concept {concept.id}"


def note(concepts: Iterable[Labelled]) -> list[str]:
    """What the question marks mean, where there are some."""
    weak = any(shown(concept) != concept.label for concept in concepts)
    return ["A name with a question mark is a machine's guess that cannot be trusted much."] if weak else []


def gloss(label: str, words: Sequence[str]) -> str:
    """The first words for a concept that are not its label."""
    return ", ".join([word for word in words if word != label][:_WORDS])
