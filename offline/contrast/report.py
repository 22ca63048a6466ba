"""What an audit found, for people: one page, pictures of the strongest findings, all numbers."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from concepts.errors import AlreadyExists, InvalidInput
from offline.contrast.audit import Audit, Spread
from offline.contrast.insertion import VARIANTS, Effect, Insertion, Variant, probabilities, variants

PAGE, NUMBERS = "report.html", "audit.json"
CAPTIONS: Mapping[Variant | None, str] = {
    None: "before",
    "insertion": "prototype",
    "blank": "blank patch",
    "random": "random patch",
}
"""Of the pictures of an example, in order; None: the image as it is."""

_EXAMPLES = 3
"""Images of a finding that are shown: the first ones, not the best."""

_TILE, _GAP, _TEXT, _HEAD = 128, 10, 34, 56
"""Side of a picture, the space between two, the height of the words below one, and of those on top, in pixels."""


@dataclass(frozen=True)
class Shown:
    """One picture and what the model makes of it."""

    caption: str
    view: NDArray[np.uint8]
    predicted: str
    """Name of the class."""
    share: float
    """Its probability."""
    target_share: float
    """Probability of the class whose prototype is pasted."""
    flipped: bool
    """Whether that is the predicted class."""


@dataclass(frozen=True)
class Example:
    """One image before and after everything that is pasted into it."""

    key: str
    shown: Sequence[Shown]
    """In the order of ``CAPTIONS``."""


@dataclass(frozen=True)
class Row:
    """One finding as the page and its pictures show it."""

    name: str
    """Of the class."""
    title: str
    concept: int
    exemplars: Sequence[bytes]
    """WebP files."""
    flips: Mapping[Variant, float | None]
    gain: Mapping[Variant, float | None]
    excess: float
    images: int
    examples: Sequence[Example]


@dataclass(frozen=True)
class Section:
    """The strongest prototype of a class, and what it does everywhere."""

    spread: Spread
    row: Row
    flipped: Sequence[str]


def check_out(out: Path) -> None:
    """Refuse a place that holds something already.

    Raises
    ------
    AlreadyExists
        If it is a folder that is not empty.
    InvalidInput
        If it is no folder.
    """
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"--out {out} is a file: name a folder")
    if out.exists() and any(out.iterdir()):
        raise AlreadyExists(f"--out {out} is not empty: name another folder, or empty this one")


def write(audit: Audit, out: Path) -> Path:
    """Write the page, pictures of the top findings and all numbers; return the page's path.

    Raises
    ------
    AlreadyExists, InvalidInput
        See ``check_out``.
    """
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    sections = [_section(audit, spread) for spread in audit.spreads]
    rows = [_row(audit, f.insertion, f.effect, f.excess) for f in audit.findings[: audit.settings.top]]
    for number, row in enumerate(rows, 1):
        name = re.sub(r"[^\w-]+", "-", row.title).strip("-")[:100]
        picture(row).save(out / f"{number:02d}-{name}-{row.concept}.png")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"webp": _data_url, "view": lambda view: _data_url(_webp(view)), "percent": _percent}
    html = environment.get_template("report.html").render(
        audit=audit, sections=sections, rows=rows, variants=VARIANTS, captions=CAPTIONS
    )
    (out / NUMBERS).write_text(json.dumps(audit.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = out / PAGE
    page.write_text(html, encoding="utf-8")
    return page


def _section(audit: Audit, spread: Spread) -> Section:
    """Return what the page shows of a class, with one image each of its strongest pair and of some other classes."""
    finding, names = spread.finding, audit.class_names
    rest = [other for other in spread.effects if other != finding.insertion.other]
    others = [finding.insertion.other, *rest[:: max(1, len(rest) // (_EXAMPLES - 1))]][:_EXAMPLES]
    row = Row(
        name=names[spread.target],
        title=f"{names[spread.target]} against all others",
        concept=finding.concept.id,
        exemplars=[audit.pictures[exemplar.file] for exemplar in finding.concept.exemplars],
        flips=spread.flips(),
        gain=spread.gain(),
        excess=finding.excess,
        images=spread.images,
        examples=[
            shown
            for other in others
            for shown in _examples(audit, finding.insertion._replace(other=other), 1, spread.each)
        ],
    )
    return Section(spread, row, [names[other] for other in spread.flipped])


def _row(audit: Audit, insertion: Insertion, effect: Effect, excess: float) -> Row:
    """Return what is shown of one finding."""
    names = audit.class_names
    return Row(
        name=names[insertion.target],
        title=f"{names[insertion.target]} against {names[insertion.other]}",
        concept=insertion.number,
        exemplars=[audit.pictures[exemplar.file] for exemplar in audit.bank.concepts[insertion.number].exemplars],
        flips={variant: effect.flips(variant) for variant in VARIANTS},
        gain={variant: effect.gain(variant) for variant in VARIANTS},
        excess=excess,
        images=len(effect.keys),
        examples=_examples(audit, insertion, _EXAMPLES, audit.settings.images_per_pair),
    )


def _examples(audit: Audit, insertion: Insertion, count: int, images: int) -> list[Example]:
    """Paste again into the first of the images that a prototype was pasted into."""
    pool, seed = audit.pool, audit.settings.seed
    seen, source = pool.seen(insertion.other, images), pool.seen(insertion.target, images)
    found = []
    for row, view in enumerate(seen.views[:count]):
        edited: dict[Variant | None, NDArray[np.uint8]] = {None: view}
        edited.update(variants(insertion, row, view, source.views, seed).items())
        shares = probabilities(pool.model, np.stack(list(edited.values())))
        shown = [
            Shown(
                caption=CAPTIONS[variant],
                view=picture,
                predicted=audit.class_names[int(share.argmax())] if share.any() else "no answer",
                share=float(share.max()),
                target_share=float(share[insertion.target]),
                flipped=bool(share.any()) and int(share.argmax()) == insertion.target,
            )
            for (variant, picture), share in zip(edited.items(), shares, strict=True)
        ]
        found.append(Example(seen.keys[row], shown))
    return found


def picture(row: Row) -> Image.Image:
    """Draw a finding: its exemplars in the first line, then one example a line."""
    lines = 1 + len(row.examples)
    columns = max(len(CAPTIONS), len(row.exemplars))
    size = (_GAP + columns * (_TILE + _GAP), _HEAD + lines * (_TILE + _TEXT + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((_GAP, _GAP), f"{row.title}, concept {row.concept}\n{_in_words(row.flips)}", "black", font)

    def tile(line: int, column: int, image: Image.Image, words: str, colour: str = "black") -> None:
        left, top = _GAP + column * (_TILE + _GAP), _HEAD + line * (_TILE + _TEXT + _GAP)
        canvas.paste(_enlarged(image), (left, top))
        draw.multiline_text((left, top + _TILE + 2), words, colour, ImageFont.load_default(11), spacing=2)

    for column, webp in enumerate(row.exemplars):
        tile(0, column, Image.open(io.BytesIO(webp)).convert("RGB"), f"exemplar {column + 1}")
    for line, example in enumerate(row.examples, 1):
        for column, shown in enumerate(example.shown):
            words = f"{shown.caption}:\n{shown.predicted} {_percent(shown.share)}"
            tile(line, column, Image.fromarray(shown.view), words, "firebrick" if shown.flipped else "black")
    return canvas


def _enlarged(image: Image.Image) -> Image.Image:
    """Return a picture with the side of a tile, pixels of small ones as they are."""
    small = max(image.size) < _TILE
    return image.resize((_TILE, _TILE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _in_words(flips: Mapping[Variant, float | None]) -> str:
    return "flips " + ", ".join(f"{CAPTIONS[v]} {_percent(flips.get(v))}" for v in VARIANTS)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _webp(view: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(view).save(file, "WEBP", lossless=max(view.shape) <= _TILE, quality=85)
    return file.getvalue()


def _data_url(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()
