"""One picture of a concept of a bank: its exemplars, and beneath them those of its parts."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from whence import _labels
from whence._drawing import write
from whence._errors import InvalidArgument, missing_extra

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError as exc:
    raise missing_extra("pictures", exc.name or "matplotlib") from exc

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

    from whence._inventory import Concept

_PICTURE_INCHES, _TITLE_INCHES, _INDENT_INCHES = 1.1, 0.4, 0.5
_GREY = "#ececec"
"""Behind the concept."""


def save(concept: Concept, parts: Sequence[Concept], path: str | os.PathLike[str], *, dpi: int) -> None:
    """Draw into a file; the whole of it or nothing. Parameters are those of `Concept.save`."""
    write(path, partial(render, concept, parts, dpi=dpi))


def render(concept: Concept, parts: Sequence[Concept], file_type: str, *, dpi: int) -> bytes:
    """The picture as the bytes of a file; ``file_type`` is what matplotlib calls the format."""
    rows = [concept, *parts]
    columns = max(len(row.exemplars) for row in rows)
    if not columns:
        raise InvalidArgument(f"{concept.name} has no exemplars, so there is nothing to draw.", reason="NO_EXEMPLARS")
    width = columns * _PICTURE_INCHES + _INDENT_INCHES
    height = len(rows) * (_PICTURE_INCHES + _TITLE_INCHES)
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    strips = figure.subfigures(len(rows), 1, squeeze=False).flat
    _draw_row(next(strips), concept, [_PICTURE_INCHES] * columns + [_INDENT_INCHES])
    for part, strip in zip(parts, strips, strict=True):
        _draw_row(strip, part, [_INDENT_INCHES] + [_PICTURE_INCHES] * columns)
    file = io.BytesIO()
    figure.savefig(file, format=file_type, dpi=dpi, facecolor="white")
    return file.getvalue()


def _draw_row(figure: SubFigure, concept: Concept, widths: list[float]) -> None:
    """Draw the exemplars of one concept, strongest first; parts are indented by a column."""
    is_part = concept.parent is not None
    figure.set_facecolor("white" if is_part else _GREY)
    figure.suptitle(_title(concept), fontsize=9, x=0.01, ha="left", parse_math=False)
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
    axes = [figure.add_subplot(grid[0, column]) for column in range(len(widths))]
    for each in axes:
        each.set_axis_off()
    if is_part:
        axes.pop(0).text(0.5, 0.5, "└", fontsize=16, ha="center", va="center", color="#8a8a8a")
    for each, exemplar in zip(axes, concept.exemplars, strict=False):
        with Image.open(io.BytesIO(exemplar.picture)) as picture:
            each.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")


def _title(concept: Concept) -> str:
    what = "concept" if concept.parent is None else "part"
    label = f" “{_labels.shown(concept)}”" if concept.label else ""
    owner = f" of {concept.class_name}" if concept.class_name and concept.parent is None else ""
    owner += f" against {concept.other_name}" if concept.other_name else ""
    layer = f" at {concept.layer}" if concept.layer else ""
    return f"{what} {concept.id}{label}{owner}{layer}"
