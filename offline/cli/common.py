"""What commands share: options, errors in one line, progress, tables."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from concepts.architectures import TRUSTED_PACKAGES
from concepts.errors import InvalidInput, InvalidModel, WhenceError
from concepts.repository import Repository
from offline.options import Option

Root = Annotated[str, typer.Option("--repository", envvar="WHENCE_REPOSITORY", help="Folder of models and banks.")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust", help="Package whose factories a model may name; may be repeated.")
]

REQUIRED = inspect.Parameter.empty

_PIPE_WIDTH = 200
"""Characters a line where there is no terminal."""

_WIDEST = 10_000
"""Characters that no table needs."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what is the user's to mend into one line and exit code 2."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "configuration"
        _fail(f"{name}: {first['msg']}", error)
    except InvalidModel as error:
        _fail(f"{error.message}: {error.__cause__}" if error.__cause__ else error.message, error)
    except WhenceError as error:
        _fail(error.message, error)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", error)


def _fail(message: str, cause: Exception) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2) from cause


def open_repository(root: str, trust: list[str] | None = None) -> Repository:
    if "://" in root:
        raise InvalidInput(f"--repository {root!r} must be a folder: this version reads and writes no other storage")
    return Repository(root, trusted=trusted(trust))


def trusted(trust: list[str] | None) -> tuple[str, ...]:
    return (*TRUSTED_PACKAGES, *(trust or ()))


def take(command: Callable[..., None], own: Mapping[str, tuple[Any, Any]], fields: Mapping[str, Option]) -> None:
    """Let typer see options of a command's own, by annotation and default, and those of a configuration's fields."""
    options = {**own, **{name: (field.annotation, field.default) for name, field in fields.items()}}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}


def tell_skipped(images: Mapping[str, str]) -> None:
    for key, reason in list(images.items())[:10]:
        typer.echo(f"skipped image {key}: {reason}", err=True)
    if images:
        typer.echo(f"{len(images)} images were skipped", err=True)


class Bars:
    """Progress on stderr: one bar a stage."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note="")
        self._progress.update(self._tasks[stage], completed=done, total=total)
        if note:
            self._progress.update(self._tasks[stage], note=note)


def print_table(table: Table, *, whole: bool = False) -> None:
    """Print a table; whole: at its full width, whatever that of the terminal is."""
    # Files and pipes have no width: they get whole lines.
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if whole:
        console.width = max(console.width, Console(width=_WIDEST).measure(table).maximum)
    console.print(table, soft_wrap=whole)
