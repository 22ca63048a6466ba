"""One picture of a contrast: the image, where either class has its evidence, the shift, prototypes, and words.

What belongs to the target is red and what belongs to the other class is blue, in every panel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from whence import _labels
from whence._contrast import Contrast
from whence._contrast_words import lines
from whence._drawing import (
    BAR_INCHES,
    LINE_INCHES,
    MAGENTA,
    NEGATIVE,
    POSITIVE,
    REST,
    WIDTH_INCHES,
    Canvas,
    blank,
    canvas_of,
    draw_bars,
    draw_image,
    draw_lines,
    faded,
    lay_over,
    outline,
    printed,
    short,
    show,
    signed,
    wrapped,
    write,
)
from whence._errors import InvalidArgument, missing_extra
from whence._explanation import ConceptMap, ConceptScore
from whence._words import bank_version, class_name

try:
    from matplotlib.patches import Patch
except ImportError as exc:
    raise missing_extra("pictures", exc.name or "matplotlib") from exc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_PANELS = 4
"""In the upper row: the image, distances, contributions, and the shift."""
_CURVE_INCHES = 2.0
"""Height of the probabilities along the shift, at least."""
_OVERLAYS_INCHES = 9.0
"""Width of the prototypes on the image; their bars take the rest."""
_OVERLAY_COLUMNS = 6
_NAME_CHARACTERS = 40


def save(contrast: Contrast, path: str | os.PathLike[str], *, max_overlays: int, dpi: int) -> None:
    """Draw into a file; the whole of it or nothing. Options are those of `render`."""
    write(path, lambda file_type: render(contrast, file_type=file_type, max_overlays=max_overlays, dpi=dpi))


def render(contrast: Contrast, *, file_type: str, max_overlays: int, dpi: int) -> bytes:
    """Draw a contrast.

    Parameters
    ----------
    file_type
        What matplotlib calls the format, e.g. ``"png"``.
    max_overlays
        How many prototypes to show on the image.
    dpi
        Pixels per inch.

    Returns
    -------
    The bytes of the file.
    """
    if contrast.image is None:
        raise InvalidArgument("This contrast keeps no image, so there is nothing to draw on.", reason="NO_IMAGE")
    canvas = canvas_of(contrast.image.pixels(), contrast.view)
    ratio = min(max(canvas.ratio, 0.4), 1.6)
    shown = [concept for concept in contrast.concepts if concept.maps][:max_overlays]
    upper_inches = max(WIDTH_INCHES / _PANELS * ratio, _CURVE_INCHES) + 0.9
    lower_inches = _lower_inches(contrast, shown, ratio)
    words = [f"{bank_version(contrast)}, {contrast.runtime}", *wrapped(lines(contrast))]

    figure, body, footer = blank(upper_inches + lower_inches, LINE_INCHES * (len(words) + 1))
    if lower_inches:
        heights = (upper_inches, lower_inches)
        upper, lower = body.subfigures(2, 1, height_ratios=heights, squeeze=False).flat
        _draw_prototypes(lower, canvas, contrast, shown)
    else:
        upper = body
    _draw_upper(upper, canvas, contrast)
    draw_lines(footer, words)
    return printed(figure, file_type, dpi)


def _lower_inches(contrast: Contrast, shown: Sequence[ConceptScore], ratio: float) -> float:
    """Height of the prototypes; none where there are none."""
    rows = math.ceil(len(shown) / _OVERLAY_COLUMNS)
    overlays = rows * (_OVERLAYS_INCHES / _OVERLAY_COLUMNS * ratio + 0.45) + 0.3
    return max(overlays, BAR_INCHES * len(contrast.concepts) + 0.8) if contrast.concepts else 0.0


def _draw_upper(figure: SubFigure, canvas: Canvas, contrast: Contrast) -> None:
    """Draw the image and, where they were asked for, both maps and the shift, side by side."""
    axes = figure.subplots(1, _PANELS)
    # Two colours on those of an image would be hard to tell from it.
    grey = faded(canvas, contrast=0.5)
    for each in axes:
        each.set_axis_off()
    places = iter(axes)
    draw_image(next(places), canvas, (contrast.target, contrast.other))
    if "activation" in contrast.maps:
        distances = contrast.maps["activation"]
        extent = f"from {signed(distances.values.min())} to {signed(distances.values.max())}"
        _draw_map(next(places), grey, distances, f"signed distance to the plane,\n{extent}")
    if "contribution" in contrast.maps:
        sums = f"{signed(contrast.contribution_for_target)} and {signed(contrast.contribution_for_other)} logits"
        _draw_map(next(places), grey, contrast.maps["contribution"], f"evidence for either,\n{sums}")
    if contrast.shift_curve:
        _draw_shift(next(places), contrast)
    _draw_key(figure, contrast)


def _draw_map(axes: Axes, canvas: Canvas, found: ConceptMap, title: str, positive: str = POSITIVE) -> None:
    show(axes, canvas, title)
    outline(axes, canvas, lay_over(axes, canvas, found.values, positive))


def _draw_shift(axes: Axes, contrast: Contrast) -> None:
    """Draw both probabilities along the shift, as far as twice the flip; all of it where nothing flips."""
    curve, flip = contrast.shift_curve, contrast.flip_shift
    shifts = [point.shift for point in curve]
    axes.set_axis_on()
    axes.plot(shifts, [point.target_probability for point in curve], color=POSITIVE, linewidth=1.8)
    axes.plot(shifts, [point.other_probability for point in curve], color=NEGATIVE, linewidth=1.8)
    axes.axhline(0.5, color=REST, linewidth=0.8, linestyle=":")
    if flip is not None:
        axes.axvline(flip, color="black", linewidth=1.0, linestyle="--")
    axes.set_xlim(0, min(2 * flip, shifts[-1]) if flip else shifts[-1] or 1.0)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(
        "probability along the shift,\n" + ("no flip" if flip is None else f"flips at {flip:.2g}"), fontsize=9
    )
    axes.set_xlabel("shift, in mean activation norms", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(0.9)


def _draw_key(figure: SubFigure, contrast: Contrast) -> None:
    """Say which colour is which class."""
    scores = ((contrast.target, POSITIVE), (contrast.other, NEGATIVE))
    patches = [Patch(color=colour, label=short(class_name(score), _NAME_CHARACTERS)) for score, colour in scores]
    key = figure.legend(handles=patches, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    for text in key.get_texts():
        text.set_parse_math(False)


def _draw_prototypes(figure: SubFigure, canvas: Canvas, contrast: Contrast, shown: Sequence[ConceptScore]) -> None:
    """Draw prototypes on the image, and beside them what all of them contribute."""
    widths = (_OVERLAYS_INCHES, WIDTH_INCHES - _OVERLAYS_INCHES)
    left, right = figure.subfigures(1, 2, width_ratios=widths if shown else widths[::-1], squeeze=False).flat
    bars = [
        (_labels.numbered(c), c.contribution, POSITIVE if c.contribution >= 0 else NEGATIVE) for c in contrast.concepts
    ]
    draw_bars((right if shown else left).subplots(), bars, "what the prototypes contribute")
    if shown:
        _draw_overlays(left, canvas, contrast, shown)


def _draw_overlays(figure: SubFigure, canvas: Canvas, contrast: Contrast, shown: Sequence[ConceptScore]) -> None:
    """Draw each prototype on an image of its own, in rows."""
    name = short(class_name(contrast.target), _NAME_CHARACTERS)
    title = f"contrastive prototypes of {name}, each scaled to its own peak"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, parse_math=False)
    rows = math.ceil(len(shown) / _OVERLAY_COLUMNS)
    places = figure.subplots(rows, _OVERLAY_COLUMNS, squeeze=False).ravel()
    for axes in places:
        axes.set_axis_off()
    for axes, concept in zip(places, shown, strict=False):
        kind = next(iter(concept.maps))
        title = f"{short(concept.name, 17)}\n{signed(concept.contribution)} logits"
        _draw_map(axes, canvas, concept.maps[kind], title, MAGENTA if kind == "activation" else POSITIVE)
