"""What comes back for words: the concepts that answer to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from whence._inventory import Concept

SearchBy = Literal["meaning", "label"]


@dataclass(frozen=True, slots=True)
class FoundConcept:
    """A concept that answers to a text."""

    concept: Concept
    """With as many exemplars as were asked for, and without counterfactuals."""
    score: float
    """By meaning: the cosine of the text and what the concept looks like, to the CLIP that its bank was named with. By
    label: 1 where the text is the label, less where it is part of it or of other words for the concept."""

    @property
    def bank(self) -> str:
        """``model/layer/name`` of the concept's bank."""
        return self.concept.bank


@dataclass(frozen=True, slots=True)
class UnsearchedBank:
    """A bank that could not be searched."""

    reference: str
    """``model/layer/name``."""
    reason: str
    """Why, and what helps."""


@dataclass(frozen=True, slots=True, repr=False)
class SearchResults(Sequence[FoundConcept]):
    """The concepts that were found, best first; a sequence of `FoundConcept`.

    Cosines of different CLIPs cannot be compared: where banks were named with several, the best of each come before the
    second best.
    """

    text: str
    by: SearchBy
    found: tuple[FoundConcept, ...]
    unsearched: tuple[UnsearchedBank, ...]
    """Banks that could not be searched."""

    def __len__(self) -> int:
        return len(self.found)

    @overload
    def __getitem__(self, index: int) -> FoundConcept: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[FoundConcept, ...]: ...

    def __getitem__(self, index: int | slice) -> FoundConcept | tuple[FoundConcept, ...]:
        return self.found[index]

    def __iter__(self) -> Iterator[FoundConcept]:
        return iter(self.found)

    def __repr__(self) -> str:
        from whence._search_words import one_line

        return one_line(self)

    def _repr_html_(self) -> str:
        """A table with exemplars, for notebooks."""
        from whence._html import render_search

        return render_search(self)
