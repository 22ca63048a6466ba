"""Contrast banks (Herdt et al., 2025): planes between classes, and prototypes of what lies on one side of a plane.

They answer why one class and not another; codes of one image for one class, as other kinds have, they do not give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concepts.bank import Bank
from concepts.codec import Codec
from concepts.contrast.planes import Planes
from concepts.contrast.records import PlaneReport
from concepts.errors import CorruptData, UnsupportedOption
from concepts.kinds.nmf import NmfCodec

REPORTED = ("accuracy", "margin", "swap_rate", "swap_shift")
"""Tables over pairs of classes, float ``[n, n]``, NaN where nothing was measured; the fields of a ``PlaneReport``."""


@dataclass(frozen=True)
class ContrastTables:
    """What a contrast bank holds."""

    planes: Planes
    unit: float
    """Mean norm of the layer's activations: shifts and margins are in its multiples."""
    images: Tensor
    """Training images of each class, int64 ``[n]``."""
    reports: Mapping[str, Tensor]
    """By the names in ``REPORTED``."""
    prototypes: NmfCodec | None
    """Of all ordered pairs that have some; a pair's number takes the place of a class."""
    pairs: Mapping[tuple[int, int], int]
    """Numbers of the ordered pairs that have prototypes."""

    def report(self, target: int, other: int) -> PlaneReport:
        """Return what was measured of the plane from one class to another."""
        values = {name: float(table[target, other]) for name, table in self.reports.items()}
        known = {name: value for name, value in values.items() if value == value}  # NaN is not itself
        return PlaneReport(int(self.images[target]), int(self.images[other]), **known)


def tables(bank: Bank) -> ContrastTables:
    """Return what a contrast bank holds, checked, on the CPU.

    Its tensors: ``directions`` ``[n, C]``, ``products`` ``[n, n]`` and ``centre`` ``[C]`` (see ``Planes``); ``images``
    int64 ``[n]``; ``unit``; those in ``REPORTED``; ``dictionary`` ``[K, C]`` where there are prototypes, each of which
    is of a class (``class_index``) against another (``other_index``).

    Raises
    ------
    CorruptData
        If a tensor is missing or has the wrong shape, or a prototype names no pair.
    """
    found = bank.tensors
    missing = {"directions", "products", "centre", "images", "unit", *REPORTED} - found.keys()
    if missing:
        raise CorruptData(f"a contrast bank needs the tensor {min(missing)!r}")
    if found["directions"].shape[1:] != (bank.channels,):
        raise CorruptData(f"the directions of a contrast bank must be one a class, in its {bank.channels} channels")
    classes = len(found["directions"])
    images, unit = found["images"], found["unit"]
    if images.shape != (classes,) or unit.numel() != 1 or not 0 < float(unit) < math.inf:
        raise CorruptData("a contrast bank needs a count of images for each class, and a mean norm above zero")
    if any(found[name].shape != (classes, classes) for name in REPORTED):
        raise CorruptData(f"the tables of a contrast bank must have a number for each pair of {classes} classes")
    known = images > 0
    planes = Planes(found["directions"], found["products"], found["centre"], known)
    pairs: dict[tuple[int, int], int] = {}
    owners = []
    for concept in bank.concepts:
        target, other = concept.class_index, concept.other_index
        if target is None or other is None or not 0 <= min(target, other) < max(target, other) < classes:
            raise CorruptData(f"prototype {concept.id} of a contrast bank must name two of its classes")
        owners.append(pairs.setdefault((target, other), len(pairs)))
    if owners and "dictionary" not in found:
        raise CorruptData("a contrast bank with prototypes needs the tensor 'dictionary'")
    if owners and found["dictionary"].shape[1:] != (bank.channels,):
        raise CorruptData(f"the prototypes of a contrast bank must have its {bank.channels} channels")
    prototypes = NmfCodec(found["dictionary"].float(), owners) if owners else None
    reports = {name: found[name] for name in REPORTED}
    return ContrastTables(planes, float(unit), images, reports, prototypes, pairs)


def check(bank: Bank) -> None:
    """Raise CorruptData where a bank does not hold what it must."""
    tables(bank)


def load(tensors: Mapping[str, Tensor], concept_classes: Sequence[int | None]) -> Codec:
    """Refuse: a contrast bank is asked otherwise.

    Raises
    ------
    UnsupportedOption
        Always.
    """
    del tensors, concept_classes
    raise wrong_kind("contrast")


def wrong_kind(kind: str) -> UnsupportedOption:
    """Return the refusal of a question that banks of a kind do not answer, which names those that they do."""
    if kind == "contrast":
        return UnsupportedOption(
            "banks of kind contrast say why one class and not another: ask Contrast, or take a bank of another kind"
        )
    return UnsupportedOption(
        f"banks of kind {kind} do not say why one class and not another: ask Explain or Intervene, or take a bank of "
        "kind contrast"
    )


def concept_codec(bank: Bank) -> NmfCodec | None:
    """Return the codec of the prototypes; the number of an ordered pair takes the place of a class."""
    return tables(bank).prototypes


def directions(tensors: Mapping[str, Tensor], channels: int) -> Tensor:
    """Return the prototypes."""
    return tensors.get("dictionary", torch.zeros(0, channels))
