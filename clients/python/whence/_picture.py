"""One picture of an explanation: the image, its concepts on it, contribution bars, and the report in words.

Everything is drawn on a figure of its own, without pyplot, so that nothing global changes and threads may draw at once.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from whence._errors import InvalidArgument, missing_extra
from whence._explanation import Box, ConceptMap, ConceptScore, Explanation, MapKind
from whence._overlays import place
from whence._words import all_lines, bank_version, explained_logit, owner

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image
except ImportError as exc:
    raise missing_extra("pictures", exc.name or "matplotlib") from exc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.gridspec import GridSpec

_IMAGE_INCHES, _OVERLAY_INCHES, _BARS_INCHES = 3.25, 5.75, 4.0
"""Widths of the picture's columns."""
_WIDTH_INCHES = _IMAGE_INCHES + _OVERLAY_INCHES + _BARS_INCHES
_OVERLAY_COLUMNS = 3
_MOST_PARTS = 4
"""Overlays beneath a concept."""
_BAR_INCHES, _LINE_INCHES = 0.27, 0.19
"""Heights of a bar and of a line of text."""
_TEXT_WIDTH = 150
_POSITIVE, _NEGATIVE, _REST = "#c8442d", "#2f6fb5", "#8a8a8a"
_SHORTEST_SIDE, _LONGEST_SIDE = 240, 900
"""Pixels that an image is drawn with, at least and at most."""
_STRONGEST_ALPHA: dict[MapKind, float] = {"activation": 0.75, "contribution": 0.75, "input": 1.0}
_FADED = 0.35
"""Contrast that is left of the image below input maps."""
_TINTS: dict[MapKind, str] = {"activation": "#ff2bd6", "contribution": _POSITIVE, "input": _POSITIVE}
"""Colour of positive values: those with a sign take the bars' colours; magenta is rare in photos."""


@dataclass(frozen=True, slots=True)
class _Canvas:
    """The image at the size it is drawn with."""

    pixels: NDArray[np.uint8]
    view: Box
    """The model's view, in pixels of this canvas."""

    @property
    def ratio(self) -> float:
        """Height over width."""
        height, width = self.pixels.shape[:2]
        return float(height / width)

    def sees_all(self) -> bool:
        """Whether the model saw the entire image, to half a pixel."""
        height, width = self.pixels.shape[:2]
        view = self.view
        return view.left <= 0.5 and view.top <= 0.5 and view.right >= width - 0.5 and view.bottom >= height - 0.5


def save(explanation: Explanation, path: str | os.PathLike[str], **options: Any) -> None:
    """Draw into a file; the whole of it or nothing. Options are those of `render`."""
    write(path, lambda file_type: render(explanation, file_type=file_type, **options))


def write(path: str | os.PathLike[str], draw: Callable[[str], bytes]) -> None:
    """Write what is drawn for the format that the suffix names; the whole of it or nothing."""
    target = Path(path)
    kind = target.suffix.lstrip(".").lower() or "png"
    if kind not in FigureCanvasAgg.get_supported_filetypes():
        choices = ", ".join(sorted(FigureCanvasAgg.get_supported_filetypes()))
        raise InvalidArgument(f"Pictures cannot be written as .{kind}: use one of {choices}.")
    target.write_bytes(draw(kind))


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
    canvas = _canvas(explanation.image.pixels(), explanation.view)
    report = [line for text in all_lines(explanation) for line in textwrap.wrap(text, _TEXT_WIDTH)]

    bars = _bars(explanation)
    rows = math.ceil(len(concepts) / _OVERLAY_COLUMNS)
    parts = _widest(concepts)
    height_over_width = min(max(canvas.ratio, 0.4), 1.6)
    strip_inches = _OVERLAY_INCHES / _OVERLAY_COLUMNS * height_over_width
    beneath_inches = strip_inches / parts + 0.3 if parts else 0.0
    body_inches = max(
        rows * (strip_inches + 0.35 + beneath_inches) + 0.3,
        _BAR_INCHES * len(bars) + 0.8,
        _IMAGE_INCHES * height_over_width + 0.65,
    )
    text_inches = _LINE_INCHES * (len(report) + 2)
    widths = [_IMAGE_INCHES, _OVERLAY_INCHES, _BARS_INCHES] if concepts else [_IMAGE_INCHES, _BARS_INCHES]

    figure = Figure(figsize=(_WIDTH_INCHES, body_inches + text_inches), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    body, footer = figure.subfigures(2, 1, height_ratios=(body_inches, text_inches), squeeze=False).flat
    panels = body.subfigures(1, len(widths), width_ratios=widths, squeeze=False).flat
    _draw_image(panels[0].subplots(), canvas, explanation)
    if chosen is not None and concepts:
        heights = (strip_inches + 0.35, beneath_inches) if parts else (1.0,)
        grid = panels[1].add_gridspec(
            len(heights) * rows, _OVERLAY_COLUMNS * max(parts, 1), height_ratios=heights * rows
        )
        _title_overlays(panels[1], concepts, chosen, explanation)
        _draw_overlays(panels[1], grid, canvas, concepts, chosen, explanation)
    _draw_bars(panels[len(widths) - 1].subplots(), bars, explanation)
    _draw_report(footer, report, explanation)
    file = io.BytesIO()
    figure.savefig(file, format=file_type, dpi=dpi, facecolor="white")
    return file.getvalue()


def _with_maps(explanation: Explanation, kind: MapKind | None) -> tuple[MapKind | None, list[ConceptScore]]:
    """The kind of map to draw, and the concepts that have one; no kind if the explanation has no maps at all."""
    kinds = {name: None for concept in explanation.concepts for name in concept.maps}
    if kind is not None and kind not in kinds:
        has = ", ".join(kinds) or "none"
        raise InvalidArgument(f"The explanation has no {kind} maps (it has {has}): ask for maps=({kind!r},).")
    chosen = kind or next(iter(kinds), None)
    return chosen, [concept for concept in explanation.concepts if chosen in concept.maps]


def _canvas(pixels: NDArray[np.uint8], view: Box) -> _Canvas:
    """The image, enlarged in whole steps where overlays would be coarse, reduced where nobody could see it."""
    height, width = pixels.shape[:2]
    steps = math.ceil(_SHORTEST_SIDE / min(height, width))
    if steps > 1:
        pixels = pixels.repeat(steps, axis=0).repeat(steps, axis=1)
    if max(pixels.shape[:2]) > _LONGEST_SIDE:
        factor = _LONGEST_SIDE / max(pixels.shape[:2])
        size = (max(round(pixels.shape[1] * factor), 1), max(round(pixels.shape[0] * factor), 1))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    return _Canvas(pixels, Box(view.left * x, view.top * y, view.right * x, view.bottom * y))


def _show(axes: Axes, canvas: _Canvas, title: str) -> None:
    height, width = canvas.pixels.shape[:2]
    # Pixel edges at whole numbers, as in Box; imshow's default puts centres there.
    axes.imshow(canvas.pixels, extent=(0, width, height, 0), interpolation="antialiased", aspect="equal")
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_axis_off()


def _draw_image(axes: Axes, canvas: _Canvas, explanation: Explanation) -> None:
    lines = [f"{score.name or score.index}  {score.probability:.1%}" for score in explanation.predictions[:3]]
    _show(axes, canvas, "\n".join(_short(line, 40) for line in lines))
    if not canvas.sees_all():
        view = canvas.view
        corner, size = (view.left, view.top), (view.right - view.left, view.bottom - view.top)
        for colour, style in (("black", "-"), ("white", "--")):
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.2, linestyle=style))
        axes.text(
            view.left,
            view.bottom,
            " what the model saw",
            fontsize=7,
            color="white",
            va="bottom",
            bbox={"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1},
        )


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
    canvas: _Canvas,
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
        title = f"{_short(_named(concept, explanation), 26)}\n{_signed(concept.contribution)} logits"
        _draw_overlay(axes, canvas, concept.maps[kind], kind, title)
        for index, part in enumerate(concept.parts[:parts]):
            if kind in part.maps:
                beneath = figure.add_subplot(grid[row + 1, column + index])
                title = f"{_short(part.label, 14) or f'part {part.id}'}\n{_signed(part.contribution)}"
                _draw_overlay(beneath, canvas, part.maps[kind], kind, title)
                beneath.title.set_fontsize(6)


def _draw_overlay(axes: Axes, canvas: _Canvas, found: ConceptMap, kind: MapKind, title: str) -> None:
    if found.colours is not None:
        _show(axes, _painted(canvas, found.colours), title)
        height, width = canvas.pixels.shape[:2]
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=_REST, linewidth=0.8))
    elif kind == "input":
        _show(axes, _faded(canvas), title)
        _lay_over(axes, canvas, found.values, kind)
    else:
        _show(axes, canvas, title)
        _outline(axes, canvas, _lay_over(axes, canvas, found.values, kind))


def _painted(canvas: _Canvas, colours: NDArray[np.uint8]) -> _Canvas:
    """The colours ``[h, w, 4]`` over white, at their place in the image."""
    height, width = canvas.pixels.shape[:2]
    opacity = colours[..., 3:] / np.float32(255)
    over_white = 255 + opacity * (colours[..., :3] - np.float32(255))
    placed = [place(channel, canvas.view, height, width) for channel in np.moveaxis(over_white, 2, 0)]
    return replace(canvas, pixels=np.rint(np.nan_to_num(np.stack(placed, axis=2), nan=255)).astype(np.uint8))


def _faded(canvas: _Canvas) -> _Canvas:
    """The image in light greys: maps as fine as it is would be lost in its colours."""
    greys = 255 - (255 - canvas.pixels.mean(axis=2, keepdims=True)) * _FADED
    return replace(canvas, pixels=np.rint(greys).astype(np.uint8).repeat(3, axis=2))


def _lay_over(axes: Axes, canvas: _Canvas, values: NDArray[np.float32], kind: MapKind) -> NDArray[np.float32]:
    """Tint the image as strongly as the map is; return how strong that is, relative to its peak."""
    height, width = canvas.pixels.shape[:2]
    placed = np.nan_to_num(place(values, canvas.view, height, width))
    peak = float(np.abs(placed).max())
    if peak == 0:
        return placed
    strength = placed / peak
    tint = np.empty((height, width, 4), np.float32)
    tint[..., :3] = np.where(strength[..., None] < 0, to_rgb(_NEGATIVE), to_rgb(_TINTS[kind]))
    tint[..., 3] = _STRONGEST_ALPHA[kind] * np.abs(strength)
    axes.imshow(tint, extent=(0, width, height, 0), interpolation="antialiased", aspect="equal")
    return strength


def _outline(axes: Axes, canvas: _Canvas, strength: NDArray[np.float32]) -> None:
    """Outline half of a map's peak."""
    height, width = canvas.pixels.shape[:2]
    levels = [level for level in (-0.5, 0.5) if strength.min() < level < strength.max()]
    if levels:
        centres = np.arange(width) + 0.5, np.arange(height) + 0.5
        for colour, line in (("black", 1.8), ("white", 0.9)):  # to be seen on any image
            axes.contour(*centres, strength, levels=levels, colors=colour, linewidths=line, linestyles="solid")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _bars(explanation: Explanation) -> list[tuple[str, float, str]]:
    """Name, logits and colour of each bar; together they are the logit, as far as the report says."""
    bars = [
        (_named(concept, explanation), concept.contribution, _POSITIVE if concept.contribution >= 0 else _NEGATIVE)
        for concept in explanation.concepts
    ]
    bars.append(("all other concepts", explanation.unlisted, _REST))
    if explanation.unexplained is not None:
        bars.append(("unexplained", explanation.unexplained, _REST))
    if explanation.faithfulness.constant != 0:
        bars.append(("constant", explanation.faithfulness.constant, _REST))
    return bars


def _draw_bars(axes: Axes, bars: list[tuple[str, float, str]], explanation: Explanation) -> None:
    places = np.arange(len(bars))
    values = [value for _, value, _ in bars]
    drawn = axes.barh(places, values, color=[colour for _, _, colour in bars], height=0.7)
    axes.bar_label(drawn, labels=[_signed(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, [_short(name, 28) for name, _, _ in bars], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    low, high = min(0.0, *values), max(0.0, *values)
    span = (high - low) or 1.0
    # Room for the figures at the ends of the bars.
    axes.set_xlim(low - (0.4 if low < 0 else 0.05) * span, high + (0.4 if high > 0 else 0.05) * span)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("contribution, in logits", fontsize=8)
    target = explanation.target
    title = [f"why {_short(target.name or str(target.index), 45)}:", *textwrap.wrap(explained_logit(explanation), 45)]
    axes.set_title("\n".join(title), fontsize=9, parse_math=False)


def _draw_report(figure: SubFigure, lines: list[str], explanation: Explanation) -> None:
    substitute = ", on the reconstruction" if explanation.substitute else ""
    head = f"{bank_version(explanation)}, {explanation.estimator} estimator{substitute}, {explanation.runtime}"
    figure.text(0.01, 0.98, "\n".join([head, *lines]), fontsize=9, va="top", linespacing=1.35, parse_math=False)


def _named(concept: ConceptScore, explanation: Explanation) -> str:
    name = f"{concept.label} (#{concept.id})" if concept.label else f"concept {concept.id}"
    return f"{owner(concept, explanation)}{name}"


def _signed(logits: float) -> str:
    return f"{logits:+.3g}".replace("-", "−")  # as on the axis


def _short(text: str, characters: int) -> str:
    """A text on one line, cut in the middle so that an id at its end stays."""
    text = " ".join(text.split())
    if len(text) <= characters:
        return text
    tail = characters // 3
    return f"{text[: characters - tail - 1]}…{text[-tail:]}"
