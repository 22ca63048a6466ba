"""What comes back for one image and two classes: why one and not the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from whence._errors import MissingExtra
from whence._explanation import Box, ClassScore, ConceptMap, ConceptScore, FaithfulnessReport, MapKind, Timings

if TYPE_CHECKING:
    from whence._images import Source


@dataclass(frozen=True, slots=True)
class ShiftPoint:
    """Both classes' probabilities where all positions are shifted along the plane's normal towards the other class."""

    shift: float
    """In units of the layer's mean activation norm."""
    target_probability: float
    other_probability: float


@dataclass(frozen=True, slots=True)
class PlaneReport:
    """What the plane between the two classes was found to do on held-out images; None: not measured."""

    target_images: int
    """Training images of the target's class that the plane was fitted to."""
    other_images: int
    """Likewise of the other class."""
    accuracy: float | None = None
    """Share of the held-out positions that speak for either class on its side; the mean of both classes."""
    margin: float | None = None
    """Their mean distance on their own side, in units of the layer's mean activation norm; the mean of both classes."""
    swap_rate: float | None = None
    """Share of held-out images predicted as the target that a shift along the normal turns into the other class."""
    swap_shift: float | None = None
    """Median of the shifts at which they turn, in units of the layer's mean activation norm."""


@dataclass(frozen=True, slots=True, repr=False)
class Contrast:
    """Why one class and not another, for one image, by the plane between the two at the bank's layer.

    Turning the classes round negates the distances to the plane, and the contributions.
    """

    request_id: str
    model: str
    model_digest: str
    """sha256 of the weights, hexadecimal."""
    bank: str
    """``model/layer/name``."""
    bank_digest: str
    """sha256 of the bank's ``bank.json``, hexadecimal."""
    target: ClassScore
    """Class i."""
    other: ClassScore
    """Class j."""
    contribution: float
    """Of the plane's component to logit i less logit j."""
    contribution_for_target: float
    """Sum of the positive parts of the contribution map: the evidence for i, in logits."""
    contribution_for_other: float
    """Sum of its negative parts: the evidence for j, in logits, at most zero. With the one for i it is the
    contribution."""
    maps: Mapping[MapKind, ConceptMap]
    """As asked for. ``activation``: signed distance to the plane at every position, positive on i's side.
    ``contribution``: what every position adds to the contribution; positive speaks for i, negative for j."""
    concepts: tuple[ConceptScore, ...]
    """Contrastive prototypes of i against j: what the positions on i's side are made of. Their contributions are to
    logit i less logit j. Empty where the bank has none for these two."""
    faithfulness: FaithfulnessReport
    """Of the difference of the two logits in place of one; ``carried_share`` says how much of it the plane's component
    carries."""
    plane: PlaneReport
    """How good the plane is."""
    flip_shift: float | None
    """Smallest shift found towards j at which j has a probability above 0.5, in units of the layer's mean activation
    norm. None where no shift up to the curve's end does that, and where it was not asked for."""
    shift_curve: tuple[ShiftPoint, ...]
    """At the shifts that were tried, smallest first; empty where it was not asked for."""
    timings: Timings
    view: Box
    """The part of the caller's image that the model saw; maps span it."""
    runtime: str
    """What computed this, e.g. ``torch cpu float32``."""
    image: Source | None = field(default=None, compare=False)
    """The image as it was sent, for pictures."""

    @property
    def difference(self) -> float:
        """Logit i less logit j."""
        return self.target.logit - self.other.logit

    def describe(self) -> str:
        """The answer, and how far it can be trusted, in words, one statement a line."""
        from whence._contrast_words import lines

        return "\n".join(lines(self))

    def save(self, path: str | os.PathLike[str], *, max_overlays: int = 6, dpi: int = 150) -> None:
        """Draw one picture of it, with what is said of it in words.

        It shows the image, the distances to the plane and the contributions of the positions in a colour for each
        class, the probabilities along the shift, and the prototypes on the image with their contributions.

        Parameters
        ----------
        path
            Where to write; the suffix chooses the format (``.png``, ``.jpg``, ``.pdf``, ``.svg``, …).
        max_overlays
            How many prototypes to show on the image.
        dpi
            Pixels per inch; the picture is about 13 inches wide.

        Raises
        ------
        MissingExtra
            If matplotlib or Pillow is not installed.
        InvalidArgument
            If the suffix is no picture format, or the contrast keeps no image.
        OSError
            If the file cannot be written.
        """
        from whence._contrast_picture import save

        save(self, path, max_overlays=max_overlays, dpi=dpi)

    def __repr__(self) -> str:
        from whence._contrast_words import one_line

        return one_line(self)

    def _repr_png_(self) -> bytes | None:
        """The picture, for notebooks; None without the extra or without an image."""
        if self.image is None:
            return None
        try:
            from whence._contrast_picture import render
        except MissingExtra:
            return None
        return render(self, file_type="png", max_overlays=6, dpi=80)

    def _repr_html_(self) -> str:
        """The picture and a table, for notebooks."""
        from whence._html import render_contrast

        return render_contrast(self, self._repr_png_())
