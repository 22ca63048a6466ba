"""What is asked of a contrast bank, and what it answers: plain, frozen records that mirror the wire contract."""

from __future__ import annotations

from dataclasses import dataclass, field

from concepts.explanation import (
    ClassScore,
    ConceptMap,
    ConceptScore,
    ExplainOptions,
    FaithfulnessReport,
    MapKind,
    StageTimes,
)


@dataclass(frozen=True, slots=True)
class ContrastRequest:
    """One image's part of a batch."""

    target: int | None = None
    """Index of class i; None: the predicted class."""
    other: int | None = None
    """Index of class j; None: of those that a plane lies between and i, the most probable one."""
    options: ExplainOptions = field(default_factory=ExplainOptions)
    """``top_k`` and ``order`` of the prototypes, ``maps`` and ``map_size``; the rest does not apply."""
    shift: bool = True
    """Whether to look for the shift at which the image would flip."""


@dataclass(frozen=True, slots=True)
class ShiftPoint:
    """Both classes' probabilities at one shift, which is in units of the layer's mean activation norm."""

    shift: float
    target_probability: float
    other_probability: float


@dataclass(frozen=True, slots=True)
class PlaneReport:
    """What the plane between two classes was found to do on held-out images; None: not measured."""

    target_images: int
    """Training images that it was fitted to."""
    other_images: int
    accuracy: float | None = None
    """Share of held-out positions that speak for either class on its side; mean of both classes."""
    margin: float | None = None
    """Their mean distance on their own side, in units of the mean activation norm; mean of both classes."""
    swap_rate: float | None = None
    """Share of held-out images of the target that a shift along the normal turns into the other class."""
    swap_shift: float | None = None
    """Median of these shifts, in units of the mean activation norm."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """The answer for one image and two classes."""

    model: str
    model_digest: str
    bank: str
    """``model/layer/name``."""
    bank_digest: str
    target: ClassScore
    """Class i."""
    other: ClassScore
    """Class j."""
    contribution: float
    """Of the plane's component to ``y_i − y_j``, in logits."""
    contribution_for_target: float
    """Sum of what speaks for i at each position; with the next it is the contribution."""
    contribution_for_other: float
    """Likewise for j: ≤ 0."""
    maps: dict[MapKind, ConceptMap]
    """``activation``: signed distance to the plane, positive on i's side; ``contribution``: what each position adds."""
    concepts: tuple[ConceptScore, ...]
    """Contrastive prototypes of i against j; contributions are to ``y_i − y_j``."""
    faithfulness: FaithfulnessReport
    """Of the difference of the two logits."""
    plane: PlaneReport
    flip_shift: float | None
    """Smallest shift found towards j at which j has a probability above 0.5; None: there is none, or nobody asked."""
    shift_curve: tuple[ShiftPoint, ...]
    """At the shifts that were tried, smallest first."""
    stages: StageTimes
    runtime: str
    """E.g. ``torch cpu float32``."""
