"""What a service holds: models, banks and concepts, as plain, frozen records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from whence import _labels
from whence._explanation import Box

BankKind = Literal["sae", "nmf", "contrast", "subspace", "unknown"]
"""``unknown``: a kind that this version of the SDK has not heard of."""


@dataclass(frozen=True, slots=True, repr=False)
class Model:
    """A frozen image classifier."""

    name: str
    digest: str
    """sha256 of the weights, hexadecimal."""
    architecture: str
    """E.g. ``torchvision:resnet50``."""
    class_names: tuple[str, ...]
    input_height: int
    """In pixels, as is the width."""
    input_width: int

    def __repr__(self) -> str:
        from whence._inventory_words import model_line

        return model_line(self)

    def _repr_html_(self) -> str:
        """What is known of it, for notebooks."""
        from whence._html import render_model

        return render_model(self)


@dataclass(frozen=True, slots=True)
class Labelling:
    """What the labels of a bank were found with."""

    clip: str
    """Name of the CLIP."""
    clip_digest: str
    """sha256 of its ``clip.json``, hexadecimal."""
    captions: int
    """How many its vocabulary had."""


@dataclass(frozen=True, slots=True, repr=False)
class Bank:
    """Concepts for one model and layer."""

    reference: str
    """``model/layer/name``."""
    digest: str
    """sha256 of ``bank.json``, hexadecimal."""
    kind: BankKind
    model: str
    layer: str
    name: str
    concept_count: int
    channels: int
    """Width of the layer."""
    weights_digest: str
    """sha256 of the weights that the bank was trained on, hexadecimal."""
    created: str
    """RFC 3339."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """On held-out images, by name."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """The full training configuration."""
    parts_layer: str = ""
    """Layer of the concepts' parts, their sub-concepts at an earlier layer; empty where the bank has none."""
    part_count: int = 0
    """How many parts there are; their ids follow those of the concepts."""
    labelling: Labelling | None = None
    """How its concepts were named; None where they were not."""

    def __repr__(self) -> str:
        from whence._inventory_words import bank_line

        return bank_line(self)

    def _repr_html_(self) -> str:
        """What is known of it, for notebooks."""
        from whence._html import render_bank

        return render_bank(self)


@dataclass(frozen=True, slots=True)
class Word:
    """A word or phrase that may name a concept."""

    text: str
    score: float
    """How well it fits, by the rule that named the concept: larger is better. No share, as a naming's score is."""


@dataclass(frozen=True, slots=True)
class Naming:
    """What a CLIP says of a concept, by its exemplars and counterfactuals."""

    label: str
    """The best word or phrase."""
    score: float
    """How far the label can be trusted, from 0 to 1."""
    weak: bool
    """Whether the score is below what a label should have, or there were no counterfactuals."""
    words: tuple[Word, ...] = ()
    """Best first."""
    phrases: tuple[Word, ...] = ()
    """Best first."""
    counterfactuals: int = 0
    """How many there were to compare with."""


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A stored crop that excites a concept most; or a counterfactual."""

    picture: bytes = field(repr=False)
    """A WebP file."""
    source: str
    """Key of the image that it was cut from."""
    box: Box
    """Where in that image."""
    activation: float

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, bytes]:
        """The crop, for notebooks."""
        return {"image/webp": self.picture}


@dataclass(frozen=True, slots=True, repr=False)
class Concept:
    """One element of a bank."""

    id: int
    label: str
    """Empty where the concept has no label."""
    class_index: int | None
    """The class that the concept belongs to, where the bank holds concepts per class."""
    class_name: str
    statistics: Mapping[str, float]
    """By name: importance, prevalence, reliability, …"""
    exemplars: tuple[Exemplar, ...]
    parent: int | None
    """Id of the concept that this one is a part of."""
    bank: str
    """``model/layer/name`` of the bank that this is from."""
    bank_digest: str
    layer: str = ""
    """For a part an earlier one than the bank's."""
    children: tuple[int, ...] = ()
    """Ids of its parts."""
    other_index: int | None = None
    """For a contrastive prototype: the class that its own is contrasted with."""
    other_name: str = ""
    named_by_person: bool = False
    """Whether the label was given by a person."""
    naming: Naming | None = None
    """What a machine says of it; it stays when a person gives another label. None where nothing was looked for."""
    counterfactuals: tuple[Exemplar, ...] = ()
    """Crops in which it is silent, and which are else like its exemplars, most similar first."""

    def __hash__(self) -> int:
        # Statistics have no hash; without them concepts still serve as keys, as of Client.intervene.
        return hash((self.bank, self.bank_digest, self.id))

    def __repr__(self) -> str:
        from whence._inventory_words import concept_line

        return concept_line(self)

    def _repr_html_(self) -> str:
        """Its exemplars and what is known of it, for notebooks."""
        from whence._html import render_concept

        return render_concept(self)

    @property
    def weak_label(self) -> bool:
        """Whether the label is a machine's that cannot be trusted much."""
        return not self.named_by_person and self.naming is not None and self.naming.weak

    @property
    def words(self) -> tuple[str, ...]:
        """The machine's words for it, best first."""
        return () if self.naming is None else tuple(word.text for word in self.naming.words)

    @property
    def name(self) -> str:
        """The label, with a question mark where it is weak; or the id where there is none."""
        return _labels.name(self)

    def save(self, path: str | os.PathLike[str], parts: Sequence[Concept] = (), *, dpi: int = 150) -> None:
        """Draw its exemplars, and beneath them those of its parts.

        Parameters
        ----------
        path
            Where to write; the suffix chooses the format (``.png``, ``.jpg``, ``.pdf``, ``.svg``, …).
        parts
            The concepts that ``children`` names.
        dpi
            Pixels per inch.

        Raises
        ------
        MissingExtra
            If matplotlib or Pillow is not installed.
        InvalidArgument
            If the suffix is no picture format, or there are no exemplars.
        OSError
            If the file cannot be written.
        """
        from whence._tree import save

        save(self, parts, path, dpi=dpi)
