"""What a kind of bank must offer to the engine, and the two forms in which it gives codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Codes")

EMPTY = -1
"""Id of a slot that holds no concept."""


@dataclass(frozen=True)
class Codes(ABC):
    """A number for every image, position and concept slot: codes, or contributions of them.

    A slot is a place in the row of one image; ``ids`` says which concept it holds, so that images of one batch may use
    different parts of a bank.
    """

    values: Tensor
    """By image and position; the last axis is of the form."""
    ids: Tensor
    """int64 ``[B, S]``: the concept of each slot; −1 where the slot is empty."""
    tolerance: Tensor | None = field(default=None, kw_only=True)
    """``[B]``: largest violation of the codes' optimality conditions, where they have some."""

    @abstractmethod
    def total(self) -> Tensor:
        """Sum over positions, ``[B, S]``."""

    @abstractmethod
    def peak(self) -> Tensor:
        """Largest over positions, ``[B, S]``."""

    @abstractmethod
    def peak_position(self) -> Tensor:
        """Position of the peak, int64 ``[B, S]``; the first one, if there are several."""

    @abstractmethod
    def active(self) -> Tensor:
        """At how many positions a value is not zero, int64 ``[B, S]``."""

    @abstractmethod
    def maps(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Values at every position of chosen (row, slot) pairs: two int64 ``[M]`` to ``[M, P]``."""

    def slots_of(self, concepts: Tensor) -> Tensor:
        """Return where concepts are, int64 ``[B, L]`` to ``[B, L]``; ``EMPTY`` where an image does not have one."""
        found = (self.ids.unsqueeze(1) == concepts.unsqueeze(2)) & (concepts != EMPTY).unsqueeze(2)
        return torch.where(found.any(2), found.long().argmax(2), EMPTY)

    def with_values(self: Self, values: Tensor) -> Self:
        """Return the same slots with other numbers."""
        return replace(self, values=values)

    def rows(self: Self, index: Tensor) -> Self:
        """Return the codes of chosen images, int64 ``[M]``."""
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})

    def to(self: Self, device: torch.device | str) -> Self:
        """Return the codes on a device."""
        return replace(self, **{name: value.detach().to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class DenseCodes(Codes):
    """A value for every slot at every position, ``[B, P, S]``: for banks with few concepts an image."""

    def total(self) -> Tensor:
        """Sum over positions, ``[B, S]``."""
        return self.values.sum(1)

    def peak(self) -> Tensor:
        """Largest over positions, ``[B, S]``."""
        return self.values.amax(1)

    def peak_position(self) -> Tensor:
        """Position of the peak, int64 ``[B, S]``; the first one, if there are several."""
        return self.values.argmax(1)

    def active(self) -> Tensor:
        """At how many positions a value is not zero, int64 ``[B, S]``."""
        return (self.values != 0).sum(1)

    def maps(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Values at every position of chosen (row, slot) pairs: two int64 ``[M]`` to ``[M, P]``."""
        return self.values[rows, :, slots]


@dataclass(frozen=True)
class SparseCodes(Codes):
    """The few values of each position that are not zero: for banks with many concepts, most of them silent."""

    slots: Tensor
    """int64 ``[B, P, k]``: the slot of each of the values ``[B, P, k]``."""

    @classmethod
    def of(cls, values: Tensor, concepts: Tensor) -> SparseCodes:
        """Give every concept that is active anywhere in an image a slot, in ascending order of concepts.

        Parameters
        ----------
        values
            ``[B, P, k]``.
        concepts
            int64 ``[B, P, k]``; those of zero values do not matter.
        """
        images, none = len(values), torch.iinfo(torch.int64).max
        flat = concepts.masked_fill(values == 0, none).flatten(1)
        found, order = flat.sort(dim=1)
        fresh = torch.ones_like(found)
        fresh[:, 1:] = found[:, 1:] != found[:, :-1]
        rank = fresh.cumsum(1) - 1
        slots = torch.empty_like(rank).scatter_(1, order, rank)
        ids = torch.full((images, int(rank[:, -1].max()) + 1), none, device=flat.device).scatter_(1, rank, found)
        return cls(values, ids.masked_fill(ids == none, EMPTY), slots.view_as(concepts))

    def concepts(self) -> Tensor:
        """Return the concept of each value, int64 ``[B, P, k]``; any where the value is zero."""
        return self.per_slot(self.ids.clamp_min(0))

    def per_slot(self, weights: Tensor) -> Tensor:
        """Spread what slots have, ``[B, S]``, over the values: ``[B, P, k]``."""
        return weights.gather(1, self.slots.flatten(1)).view_as(self.slots)

    def total(self) -> Tensor:
        """Sum over positions, ``[B, S]``."""
        nothing = self.values.new_zeros(self.ids.shape)
        return nothing.scatter_add_(1, self.slots.flatten(1), self.values.flatten(1))

    def peak(self) -> Tensor:
        """Largest over positions, ``[B, S]``; where a concept is silent its value is zero."""
        nothing = self.values.new_zeros(self.ids.shape)
        return nothing.scatter_reduce_(1, self.slots.flatten(1), self.values.flatten(1), "amax")

    def peak_position(self) -> Tensor:
        """Position of the peak, int64 ``[B, S]``; the first one, if there are several."""
        positions = torch.arange(self.values.shape[1], device=self.slots.device).view(1, -1, 1)
        is_peak = self.values == self.per_slot(self.peak())
        candidates = torch.where(is_peak, positions, self.values.shape[1])
        last = torch.full_like(self.ids, self.values.shape[1] - 1)
        return last.scatter_reduce_(1, self.slots.flatten(1), candidates.flatten(1), "amin")

    def active(self) -> Tensor:
        """At how many positions a value is not zero, int64 ``[B, S]``."""
        nothing = torch.zeros_like(self.ids)
        return nothing.scatter_add_(1, self.slots.flatten(1), (self.values != 0).flatten(1).long())

    def maps(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Values at every position of chosen (row, slot) pairs: two int64 ``[M]`` to ``[M, P]``."""
        return (self.values[rows] * (self.slots[rows] == slots.view(-1, 1, 1))).sum(2)


class Codec(Protocol):
    """Codes and components of one bank (methods section 0)."""

    reconstructs: bool
    """Whether the components add up to a reconstruction of the activation."""
    substitutes: bool
    """Whether the reconstruction is meant to stand in for the activation, where the model is linear for each input."""
    differentiable: bool
    """Whether ``gradients`` is offered."""
    homogeneous: bool
    """Whether codes grow in proportion to the activation, so that ``Σ_pos ⟨∂z_k/∂a, a⟩ = Σ_pos z_k``."""
    offset: Tensor | None
    """``[C]``: what the reconstruction has at every position beside the components; it belongs to no concept."""
    per_class: bool
    """Whether the codes depend on the target class."""
    needs_non_negative: bool
    """Whether only non-negative activations have codes."""

    def to(self, device: torch.device, *, screening: bool = False) -> Codec:
        """Return the codec with its tensors on a device.

        Parameters
        ----------
        device
            Where to compute.
        screening
            Whether products that only choose among concepts may be made in bfloat16; codes stay float32.
        """
        ...

    def classes(self) -> frozenset[int] | None:
        """Return the classes that have concepts; None where concepts belong to no class."""
        ...

    def together(self) -> Codec:
        """Return a codec of the same concepts in which they belong to no class; itself where they do not anyway."""
        ...

    def encode(self, positions: Tensor, targets: Tensor) -> Codes:
        """Return the codes of activations ``[B, P, C]`` for target classes int64 ``[B]``."""
        ...

    def combine(self, codes: Codes, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum of components, ``[B, P, C]``; weights ``[B, S]``, one where omitted.

        All ones, and the offset, is the reconstruction; a single one is the component of that concept.
        """
        ...

    def contributions(self, codes: Codes, gradient: Tensor) -> Codes:
        """Return ``⟨G, comp_k⟩`` at every position for gradients ``[B, P, C]``."""
        ...

    def gradients(self, codes: Codes, slots: Tensor) -> Tensor:
        """Return ``∂(Σ_pos z_k)/∂a`` of chosen slots, int64 ``[B, L]`` to ``[B, L, P, C]``, if ``differentiable``."""
        ...


def decode(codec: Codec, codes: Codes, weights: Tensor | None = None) -> Tensor:
    """Return the reconstruction ``â`` from weighted codes, ``[B, P, C]``; weights ``[B, S]``, one where omitted."""
    components = codec.combine(codes, weights)
    return components if codec.offset is None else components + codec.offset
