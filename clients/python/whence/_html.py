"""Explanations, contrasts and found concepts as pieces of HTML, for notebooks."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from whence import _contrast_words, _search_words
from whence._words import all_lines, bank_version, explained_logit, table

if TYPE_CHECKING:
    from whence._contrast import Contrast
    from whence._explanation import Explanation
    from whence._inventory import Exemplar
    from whence._search import SearchResults


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


def render_search(results: SearchResults) -> str:
    """The concepts as a table, each with its exemplars, and what could not be searched."""
    heads, rows = _search_words.table(results)
    pictures = any(each.concept.exemplars for each in results)
    body = "".join(
        _row("td", row, "".join(map(_picture, each.concept.exemplars)) if pictures else None)
        for row, each in zip(rows, results, strict=True)
    )
    head = _row("th", (*heads, "exemplars") if pictures else heads)
    lines = "".join(f"<li>{escape(line)}</li>" for line in _search_words.lines(results))
    count = "1 concept" if len(results) == 1 else f"{len(results)} concepts"
    return (
        f"<div><p><b>{escape(results.text)}</b>, by {results.by}: {count}</p>"
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table><ul>{lines}</ul></div>"
    )


def _picture(exemplar: Exemplar) -> str:
    data = b64encode(exemplar.picture).decode()
    return f'<img alt="{escape(exemplar.source)}" height="64" src="data:image/webp;base64,{data}">'


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


def _row(tag: str, cells: tuple[str, ...], last: str | None = None) -> str:
    """Cells of text, and a last one of HTML, if any."""
    written = [*map(escape, cells), *([] if last is None else [last])]
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in written) + "</tr>"
