"""Tables, lines and JSON on standard output; warnings on standard error."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from whence import _json
from whence._cli.failures import printable
from whence._errors import InvalidArgument

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value; a failure, too, on standard error.")]
"""The option of every command."""

_UNLIMITED_COLUMNS = 100_000


def print_json(record: object) -> None:
    """One JSON value."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(_json.dumps(record, ensure_ascii=not unicode))


def print_table(heads: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    """A table; cells are plain text, whatever brackets a label may hold, and no word is cut.

    Where a terminal is too narrow, every row becomes some lines. Into a pipe it is one line, whatever its length.
    """
    cells = [tuple(printable(str(cell)) for cell in row) for row in rows]
    table = Table()
    for place, head in enumerate(heads):
        numeric = all(_is_number(row[place]) for row in cells)
        table.add_column(Text(printable(head)), justify="right" if numeric and rows else "left")
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = _UNLIMITED_COLUMNS
    if _least_columns(table) <= console.width:
        console.print(table)
    else:
        for row in cells:
            for head, cell in zip(heads, row, strict=True):
                if cell:
                    say(f"{head}: {cell}")
            say("")


def say(line: str) -> None:
    """A line of text."""
    Console().print(Text(printable(line)), soft_wrap=True)


def warn(line: str) -> None:
    """A warning, on standard error."""
    typer.echo(f"whence: warning: {printable(line)}", file=sys.stderr)


def number(value: float | None) -> str:
    """A cell for a number that need not be there."""
    return "" if value is None else f"{value:.4g}"


def write(action: Callable[[], None], path: Path) -> None:
    """Do something that writes a file; what the system refuses is the caller's to mend."""
    try:
        action()
    except OSError as exc:
        raise InvalidArgument(f"Cannot write {path}: {exc.strerror or exc}.", reason="UNWRITABLE_FILE") from exc


def _least_columns(table: Table) -> int:
    """How wide a terminal must be for the table's longest words."""
    console = Console(width=_UNLIMITED_COLUMNS)
    return Measurement.get(console, console.options, table).minimum


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[+-]?[\d.]*(e[+-]?\d+)?%?", cell) is not None
