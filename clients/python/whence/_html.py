"""An explanation as a piece of HTML, for notebooks."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from typing import TYPE_CHECKING

from whence._words import all_lines, bank_version, explained_logit, table

if TYPE_CHECKING:
    from whence._explanation import Explanation


def render(explanation: Explanation, picture: bytes | None) -> str:
    """The picture (PNG bytes, if any), the concepts as a table, and the report."""
    target = explanation.target
    heads, rows = table(explanation)
    head = _row("th", heads)
    body = "".join(_row("td", row) for row in rows)
    image = f'<img alt="explanation" src="data:image/png;base64,{b64encode(picture).decode()}">' if picture else ""
    report = "".join(f"<li>{escape(line)}</li>" for line in all_lines(explanation))
    return (
        f"<div><p><b>{escape(target.name or str(target.index))}</b> (p = {target.probability:.3f}, "
        f"{escape(explained_logit(explanation))}), {escape(bank_version(explanation))}</p>{image}"
        f"<details{'' if picture else ' open'}><summary>{len(explanation.concepts)} concepts</summary>"
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table></details><ul>{report}</ul></div>"
    )


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
