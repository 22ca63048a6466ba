"""What pictures of answers are made of: the image, tints and outlines on it, bars, and text.

Everything is drawn on a figure of its own, without pyplot, so that nothing global changes and threads may draw at once.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from whence._errors import InvalidArgument, missing_extra
from whence._explanation import Box, ClassScore
from whence._overlays import place

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

WIDTH_INCHES = 13.0
"""Of a picture."""
BAR_INCHES, LINE_INCHES = 0.27, 0.19
"""Heights of a bar and of a line of text."""
POSITIVE, NEGATIVE, REST = "#c8442d", "#2f6fb5", "#8a8a8a"
"""Colours of what speaks for, against, and neither; all eyes tell this red from this blue."""
MAGENTA = "#ff2bd6"
"""Colour of values without a sign; rare in photos."""
_TEXT_CHARACTERS = 150
"""In a line of text."""
_SHORTEST_SIDE, _LONGEST_SIDE = 240, 900
"""Pixels that an image is drawn with, at least and at most."""


@dataclass(frozen=True, slots=True)
class Canvas:
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


def write(path: str | os.PathLike[str], draw: Callable[[str], bytes]) -> None:
    """Write what is drawn for the format that the suffix names; the whole of it or nothing."""
    target = Path(path)
    kind = target.suffix.lstrip(".").lower() or "png"
    if kind not in FigureCanvasAgg.get_supported_filetypes():
        choices = ", ".join(sorted(FigureCanvasAgg.get_supported_filetypes()))
        raise InvalidArgument(f"Pictures cannot be written as .{kind}: use one of {choices}.")
    target.write_bytes(draw(kind))


def canvas_of(pixels: NDArray[np.uint8], view: Box) -> Canvas:
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
    return Canvas(pixels, Box(view.left * x, view.top * y, view.right * x, view.bottom * y))


def show(axes: Axes, canvas: Canvas, title: str) -> None:
    """Draw the image alone."""
    height, width = canvas.pixels.shape[:2]
    # Pixel edges at whole numbers, as in Box; imshow's default puts centres there.
    axes.imshow(canvas.pixels, extent=(0, width, height, 0), interpolation="antialiased", aspect="equal")
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_axis_off()


def faded(canvas: Canvas, contrast: float) -> Canvas:
    """The image in light greys, with so much of its contrast left."""
    greys = 255 - (255 - canvas.pixels.mean(axis=2, keepdims=True)) * contrast
    return replace(canvas, pixels=np.rint(greys).astype(np.uint8).repeat(3, axis=2))


def draw_image(axes: Axes, canvas: Canvas, scores: Sequence[ClassScore]) -> None:
    """Draw the image under some classes and their probabilities, and mark the part that the model saw."""
    lines = [f"{score.name or score.index}  {score.probability:.1%}" for score in scores]
    show(axes, canvas, "\n".join(short(line, 40) for line in lines))
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


def lay_over(
    axes: Axes, canvas: Canvas, values: NDArray[np.float32], positive: str = POSITIVE, strongest: float = 0.75
) -> NDArray[np.float32]:
    """Tint the image as strongly as a map is; return how strong that is, relative to its peak.

    ``positive`` is the colour of values above zero, ``strongest`` the opacity of the peak.
    """
    height, width = canvas.pixels.shape[:2]
    placed = np.nan_to_num(place(values, canvas.view, height, width))
    peak = float(np.abs(placed).max())
    if peak == 0:
        return placed
    strength = placed / peak
    tint = np.empty((height, width, 4), np.float32)
    tint[..., :3] = np.where(strength[..., None] < 0, to_rgb(NEGATIVE), to_rgb(positive))
    tint[..., 3] = strongest * np.abs(strength)
    axes.imshow(tint, extent=(0, width, height, 0), interpolation="antialiased", aspect="equal")
    return strength


def outline(axes: Axes, canvas: Canvas, strength: NDArray[np.float32]) -> None:
    """Outline half of a map's peak."""
    height, width = canvas.pixels.shape[:2]
    levels = [level for level in (-0.5, 0.5) if strength.min() < level < strength.max()]
    if levels:
        centres = np.arange(width) + 0.5, np.arange(height) + 0.5
        for colour, line in (("black", 1.8), ("white", 0.9)):  # to be seen on any image
            axes.contour(*centres, strength, levels=levels, colors=colour, linewidths=line, linestyles="solid")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def draw_bars(axes: Axes, bars: Sequence[tuple[str, float, str]], title: str) -> None:
    """Draw contributions, each with its name and colour."""
    places = np.arange(len(bars))
    values = [value for _, value, _ in bars]
    drawn = axes.barh(places, values, color=[colour for _, _, colour in bars], height=0.7)
    axes.bar_label(drawn, labels=[signed(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, [short(name, 28) for name, _, _ in bars], fontsize=8, parse_math=False)
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
    axes.set_title(title, fontsize=9, parse_math=False)


def draw_lines(figure: SubFigure, lines: Sequence[str]) -> None:
    """Write statements, one below the other."""
    figure.text(0.01, 0.98, "\n".join(lines), fontsize=9, va="top", linespacing=1.35, parse_math=False)


def wrapped(lines: Sequence[str]) -> list[str]:
    """Statements, broken where they are wider than a picture."""
    return [line for text in lines for line in textwrap.wrap(text, _TEXT_CHARACTERS)]


def blank(body_inches: float, text_inches: float) -> tuple[Figure, SubFigure, SubFigure]:
    """An empty picture, its body, and beneath that a place for text."""
    figure = Figure(figsize=(WIDTH_INCHES, body_inches + text_inches), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    body, footer = figure.subfigures(2, 1, height_ratios=(body_inches, text_inches), squeeze=False).flat
    return figure, body, footer


def printed(figure: Figure, file_type: str, dpi: int) -> bytes:
    """A picture as a file; ``file_type`` is what matplotlib calls the format, ``dpi`` pixels per inch."""
    file = io.BytesIO()
    figure.savefig(file, format=file_type, dpi=dpi, facecolor="white")
    return file.getvalue()


def signed(logits: float) -> str:
    """A number with its sign."""
    return f"{logits:+.3g}".replace("-", "−")  # as on the axis


def short(text: str, characters: int) -> str:
    """A text on one line, cut in the middle so that an id at its end stays."""
    text = " ".join(text.split())
    if len(text) <= characters:
        return text
    tail = characters // 3
    return f"{text[: characters - tail - 1]}…{text[-tail:]}"
