"""What if chosen concepts were weaker or stronger: ``a' = a + Σ (s_k − 1)·comp_k``, and the head once more.

A scale of 0 removes a concept, 1 leaves it, 2 doubles it; a negative one puts in its opposite. Codes of kinds that are
never negative then stand for something that the model's layer may never show: such answers are to be read with care.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from concepts.answers import PREDICTIONS, UNTIMED, class_score
from concepts.bank import Bank
from concepts.codec import Codes
from concepts.errors import InvalidInput, NumericalFailure, UnsupportedOption
from concepts.explanation import ClassScore, ConceptScope, StageTimes
from concepts.model import ModelSpec

LARGEST_SCALE = 1000.0
"""Beyond which, either way, no activation is near and float32 soon ends."""


@dataclass(frozen=True, slots=True)
class InterventionRequest:
    """One image's part of a batch."""

    target: int | None = None
    """Index of the class whose concepts are meant, where they belong to classes; None: the predicted class."""
    scales: Mapping[int, float] = field(default_factory=dict)
    """Factor for the codes of each concept."""
    concepts: ConceptScope = "target"
    """Whose codes are solved for, and may be scaled; as of ``ExplainOptions``."""


@dataclass(frozen=True, slots=True)
class Intervention:
    """The prediction before and after the codes of chosen concepts were scaled.

    ``before`` and ``after`` hold the same classes, the most probable of either, so that they can be compared class by
    class; each is sorted by its own probabilities.
    """

    model: str
    model_digest: str
    bank: str
    """``model/layer/name``."""
    bank_digest: str
    target: ClassScore
    """The class whose concepts were meant, as it was before."""
    before: tuple[ClassScore, ...]
    after: tuple[ClassScore, ...]
    stages: StageTimes
    """``explain_ms`` is the time of the change, the head on it, and the answer."""
    runtime: str
    """E.g. ``torch cpu float32``."""


def check(bank: Bank, spec: ModelSpec, request: InterventionRequest) -> None:
    """Refuse scales that cannot be meant.

    Raises
    ------
    InvalidInput
        If there are no scales, or one is not finite or too large.
    UnknownConcept
        If the bank has no such concept.
    UnsupportedOption
        If a concept belongs to another class than the target, where that is named, or is a part of one.
    """
    if not request.scales:
        raise InvalidInput("no concept is scaled; give at least one concept and its factor (0 removes, 2 doubles)")
    for concept_id, scale in request.scales.items():
        concept = bank.concept(concept_id)
        if concept_id >= len(bank.concepts):
            raise UnsupportedOption(
                f"concept {concept_id} is a part, at another layer: scale the concept {concept.parent} it belongs to",
                bank=bank.reference,
                concept=concept_id,
            )
        if not math.isfinite(scale) or abs(scale) > LARGEST_SCALE:
            raise InvalidInput(
                f"concept {concept_id} cannot be scaled by {scale:g}; a scale is a number from {-LARGEST_SCALE:g} to "
                f"{LARGEST_SCALE:g}"
            )
    if request.target is not None and (refusal := misplaced(bank, spec, request, request.target)):
        raise refusal


def misplaced(bank: Bank, spec: ModelSpec, request: InterventionRequest, target: int) -> UnsupportedOption | None:
    """Return the refusal of concepts that belong to another class than the target, if there are any."""
    if request.concepts == "all":
        return None
    for concept_id in request.scales:
        owner = bank.concepts[concept_id].class_index
        if owner not in (None, target):
            name, wanted = spec.class_names[owner], spec.class_names[target]
            whose = "the target" if request.target is not None else "the predicted class"
            return UnsupportedOption(
                f"concept {concept_id} belongs to class {name!r}, not to {whose} {wanted!r}; set `target` to {name!r}, "
                "and scale the concepts of one class at a time, or ask for the concepts of all classes",
                bank=bank.reference,
                concept=concept_id,
            )
    return None


def weights(codes: Codes, requests: Sequence[InterventionRequest], concepts: int) -> Tensor:
    """Return ``s_k − 1`` for every slot, ``[B, S]``: what each component is added with; zero where nothing is scaled.

    Parameters
    ----------
    codes
        Of the batch.
    requests
        One an image.
    concepts
        How many the bank holds.
    """
    factors = torch.ones(len(requests), concepts)
    for row, request in enumerate(requests):
        factors[row, list(request.scales)] = torch.tensor(list(request.scales.values()), dtype=factors.dtype)
    change = (factors - 1).to(codes.values).gather(1, codes.ids.clamp_min(0))
    return change.masked_fill(codes.ids < 0, 0.0)


def answer(
    spec: ModelSpec, bank: Bank, runtime: str, before: Tensor, after: Tensor, target: int
) -> Intervention | NumericalFailure:
    """Return one image's answer, ``UNTIMED``, or why there is none.

    Parameters
    ----------
    before, after
        Logits ``[n_classes]`` on the CPU; those before are finite.
    """
    if not bool(torch.isfinite(after).all()):
        return NumericalFailure("the model answered the changed activation with NaN or infinity; scale less")
    probabilities = [torch.softmax(logits.double(), 0).numpy() for logits in (before, after)]
    orders = [np.argsort(-p, kind="stable") for p in probabilities]
    listed = {int(index) for order in orders for index in order[:PREDICTIONS]}
    was, is_now = (
        tuple(class_score(spec, logits, p, index) for index in order.tolist() if index in listed)
        for logits, p, order in zip((before, after), probabilities, orders, strict=True)
    )
    return Intervention(
        model=spec.name,
        model_digest=spec.weights_digest,
        bank=bank.reference,
        bank_digest=bank.digest,
        target=class_score(spec, before, probabilities[0], target),
        before=was,
        after=is_now,
        stages=UNTIMED,
        runtime=runtime,
    )
