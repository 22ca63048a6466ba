"""Found concepts in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whence import _labels

if TYPE_CHECKING:
    from whence._inventory import Concept
    from whence._search import SearchResults


def one_line(results: SearchResults) -> str:
    """What was found, in a line."""
    shown = [f"{_labels.name(each.concept)} {each.score:.3g}" for each in results.found[:3]]
    if len(results) > len(shown):
        shown.append("…")
    unsearched = f"; {counted(results)} not searched" if results.unsearched else ""
    return f"SearchResults({results.text!r} by {results.by}: {', '.join(shown) or 'nothing found'}{unsearched})"


def counted(results: SearchResults) -> str:
    """How many banks could not be searched."""
    count = len(results.unsearched)
    return f"{count} bank" if count == 1 else f"{count} banks"


def table(results: SearchResults) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the concepts that were found."""
    heads = ("score", "label", "id", "bank", "class")
    rows: list[tuple[str, ...]] = [
        (f"{each.score:.3f}", _labels.shown(each.concept), str(each.concept.id), each.bank, class_of(each.concept))
        for each in results
    ]
    return heads, rows


def lines(results: SearchResults) -> list[str]:
    """The banks that could not be searched, and what question marks mean, one a line."""
    unsearched = [f"{each.reference} was not searched. {each.reason}" for each in results.unsearched]
    return unsearched + _labels.note(each.concept for each in results)


def class_of(concept: Concept) -> str:
    """The class that a concept belongs to, and the one that it is against."""
    if concept.class_index is None:
        return ""
    own = concept.class_name or str(concept.class_index)
    return own if concept.other_index is None else f"{own}, against {concept.other_name or concept.other_index}"
