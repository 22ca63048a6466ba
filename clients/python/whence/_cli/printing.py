"""Tables, lines and JSON on standard output; warnings on standard error."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
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
    typer.echo(_json.dumps(record))


def print_table(heads: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    """A table; cells are plain text, whatever brackets a label may hold, and nothing is cut."""
    table = Table()
    for place, head in enumerate(heads):
        numeric = all(_is_number(row[place]) for row in rows)
        table.add_column(head, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = _UNLIMITED_COLUMNS  # programs read lines: a row is one, whatever the width of the window
    console.print(table)


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


def _is_number(cell: object) -> bool:
    return re.fullmatch(r"[+-]?[\d.]*(e[+-]?\d+)?%?", str(cell)) is not None
