"""Explanations and contrasts as pieces of HTML, for notebooks."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from whence import _contrast_words
from whence._words import all_lines, bank_version, explained_logit, table

if TYPE_CHECKING:
    from whence._contrast import Contrast
    from whence._explanation import Explanation


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Heads and rows."""


def render(explanation: Explanation, picture: bytes | None) -> str:
    """The picture (PNG bytes, if any), the concepts as a table, and the report."""
    target = explanation.target
    head = (
        f"<b>{escape(target.name or str(target.index))}</b> (p = {target.probability:.3f}, "
        f"{escape(explained_logit(explanation))}), {escape(bank_version(explanation))}"
    )
    return _piece(
        head,
        picture,
        f"{len(explanation.concepts)} concepts",
        table(explanation),
        all_lines(explanation),
        "explanation",
    )


def render_contrast(contrast: Contrast, picture: bytes | None) -> str:
    """The picture (PNG bytes, if any), the prototypes as a table, and what is said in words."""
    head = f"<b>{escape(_contrast_words.title(contrast))}</b>, {escape(bank_version(contrast))}"
    cells, lines = _contrast_words.table(contrast), _contrast_words.lines(contrast)
    return _piece(head, picture, _contrast_words.counted(contrast), cells, lines, "contrast")


def _piece(head: str, picture: bytes | None, summary: str, cells: Table, lines: Sequence[str], what: str) -> str:
    """Head (HTML), picture, table and statements, one below the other."""
    heads, rows = cells
    body = "".join(_row("td", row) for row in rows)
    image = f'<img alt="{what}" src="data:image/png;base64,{b64encode(picture).decode()}">' if picture else ""
    report = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f"<div><p>{head}</p>{image}<details{'' if picture else ' open'}><summary>{summary}</summary>"
        f"<table><thead>{_row('th', heads)}</thead><tbody>{body}</tbody></table></details><ul>{report}</ul></div>"
    )


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
