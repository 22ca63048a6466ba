"""Subspace banks (FALCON, arXiv 2307.10504): groups of features of a layer that mean something together.

A group is active in an image if each of its features is *highly active* there: reaches the bank's threshold in the
image's representation, the mean activation over positions scaled to norm 1. Only active groups have codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from concepts.bank import Bank
from concepts.codec import EMPTY, Codec, Codes, DenseCodes
from concepts.errors import CorruptData


@dataclass(frozen=True)
class SubspaceCodes(DenseCodes):
    """Codes of active groups, with the activation that their components are parts of."""

    positions: Tensor
    """``[B, P, C]``."""


class SubspaceCodec:
    """Codes: means over the features of a group; components: these features, the others zero. See ``Codec``.

    Parameters
    ----------
    features
        Of all groups, one group after the other, int64 ``[F]``.
    offsets
        Where each group begins, and where the last one ends, int64 ``[K + 1]``.
    threshold
        From which on a feature of the representation is highly active.

    Raises
    ------
    CorruptData
        If these are no groups, or the threshold is no number.
    """

    reconstructs = False
    substitutes = False
    differentiable = True
    homogeneous = True
    offset: Tensor | None = None
    per_class = False
    needs_non_negative = False

    def __init__(self, features: Tensor, offsets: Tensor, threshold: float) -> None:
        _check(features, offsets, threshold)
        self._sizes = offsets.diff()
        # One row a group and a last one of no feature, which stands for empty slots; rows end with the absent feature.
        self._members = torch.full((len(offsets), int(self._sizes.max())), EMPTY)
        for group, (start, end) in enumerate(pairwise(offsets.tolist())):
            self._members[group, : end - start] = features[start:end]
        self._threshold = threshold

    def to(self, device: torch.device, *, screening: bool = False) -> Codec:
        """Return this codec, moved to a device; it has nothing to screen."""
        del screening
        self._members, self._sizes = self._members.to(device), self._sizes.to(device)
        return self

    def classes(self) -> None:
        """Return None: groups belong to no class."""

    def together(self) -> Codec:
        """Return itself."""
        return self

    def encode(self, positions: Tensor, targets: Tensor) -> SubspaceCodes:
        """Return the codes of the groups that are active in each image; targets do not matter. See ``Codec.encode``."""
        del targets
        ids = self._active(positions)
        values = self._sums(positions, ids) / self._sizes[ids.clamp_min(0)].unsqueeze(1)
        return SubspaceCodes(values, ids, positions)

    def combine(self, codes: Codes, weights: Tensor | None = None) -> Tensor:
        """Return the activation with each feature weighed as its groups are; see ``Codec.combine``.

        Groups may share a feature, which is there once: it has the weight of largest size among them, none where two
        of opposite sign are the largest. So ones give the projection on all features of active groups.
        """
        own = _subspace(codes)
        weights = torch.ones_like(own.ids, dtype=own.values.dtype) if weights is None else weights.to(own.values.dtype)
        members = self._index(own.ids, own.positions.shape[2]).flatten(1)
        spread = weights.unsqueeze(2).expand(-1, -1, self._members.shape[1]).flatten(1)
        nothing = weights.new_zeros(len(weights), own.positions.shape[2] + 1)
        highest = nothing.scatter_reduce(1, members, spread, "amax")
        lowest = nothing.scatter_reduce(1, members, spread, "amin")
        chosen = highest * (highest > -lowest) + lowest * (-lowest > highest)
        return own.positions * chosen[:, None, :-1]

    def contributions(self, codes: Codes, gradient: Tensor) -> Codes:
        """Return ``Σ_S G ⊙ a`` at every position; see ``Codec.contributions``."""
        own = _subspace(codes)
        return own.with_values(self._sums(gradient * own.positions, own.ids))

    def gradients(self, codes: Codes, slots: Tensor) -> Tensor:
        """Return ``1/|S|`` on the features of each group: which groups are active is locally constant."""
        _, positions, channels = _subspace(codes).positions.shape
        ids = codes.ids.gather(1, slots)
        slope = (1 / self._sizes[ids.clamp_min(0)].to(codes.values.dtype)).unsqueeze(2)
        members = self._index(ids, channels)
        found = slope.new_zeros(*ids.shape, channels + 1).scatter_(2, members, slope.expand(members.shape))
        return found[..., :-1].unsqueeze(2).expand(-1, -1, positions, -1)

    def _active(self, positions: Tensor) -> Tensor:
        """Return the active groups of each image, ascending, int64 ``[B, S]``: as many slots as one image needs."""
        high = functional.pad(representations(positions) >= self._threshold, (0, 1), value=True)
        active = high[:, self._members[:-1]].all(2)
        groups = active.shape[1]
        slots = max(int(active.sum(1).max()), 1)
        ids = torch.where(active, torch.arange(groups, device=active.device), groups).sort(1).values[:, :slots]
        return ids.masked_fill(ids == groups, EMPTY)

    def _sums(self, values: Tensor, ids: Tensor) -> Tensor:
        """Sum values ``[B, P, C]`` over the features of groups ``[B, S]``: ``[B, P, S]``, 0 for empty slots."""
        images, positions, channels = values.shape
        table = functional.pad(values.mT, (0, 0, 0, 1)).reshape(-1, positions)
        first = torch.arange(images, device=ids.device).view(-1, 1, 1) * (channels + 1)
        index = (self._index(ids, channels) + first).flatten(0, 1)
        return functional.embedding_bag(index, table, mode="sum").view(images, -1, positions).mT

    def _index(self, ids: Tensor, absent: int) -> Tensor:
        """Return the features of groups, int64 ``[B, S]`` to ``[B, S, largest]``, filled up with ``absent``."""
        members = self._members[ids]  # an empty slot, −1, finds the last row
        return members.masked_fill(members == EMPTY, absent)


def representations(positions: Tensor) -> Tensor:
    """Return the mean activation of each image, scaled to norm 1: ``[B, P, C]`` to float32 ``[B, C]``."""
    # Added up in double precision: whether a feature reaches a threshold must not depend on the order.
    return functional.normalize(positions.mean(1, dtype=torch.float64), dim=1).float()


def _subspace(codes: Codes) -> SubspaceCodes:
    if not isinstance(codes, SubspaceCodes):
        raise TypeError("these codes are not of a subspace bank")
    return codes


def _check(features: Tensor, offsets: Tensor, threshold: float) -> None:
    """Raise CorruptData where tensors are no groups of features."""
    integers = features.dtype == offsets.dtype == torch.int64
    if not integers or features.ndim != 1 or offsets.ndim != 1 or len(offsets) < 2:
        raise CorruptData("a subspace bank needs features and offsets, both int64 vectors, of at least one group")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(features) or not bool((offsets.diff() > 0).all()):
        raise CorruptData(f"the offsets of a subspace bank must ascend from 0 to its {len(features)} features")
    if int(features.min()) < 0:
        raise CorruptData("a subspace bank names a feature below 0")
    inside = torch.ones(len(features), dtype=torch.bool)
    inside[offsets[:-1]] = False
    if not bool((features.diff(prepend=features[:1]) > 0)[inside].all()):
        raise CorruptData("the features of a group must ascend, each named once")
    if not torch.tensor(threshold).isfinite():
        raise CorruptData("the threshold of a subspace bank must be a finite number")


def load(tensors: Mapping[str, Tensor], concept_classes: Sequence[int | None]) -> Codec:
    """Rebuild the codec from a bank's tensors: ``features`` ``[F]``, ``offsets`` ``[K + 1]``, and ``threshold``."""
    missing = {"features", "offsets", "threshold"} - tensors.keys()
    if missing:
        raise CorruptData(f"a subspace bank needs the tensor {min(missing)!r}")
    if tensors["threshold"].numel() != 1:
        raise CorruptData("a subspace bank has one threshold")
    codec = SubspaceCodec(tensors["features"], tensors["offsets"], float(tensors["threshold"]))
    if len(tensors["offsets"]) - 1 != len(concept_classes):
        raise CorruptData(f"{len(tensors['offsets']) - 1} groups cannot be {len(concept_classes)} concepts")
    if any(owner is not None for owner in concept_classes):
        raise CorruptData("the concepts of a subspace bank belong to no class")
    return codec


def check(bank: Bank) -> None:
    """Raise CorruptData where a bank does not hold what it must, or names features that its layer does not have."""
    bank.codec()
    largest = int(bank.tensors["features"].max())
    if largest >= bank.channels:
        raise CorruptData(f"a subspace bank of {bank.channels} channels names the feature {largest}")


def directions(tensors: Mapping[str, Tensor], channels: int) -> Tensor:
    """Return ones on the features of each group: what has none of these has nothing along it."""
    sizes = tensors["offsets"].diff()
    groups = torch.arange(len(sizes)).repeat_interleave(sizes)
    return torch.zeros(len(sizes), channels).index_put_((groups, tensors["features"]), torch.ones(len(groups)))
