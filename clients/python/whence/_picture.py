"""One picture of an explanation: the image, its concepts on it, contribution bars, and the report in words."""

from __future__ import annotations

import math
import os
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from whence import _labels
from whence._drawing import (
    BAR_INCHES,
    LINE_INCHES,
    MAGENTA,
    NEGATIVE,
    POSITIVE,
    REST,
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
from whence._explanation import ConceptMap, ConceptScore, Explanation, MapKind
from whence._overlays import place
from whence._words import all_lines, bank_version, explained_logit, owner

try:
    from matplotlib.patches import Rectangle
except ImportError as exc:
    raise missing_extra("pictures", exc.name or "matplotlib") from exc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.gridspec import GridSpec

_IMAGE_INCHES, _OVERLAY_INCHES, _BARS_INCHES = 3.25, 5.75, 4.0
"""Widths of the picture's columns."""
_OVERLAY_COLUMNS = 3
_MOST_PARTS = 4
"""Overlays beneath a concept."""
_TINTS: dict[MapKind, str] = {"activation": MAGENTA, "contribution": POSITIVE, "input": POSITIVE}
"""Colour of positive values: those with a sign take the bars' colours."""


def save(explanation: Explanation, path: str | os.PathLike[str], **options: Any) -> None:
    """Draw into a file; the whole of it or nothing. Options are those of `render`."""
    write(path, lambda file_type: render(explanation, file_type=file_type, **options))


def png(explanation: Explanation, **options: Any) -> bytes:
    """The picture as the bytes of a PNG file. Options are those of `render`."""
    return render(explanation, file_type="png", **options)


def render(explanation: Explanation, *, file_type: str, kind: MapKind | None, max_overlays: int, dpi: int) -> bytes:
    """Draw an explanation.

    Parameters
    ----------
    file_type
        What matplotlib calls the format, e.g. ``"png"``.
    kind
        Which maps to lay over the image; None for the first kind that there is.
    max_overlays
        How many concepts to show on the image.
    dpi
        Pixels per inch.

    Returns
    -------
    The bytes of the file.
    """
    if explanation.image is None:
        raise InvalidArgument("This explanation keeps no image, so there is nothing to draw on.", reason="NO_IMAGE")
    chosen, concepts = _with_maps(explanation, kind)
    concepts = concepts[:max_overlays]
    canvas = canvas_of(explanation.image.pixels(), explanation.view)
    bars, report = _bars(explanation), [_head(explanation), *wrapped(all_lines(explanation))]
    rows = math.ceil(len(concepts) / _OVERLAY_COLUMNS)
    parts = _widest(concepts)
    height_over_width = min(max(canvas.ratio, 0.4), 1.6)
    strip_inches = _OVERLAY_INCHES / _OVERLAY_COLUMNS * height_over_width
    beneath_inches = strip_inches / parts + 0.3 if parts else 0.0
    body_inches = max(
        rows * (strip_inches + 0.35 + beneath_inches) + 0.3,
        BAR_INCHES * len(bars) + 0.8,
        _IMAGE_INCHES * height_over_width + 0.65,
    )
    text_inches = LINE_INCHES * (len(report) + 1)
    widths = [_IMAGE_INCHES, _OVERLAY_INCHES, _BARS_INCHES] if concepts else [_IMAGE_INCHES, _BARS_INCHES]

    figure, body, footer = blank(body_inches, text_inches)
    panels = body.subfigures(1, len(widths), width_ratios=widths, squeeze=False).flat
    draw_image(panels[0].subplots(), canvas, explanation.predictions[:3])
    if chosen is not None and concepts:
        heights = (strip_inches + 0.35, beneath_inches) if parts else (1.0,)
        grid = panels[1].add_gridspec(
            len(heights) * rows, _OVERLAY_COLUMNS * max(parts, 1), height_ratios=heights * rows
        )
        _title_overlays(panels[1], concepts, chosen, explanation)
        _draw_overlays(panels[1], grid, canvas, concepts, chosen, explanation)
    draw_bars(panels[len(widths) - 1].subplots(), bars, _why(explanation))
    draw_lines(footer, report)
    return printed(figure, file_type, dpi)


def _with_maps(explanation: Explanation, kind: MapKind | None) -> tuple[MapKind | None, list[ConceptScore]]:
    """The kind of map to draw, and the concepts that have one; no kind if the explanation has no maps at all."""
    kinds = {name: None for concept in explanation.concepts for name in concept.maps}
    if kind is not None and kind not in kinds:
        has = ", ".join(kinds) or "none"
        raise InvalidArgument(f"The explanation has no {kind} maps (it has {has}): ask for maps=({kind!r},).")
    chosen = kind or next(iter(kinds), None)
    return chosen, [concept for concept in explanation.concepts if chosen in concept.maps]


def _widest(concepts: list[ConceptScore]) -> int:
    """How many parts are drawn beneath the concept that has most; zero where none has any."""
    return min(max((len(concept.parts) for concept in concepts), default=0), _MOST_PARTS)


def _title_overlays(figure: SubFigure, concepts: list[ConceptScore], kind: MapKind, explanation: Explanation) -> None:
    coloured = any(concept.maps[kind].colours is not None for concept in concepts)
    scale = "in the colours that they looked for" if coloured else "each scaled to its own peak"
    if kind != "activation" and not coloured:
        scale += "; blue is negative"
    title = f"{kind} maps of the listed concepts, {scale}"
    if explanation.parts is not None and _widest(concepts):
        title += f";\nbeneath each its parts at {explanation.parts.layer}, with their own contributions there"
    figure.suptitle(title, fontsize=9)


def _draw_overlays(
    figure: SubFigure,
    grid: GridSpec,
    canvas: Canvas,
    concepts: list[ConceptScore],
    kind: MapKind,
    explanation: Explanation,
) -> None:
    """Draw concepts in rows; beneath each, where there are parts, a row of them."""
    parts = _widest(concepts)
    across, down = max(parts, 1), 2 if parts else 1
    for number in range(grid.nrows // down * _OVERLAY_COLUMNS):
        row, column = number // _OVERLAY_COLUMNS * down, number % _OVERLAY_COLUMNS * across
        axes = figure.add_subplot(grid[row, column : column + across])
        if number >= len(concepts):
            axes.set_axis_off()
            continue
        concept = concepts[number]
        title = f"{short(_named(concept, explanation), 26)}\n{signed(concept.contribution)} logits"
        _draw_overlay(axes, canvas, concept.maps[kind], kind, title)
        for index, part in enumerate(concept.parts[:parts]):
            if kind in part.maps:
                beneath = figure.add_subplot(grid[row + 1, column + index])
                title = f"{short(_labels.name(part, 'part'), 14)}\n{signed(part.contribution)}"
                _draw_overlay(beneath, canvas, part.maps[kind], kind, title)
                beneath.title.set_fontsize(6)


def _draw_overlay(axes: Axes, canvas: Canvas, found: ConceptMap, kind: MapKind, title: str) -> None:
    if found.colours is not None:
        show(axes, _painted(canvas, found.colours), title)
        height, width = canvas.pixels.shape[:2]
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=REST, linewidth=0.8))
    elif kind == "input":
        # Maps as fine as the image would be lost in its colours.
        show(axes, faded(canvas, contrast=0.35), title)
        lay_over(axes, canvas, found.values, _TINTS[kind], strongest=1.0)
    else:
        show(axes, canvas, title)
        outline(axes, canvas, lay_over(axes, canvas, found.values, _TINTS[kind]))


def _painted(canvas: Canvas, colours: NDArray[np.uint8]) -> Canvas:
    """The colours ``[h, w, 4]`` over white, at their place in the image."""
    height, width = canvas.pixels.shape[:2]
    opacity = colours[..., 3:] / np.float32(255)
    over_white = 255 + opacity * (colours[..., :3] - np.float32(255))
    placed = [place(channel, canvas.view, height, width) for channel in np.moveaxis(over_white, 2, 0)]
    return replace(canvas, pixels=np.rint(np.nan_to_num(np.stack(placed, axis=2), nan=255)).astype(np.uint8))


def _bars(explanation: Explanation) -> list[tuple[str, float, str]]:
    """Name, logits and colour of each bar; together they are the logit, as far as the report says."""
    bars = [
        (_named(concept, explanation), concept.contribution, POSITIVE if concept.contribution >= 0 else NEGATIVE)
        for concept in explanation.concepts
    ]
    bars.append(("all other concepts", explanation.unlisted, REST))
    if explanation.unexplained is not None:
        bars.append(("unexplained", explanation.unexplained, REST))
    if explanation.faithfulness.constant != 0:
        bars.append(("constant", explanation.faithfulness.constant, REST))
    return bars


def _why(explanation: Explanation) -> str:
    target = explanation.target
    title = [f"why {short(target.name or str(target.index), 45)}:", *textwrap.wrap(explained_logit(explanation), 45)]
    return "\n".join(title)


def _head(explanation: Explanation) -> str:
    substitute = ", on the reconstruction" if explanation.substitute else ""
    return f"{bank_version(explanation)}, {explanation.estimator} estimator{substitute}, {explanation.runtime}"


def _named(concept: ConceptScore, explanation: Explanation) -> str:
    return f"{owner(concept, explanation)}{_labels.numbered(concept)}"
