"""Contrasts in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

from whence import _labels
from whence._words import NUMBERS, bank_version, class_name, numbers

if TYPE_CHECKING:
    from whence._contrast import Contrast, PlaneReport


def title(contrast: Contrast) -> str:
    """Which class rather than which."""
    return f"{class_name(contrast.target)} rather than {class_name(contrast.other)}"


def one_line(contrast: Contrast) -> str:
    """What a contrast says, in a line."""
    return (
        f"Contrast({title(contrast)}: {contrast.difference:+.3g} logits, {_carried(contrast)} by the plane"
        f"{_flip(contrast)}; {counted(contrast)} of {bank_version(contrast)})"
    )


def counted(contrast: Contrast) -> str:
    """How many prototypes there are."""
    count = len(contrast.concepts)
    return f"{count} prototype" if count == 1 else f"{count} prototypes"


def lines(contrast: Contrast) -> list[str]:
    """The answer, and how far it can be trusted, one statement a line."""
    return [
        *_answer(contrast),
        *_trust(contrast),
        *_plane(contrast.plane, contrast),
        *_labels.note(contrast.concepts),
    ]


def table(contrast: Contrast) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the prototypes."""
    words = any(concept.words for concept in contrast.concepts)
    heads = ("prototype", "id", *NUMBERS, *(("words",) if words else ()))
    rows: list[tuple[str, ...]] = [
        (c.name, str(c.id), *numbers(c), *((_labels.gloss(c.label, c.words),) if words else ()))
        for c in contrast.concepts
    ]
    return heads, rows


def _carried(contrast: Contrast) -> str:
    """How much of the difference the plane carries."""
    share = contrast.faithfulness.carried_share
    return f"{share:.0%} of it" if _is_number(share) else f"{contrast.contribution:+.3g}"


def _flip(contrast: Contrast) -> str:
    """Where it flips, as far as that was looked for."""
    if contrast.flip_shift is not None:
        return f"; flips at shift {contrast.flip_shift:.2g}"
    return "; no flip" if contrast.shift_curve else ""


def _answer(contrast: Contrast) -> Iterator[str]:
    i, j = class_name(contrast.target), class_name(contrast.other)
    yield (
        f"The logit of {i} is {contrast.target.logit:.3g}, that of {j} {contrast.other.logit:.3g}: a difference of "
        f"{contrast.difference:+.3g}."
    )
    yield (
        f"The plane between them contributes {contrast.contribution:+.3g} to it: "
        f"{contrast.contribution_for_target:+.3g} where the image speaks for {i}, "
        f"{contrast.contribution_for_other:+.3g} where it speaks for {j}."
    )
    if contrast.flip_shift == 0:
        yield f"As it is, the image already has a probability above 50% of {j}."
    elif contrast.flip_shift is not None:
        by = _norms(contrast.flip_shift)
        yield f"Shifted along the plane's normal by {by}, it would have a probability above 50% of {j}."
    elif contrast.shift_curve:
        by = _norms(contrast.shift_curve[-1].shift)
        yield f"No shift along the plane's normal, up to {by}, gives {j} a probability above 50%."


def _trust(contrast: Contrast) -> Iterator[str]:
    report = contrast.faithfulness
    exact = report.exactness == "exact"
    if exact:
        claim = "Exact: the plane's part, what is left over and the constant are the difference"
    else:
        claim = "First order: contributions say how the difference changes near this image"
    yield f"{claim} ({report.exactness_reason})." if report.exactness_reason else f"{claim}."
    if _is_number(report.carried_share):
        part = "what the layer adds to the difference" if exact else "the difference's first-order part"
        yield f"The plane carries {report.carried_share:.1%} of {part}."
    yield (
        f"Left over of the difference after the plane's part and the constant ({report.constant:+.3g}): "
        f"{report.completeness_residual:+.3g} logits."
    )
    if contrast.concepts and report.code_tolerance is not None:
        yield f"The prototypes' codes are optimal to {report.code_tolerance:.1g}."


def _plane(plane: PlaneReport, contrast: Contrast) -> Iterator[str]:
    """What is known of the plane."""
    i, j = class_name(contrast.target), class_name(contrast.other)
    yield f"The plane was fitted to {plane.target_images} training images of {i} and {plane.other_images} of {j}."
    if plane.accuracy is not None:
        margin = "" if plane.margin is None else f", on average {_norms(plane.margin)} from the plane"
        yield f"Of held-out positions that speak for either class, {plane.accuracy:.1%} are on its side{margin}."
    if plane.swap_rate is not None:
        median = "" if plane.swap_shift is None else f", half of those by {_norms(plane.swap_shift)} or less"
        yield f"A shift along its normal turns {plane.swap_rate:.1%} of held-out images of {i} into {j}{median}."


def _norms(length: float) -> str:
    return f"{length:.2g} × the layer's mean activation norm"


def _is_number(share: float | None) -> TypeGuard[float]:
    """Whether there is a share: it is a quotient, and there is none where nothing is to be carried."""
    return share is not None and math.isfinite(share)
