"""NMF banks (CRAFT, arXiv 2211.10154; FACE, arXiv 2510.11675; class prototypes): rows of a non-negative dictionary.

Codes are the non-negative least squares solution on the frozen dictionary, one dictionary a class where concepts
belong to classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from concepts import nnls
from concepts.codec import Codec, Codes, DenseCodes
from concepts.errors import CorruptData, UnsupportedOption

FREE = -1
"""Class of concepts that belong to no class."""


class NmfCodec:
    """Codes and components ``z_k · d_k`` of a non-negative dictionary.

    Parameters
    ----------
    dictionary
        float32 ``[K, C]``, ≥ 0.
    concept_classes
        For each of the K concepts its class, or None. Either all have one or none has.

    Raises
    ------
    CorruptData
        If the shapes do not match, or a value is negative or not finite.
    """

    reconstructs = True
    substitutes = False
    differentiable = True
    homogeneous = True
    offset: Tensor | None = None
    needs_non_negative = True

    def __init__(self, dictionary: Tensor, concept_classes: Sequence[int | None]) -> None:
        if dictionary.ndim != 2 or not len(dictionary) or len(dictionary) != len(concept_classes):
            raise CorruptData(
                f"a dictionary of shape {list(dictionary.shape)} cannot hold {len(concept_classes)} concepts"
            )
        if not bool(torch.isfinite(dictionary).all()) or bool((dictionary < 0).any()):
            raise CorruptData("the dictionary of an NMF bank must be finite and non-negative")
        owners = [FREE if c is None else c for c in concept_classes]
        self.per_class = any(owner != FREE for owner in owners)
        if self.per_class and FREE in owners:
            raise CorruptData("some concepts of the bank have a class and some have none")
        members: dict[int, list[int]] = {}
        for concept, owner in enumerate(owners):
            members.setdefault(owner, []).append(concept)
        slots = max(len(concepts) for concepts in members.values())
        self._dictionaries = dictionary.new_zeros(len(members), slots, dictionary.shape[1])
        self._ids = torch.full((len(members), slots), -1)
        for row, concepts in enumerate(members.values()):
            self._dictionaries[row, : len(concepts)] = dictionary[concepts]
            self._ids[row, : len(concepts)] = torch.tensor(concepts)
        wide = self._dictionaries.double()
        self._grams = wide @ wide.mT
        self._owners = list(members)
        self._row_of_class = torch.full((max(self._owners) + 1,), -1) if self.per_class else torch.zeros(0)
        for row, owner in enumerate(self._owners if self.per_class else ()):
            self._row_of_class[owner] = row

    def to(self, device: torch.device, *, screening: bool = False) -> Codec:
        """Return this codec, moved to a device; it has nothing to screen."""
        del screening
        for name in ("_dictionaries", "_ids", "_grams", "_row_of_class"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def classes(self) -> frozenset[int] | None:
        """Return the classes that have concepts; None where concepts belong to no class."""
        return frozenset(self._owners) if self.per_class else None

    def together(self) -> Codec:
        """Return the codec of one dictionary of all concepts, on the same device."""
        if not self.per_class:
            return self
        there = self._ids >= 0
        dictionary = torch.empty_like(self._dictionaries[there])
        dictionary[self._ids[there]] = self._dictionaries[there]
        return NmfCodec(dictionary, [None] * len(dictionary)).to(dictionary.device)

    def encode(self, positions: Tensor, targets: Tensor) -> DenseCodes:
        """Solve ``min_{z ≥ 0} ‖a − zD‖²`` exactly at every position; see ``Codec.encode``.

        Raises
        ------
        UnsupportedOption
            If the bank has no concepts for a target class.
        """
        rows = self._rows(targets)
        if len(self._dictionaries) == 1:  # one dictionary: one Gram matrix for the whole batch
            b = positions.double() @ self._dictionaries[0].double().T
            solution = nnls.solve(self._grams, b.flatten(0, 1).unsqueeze(0))
        else:
            b = positions.double() @ self._dictionaries[rows].double().mT
            solution = nnls.solve(self._grams[rows], b)
        tolerance = solution.violation.view(b.shape[:2]).amax(1)
        return DenseCodes(solution.codes.view(b.shape).to(positions.dtype), self._ids[rows], tolerance=tolerance)

    def combine(self, codes: Codes, weights: Tensor | None = None) -> Tensor:
        """See ``Codec.combine``."""
        values = codes.values if weights is None else codes.values * weights.unsqueeze(1)
        return values @ self._atoms(codes)

    def contributions(self, codes: Codes, gradient: Tensor) -> Codes:
        """Return ``m = z ⊙ (G Dᵀ)``; see ``Codec.contributions``."""
        return codes.with_values(codes.values * (gradient @ self._atoms(codes).mT))

    def gradients(self, codes: Codes, slots: Tensor) -> Tensor:
        """Return the slopes of the least-squares solutions on their active sets; see ``nnls.adjoint``."""
        rows = self._dictionary_of(codes)
        one_hot = functional.one_hot(slots, codes.ids.shape[1]).unsqueeze(1).expand(-1, codes.values.shape[1], -1, -1)
        adjoint = nnls.adjoint(self._grams[rows], codes.values > 0, one_hot)
        atoms = self._dictionaries[rows].double().unsqueeze(1)
        return (adjoint @ atoms).transpose(1, 2).to(codes.values.dtype)

    def _atoms(self, codes: Codes) -> Tensor:
        """Return the dictionary of each image, ``[B, S, C]``, or the only one, ``[S, C]``."""
        return self._dictionaries[0] if len(self._dictionaries) == 1 else self._dictionaries[self._dictionary_of(codes)]

    def _dictionary_of(self, codes: Codes) -> Tensor:
        """Return the row of each image's dictionary, int64 ``[B]``."""
        # The first slot of a row is never empty and tells the row: first concepts ascend from row to row.
        return torch.searchsorted(self._ids[:, 0].contiguous(), codes.ids[:, 0].contiguous())

    def _rows(self, targets: Tensor) -> Tensor:
        if not self.per_class:
            return torch.zeros_like(targets)
        known = (targets >= 0) & (targets < len(self._row_of_class))
        rows = torch.where(known, self._row_of_class[targets.clamp(0, len(self._row_of_class) - 1)], -1)
        if bool((rows < 0).any()):
            raise UnsupportedOption("the bank has no concepts for a requested class")
        return rows


def load(tensors: Mapping[str, Tensor], concept_classes: Sequence[int | None]) -> Codec:
    """Rebuild the codec from a bank's tensors: ``dictionary`` ``[K, C]``."""
    if "dictionary" not in tensors:
        raise CorruptData("an NMF bank needs the tensor 'dictionary'")
    return NmfCodec(tensors["dictionary"].float(), concept_classes)


def directions(tensors: Mapping[str, Tensor], channels: int) -> Tensor:
    """Return the dictionary."""
    del channels
    return tensors["dictionary"]
