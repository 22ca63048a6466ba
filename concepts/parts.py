"""Parts of concepts (the recursion of CRAFT): what is asked of their bank, and how its answers join those of concepts.

The parts are a bank of their own at an earlier layer, explained for the same images and targets. There every position
is shared out among the concepts as their codes are at the concepts' layer, and each share is coded by the parts of that
concept alone: a part says what its concept is made of here, and not what else the image shows. The shares add up to the
activation wherever a concept is active. Contributions of parts are a second statement about the same logit; they do not
add up to those of their concepts.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from concepts import nnls
from concepts.bank import Bank
from concepts.codec import EMPTY, Codec, Codes, DenseCodes
from concepts.errors import UnsupportedOption
from concepts.explanation import ConceptScope, EngineRequest, ExplainOptions, Explanation, PartsReport
from concepts.kinds.nmf import NmfCodec
from concepts.layout import Layout


class Whole(NamedTuple):
    """What the concepts say of a batch, which their parts divide."""

    codes: Codes
    layout: Layout
    """Of the concepts' layer."""

    def rows(self, index: Sequence[int]) -> Whole:
        """Return what they say of chosen images."""
        return self._replace(codes=self.codes.rows(torch.tensor(index, device=self.codes.ids.device)))


class PartsCodec(NmfCodec):
    """Codes of parts: each concept's are solved for alone.

    Parameters
    ----------
    dictionary, concept_classes
        As of ``NmfCodec``.
    parents
        Of each part, its concept.
    """

    def __init__(self, dictionary: Tensor, concept_classes: Sequence[int | None], parents: Sequence[int]) -> None:
        super().__init__(dictionary, concept_classes)
        self._parents = torch.tensor(parents)
        owners = self._parents[self._ids.clamp_min(0)]
        # Where no atom of one concept meets one of another, least squares fall apart into one problem for each.
        self._grams *= owners.unsqueeze(1) == owners.unsqueeze(2)

    def to(self, device: torch.device, *, screening: bool = False) -> Codec:
        """Return this codec, moved to a device."""
        self._parents = self._parents.to(device)
        return super().to(device, screening=screening)

    def together(self) -> Codec:
        """Return itself: parts go with the concepts of one class only."""
        return self

    def encode_within(self, positions: Tensor, targets: Tensor, layout: Layout, whole: Whole) -> DenseCodes:
        """Return the codes of each concept's share of the activation.

        Parameters
        ----------
        positions, targets
            As of ``encode``.
        layout
            Of the parts' layer.
        whole
            What the concepts say of the same images.
        """
        rows = self._rows(targets)
        ids = self._ids[rows]
        slots = whole.codes.slots_of(self._parents[ids.clamp_min(0)].masked_fill(ids == EMPTY, EMPTY))
        there = slots != EMPTY
        maps = whole.codes.values.new_zeros(*slots.shape, whole.layout.positions)
        maps[there] = whole.codes.maps(there.nonzero()[:, 0], slots[there])
        share = shares(maps.transpose(1, 2), whole.codes.values.sum(2), whole.layout, layout)
        b = (positions.double() @ self._dictionaries[rows].double().mT) * share
        solution = nnls.solve(self._grams[rows], b)
        return DenseCodes(solution.codes.to(positions.dtype), ids, tolerance=solution.violation.amax(1))


def codec(bank: Bank) -> Codec:
    """Return the codec of a bank on the CPU, be it one of concepts or of their parts."""
    parents = [concept.parent for concept in bank.concepts if concept.parent is not None]
    if not parents:
        return bank.codec()
    return PartsCodec(bank.tensors["dictionary"].float(), [concept.class_index for concept in bank.concepts], parents)


def shares(maps: Tensor, everything: Tensor, late: Layout, early: Layout) -> Tensor:
    """Return how much of every position of an earlier layer belongs to concepts.

    Parameters
    ----------
    maps
        Codes of some concepts, ``[B, P, S]``.
    everything
        Their sum over all concepts, ``[B, P]``.
    late, early
        Layouts of the concepts' layer and of the earlier one.

    Returns
    -------
    ``[B, P', S]``, from 0 to 1; 0 where no concept is active. Tokens, which have no place in the image, belong to
    concepts as the image as a whole does.
    """
    codes = torch.cat([maps, everything.unsqueeze(2)], 2)
    placed = resized(codes[:, late.tokens :], late.grid, early.grid)
    codes = torch.cat([codes.sum(1, keepdim=True).expand(-1, early.tokens, -1), placed], 1)
    return codes[..., :-1] / codes[..., -1:].clamp_min(torch.finfo(codes.dtype).tiny)


def resized(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize maps ``[B, h·w, S]`` bilinearly to ``[B, H·W, S]``."""
    if grid == size:
        return maps
    values = maps.transpose(1, 2).unflatten(2, grid)
    return functional.interpolate(values, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


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
