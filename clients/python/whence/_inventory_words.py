"""Models, banks, concepts and scores in a line, or in a few facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whence import _labels, _search_words
from whence._words import bank_version

if TYPE_CHECKING:
    from whence._explanation import ConceptMap, ConceptScore
    from whence._inventory import Bank, Concept, Exemplar, Model

_DIGEST_CHARACTERS = 12

Facts = list[tuple[str, str]]
"""What is known, by what it is called."""


def model_line(model: Model) -> str:
    """A model, in a line."""
    size = f"{model.input_width}×{model.input_height} px"
    return f"Model({model.name!r}, {model.architecture}, {size}, {counted(len(model.class_names), 'class', 'classes')})"


def model_facts(model: Model) -> Facts:
    """A model, but for the names of its classes."""
    return [
        ("architecture", model.architecture),
        ("input", f"{model.input_width}×{model.input_height} px"),
        ("digest", model.digest[:_DIGEST_CHARACTERS]),
    ]


def bank_line(bank: Bank) -> str:
    """A bank, in a line."""
    parts = f", {counted(bank.part_count, 'part')} at {bank.parts_layer}" if bank.parts_layer else ""
    named = f", named by {bank.labelling.clip}" if bank.labelling else ""
    version = f"{bank.reference}@{bank.digest[:_DIGEST_CHARACTERS]}"
    return f"Bank({version!r}, {bank.kind}, {counted(bank.concept_count, 'concept')}{parts}{named})"


def bank_facts(bank: Bank) -> Facts:
    """A bank, but for its metrics and its configuration."""
    facts = [
        ("kind", bank.kind),
        ("concepts", f"{bank.concept_count:,}"),
        ("layer", f"{bank.layer} of {bank.model}, {counted(bank.channels, 'channel')}"),
        ("created", bank.created),
        ("digest", bank.digest[:_DIGEST_CHARACTERS]),
    ]
    if bank.parts_layer:
        facts.append(("parts", f"{bank.part_count:,} at {bank.parts_layer}"))
    if bank.labelling:
        facts.append(("named by", f"{bank.labelling.clip}, of {counted(bank.labelling.captions, 'caption')}"))
    return facts


def concept_line(concept: Concept) -> str:
    """A concept, in a line."""
    parts = [f"{_labels.numbered(concept)} of {bank_version(concept)}"]
    if concept.class_index is not None:
        parts.append(f"class {_search_words.class_of(concept)}")
    if concept.parent is not None:
        parts.append(f"part of {concept.parent}")
    if concept.children:
        parts.append(counted(len(concept.children), "part"))
    parts.append(counted(len(concept.exemplars), "exemplar"))
    return f"Concept({', '.join(parts)})"


def concept_facts(concept: Concept) -> Facts:
    """What is known of a concept, but for its pictures; statistics last."""
    facts: Facts = []
    if concept.class_index is not None:
        facts.append(("class", _search_words.class_of(concept)))
    if concept.layer:
        facts.append(("layer", concept.layer))
    if concept.parent is not None:
        facts.append(("part of", f"concept {concept.parent}"))
    if concept.children:
        facts.append(("parts", ", ".join(map(str, concept.children))))
    if concept.words:
        facts.append(("words", ", ".join(concept.words)))
    if concept.named_by_person:
        facts.append(("named by", "a person"))
    elif concept.naming is not None:
        facts.append(("named by", f"a machine, with a score of {concept.naming.score:.2f}"))
    return facts + [(name, f"{value:.4g}") for name, value in sorted(concept.statistics.items())]


def exemplar_line(exemplar: Exemplar) -> str:
    """What an exemplar is of, and how much."""
    return f"{exemplar.source}, activation {exemplar.activation:.4g}"


def score_line(score: ConceptScore) -> str:
    """A concept's part in a prediction, in a line."""
    parts = [
        _labels.numbered(score),
        f"contribution {score.contribution:+.4g}",
        f"share {score.share:+.1%}",
        f"activation {score.activation:.4g}",
    ]
    if score.maps:
        parts.append(f"maps {'+'.join(score.maps)}")
    if score.parts:
        parts.append(counted(len(score.parts), "part"))
    return f"ConceptScore({', '.join(parts)})"


def map_line(concept_map: ConceptMap) -> str:
    """A map's size and range, in a line."""
    height, width = concept_map.values.shape
    low, high = (concept_map.values.min(), concept_map.values.max()) if concept_map.values.size else (0, 0)
    colours = ", in colours" if concept_map.colours is not None else ""
    return f"ConceptMap({height}×{width}, {low:.4g} to {high:.4g}{colours})"


def counted(count: int, one: str, many: str = "") -> str:
    """A number of things."""
    return f"1 {one}" if count == 1 else f"{count:,} {many or one + 's'}"
