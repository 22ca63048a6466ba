"""Parts of concepts (the recursion of CRAFT): what is asked of their bank, and how its answers join those of concepts.

The parts are a bank of their own at an earlier layer, explained for the same images and targets. Their contributions
are a second statement about the same logit; they do not add up to those of their concepts.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from concepts.bank import Bank
from concepts.errors import UnsupportedOption
from concepts.explanation import ConceptScope, EngineRequest, ExplainOptions, Explanation, PartsReport


def check(bank: Bank, scope: ConceptScope, obstacle: str | None = None) -> None:
    """Refuse parts where there are none.

    Parameters
    ----------
    bank
        That of the concepts.
    scope
        Whose concepts explain.
    obstacle
        Why its parts cannot be computed; None where they can.

    Raises
    ------
    UnsupportedOption
        If the bank has no parts, they cannot be computed, or the concepts of all classes explain.
    """
    if bank.parts is None:
        raise UnsupportedOption(
            f"bank {bank.reference} has no parts: train one with --parts-layer, or leave `parts` out",
            bank=bank.reference,
        )
    if obstacle is not None:
        raise UnsupportedOption(
            f"the parts of bank {bank.reference} are not served here: {obstacle}, or leave `parts` out",
            bank=bank.reference,
        )
    if scope == "all":
        raise UnsupportedOption("parts are those of the concepts of one class: leave `concepts` at the target's")


def request(
    bank: Bank, explanation: Explanation, options: ExplainOptions, classes: Set[int] | None
) -> EngineRequest | None:
    """Return what to ask the parts' bank about an image that is explained; None where the target's class has no parts.

    Parameters
    ----------
    bank
        The parts' bank.
    explanation
        By the concepts.
    options
        That they were asked with.
    classes
        That have parts; None where parts belong to no class.
    """
    target = explanation.target.index
    if classes is not None and target not in classes:
        return None
    layer_maps = tuple(kind for kind in options.maps if kind != "input")
    everything = replace(options, top_k=len(bank.concepts), maps=layer_maps, colours=False, parts=False)
    return EngineRequest(target, everything)


def joined(bank: Bank, explanation: Explanation, found: Explanation) -> Explanation:
    """Return an explanation with the parts of its concepts.

    Parameters
    ----------
    bank
        That of the concepts.
    explanation
        By them.
    found
        By their parts.
    """
    first, parts = len(bank.concepts), {part.id: part for part in bank.all_concepts}
    listed = [replace(score, id=first + score.id) for score in found.concepts]
    return replace(
        explanation,
        concepts=tuple(
            replace(score, parts=tuple(part for part in listed if parts[part.id].parent == score.id))
            for score in explanation.concepts
        ),
        parts=PartsReport(
            layer=bank.layer_of(first),
            contributions_total=found.contributions_total,
            unexplained=found.unexplained,
            faithfulness=found.faithfulness,
        ),
    )
