"""Records as pieces of HTML, for notebooks: without colours of their own, so that they suit any theme."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from whence import _contrast_words, _inventory_words, _labels, _search_words
from whence._inventory_words import counted
from whence._words import (
    all_lines,
    bank_version,
    class_name,
    explained_logit,
    intervention_lines,
    intervention_table,
    table,
)

if TYPE_CHECKING:
    from whence._contrast import Contrast
    from whence._explanation import Explanation
    from whence._intervention import Intervention
    from whence._inventory import Bank, Concept, Exemplar, Model
    from whence._search import SearchResults


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Heads and rows."""

_CLASSES = 100
"""Of a model, named."""


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
        _row("td", row, " ".join(map(_picture, each.concept.exemplars)) if pictures else None)
        for row, each in zip(rows, results, strict=True)
    )
    head = _row("th", (*heads, "exemplars") if pictures else heads)
    lines = "".join(f"<li>{escape(line)}</li>" for line in _search_words.lines(results))
    return (
        f"<div><p><b>{escape(results.text)}</b>, by {results.by}: {counted(len(results), 'concept')}</p>"
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table><ul>{lines}</ul></div>"
    )


def render_intervention(intervention: Intervention) -> str:
    """What was done, and the classes before and after."""
    verdict, *_ = intervention_lines(intervention)
    cells = intervention_table(intervention)
    first, last = class_name(intervention.before[0]), class_name(intervention.after[0])
    head = f"<b>{escape(first)} → {escape(last)}</b>, {escape(bank_version(intervention))}"
    return f"<div><p>{head}</p>{_table(cells)}<ul><li>{escape(verdict)}</li></ul></div>"


def render_model(model: Model) -> str:
    """What is known of a model, and the names of its first classes."""
    names = ", ".join(map(escape, model.class_names[:_CLASSES]))
    more = f", … and {len(model.class_names) - _CLASSES:,} more" if len(model.class_names) > _CLASSES else ""
    classes = _folded(counted(len(model.class_names), "class", "classes"), f"<p>{names}{more}</p>")
    return f"<div><p><b>{escape(model.name)}</b></p>{_facts(_inventory_words.model_facts(model))}{classes}</div>"


def render_bank(bank: Bank) -> str:
    """What is known of a bank; its metrics and its configuration are folded away."""
    facts = _facts(_inventory_words.bank_facts(bank))
    folded = "".join(
        _folded(what, f"<pre>{escape(json.dumps(values, ensure_ascii=False, indent=2, default=str))}</pre>")
        for what, values in (("metrics", dict(bank.metrics)), ("configuration", dict(bank.configuration)))
        if values
    )
    return f"<div><p><b>{escape(bank.reference)}</b></p>{facts}{folded}</div>"


def render_concept(concept: Concept) -> str:
    """Exemplars and counterfactuals in strips, and what is known of a concept."""
    head = f"<b>{escape(_labels.numbered(concept))}</b>, {escape(bank_version(concept))}"
    against = f"<p>counterfactuals</p>{_strip(concept.counterfactuals)}" if concept.counterfactuals else ""
    note = "".join(f"<p>{escape(line)}</p>" for line in _labels.note([concept]))
    facts = _folded("what is known", _facts(_inventory_words.concept_facts(concept)))
    return f"<div><p>{head}</p>{_strip(concept.exemplars)}{against}{note}{facts}</div>"


def _strip(exemplars: Sequence[Exemplar]) -> str:
    """Pictures beside each other."""
    return f"<p>{' '.join(map(_picture, exemplars))}</p>" if exemplars else ""


def _picture(exemplar: Exemplar) -> str:
    data, says = b64encode(exemplar.picture).decode(), escape(_inventory_words.exemplar_line(exemplar))
    return f'<img alt="{says}" title="{says}" height="64" src="data:image/webp;base64,{data}">'


def _piece(head: str, picture: bytes | None, summary: str, cells: Table, lines: Sequence[str], what: str) -> str:
    """Head (HTML), picture, table and statements, one below the other."""
    image = f'<img alt="{what}" src="data:image/png;base64,{b64encode(picture).decode()}">' if picture else ""
    report = "".join(f"<li>{escape(line)}</li>" for line in lines)
    folded = _folded(summary, _table(cells), opened=not picture)
    return f"<div><p>{head}</p>{image}{folded}<ul>{report}</ul></div>"


def _folded(summary: str, content: str, *, opened: bool = False) -> str:
    """Content (HTML) that a click shows."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{content}</details>"


def _facts(facts: _inventory_words.Facts) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table><tbody>{rows}</tbody></table>"


def _table(cells: Table) -> str:
    heads, rows = cells
    body = "".join(_row("td", row) for row in rows)
    return f"<table><thead>{_row('th', heads)}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: tuple[str, ...], last: str | None = None) -> str:
    """Cells of text, and a last one of HTML, if any."""
    written = [*map(escape, cells), *([] if last is None else [last])]
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in written) + "</tr>"
