"""Options of a command, from the fields of a configuration."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union

import typer
from pydantic import BeforeValidator, ByteSize
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Option:
    """How one field is asked for on a command line."""

    annotation: Any
    """For typer."""
    default: Any
    """``inspect.Parameter.empty`` where the field is required."""
    read: Callable[[Any], Any]
    """From what typer gives to what the configuration takes."""


def option_of(name: str, field: FieldInfo) -> Option:
    """Return the option ``--name`` for a field, with the field's description as its help.

    A tuple becomes a repeatable option that also takes comma lists; a union of a number and a path becomes text,
    which the configuration itself reads, and so does a size in bytes, and what a validator reads first. The name of a
    field that would be a word of Python ends with ``_``, and its option does not.
    """
    names = (f"--{name[:-1].replace('_', '-')}",) if name.endswith("_") else ()
    help_ = typer.Option(*names, help=field.description)
    default = inspect.Parameter.empty if field.is_required() else field.default
    if typing.get_origin(field.annotation) is tuple:
        return Option(Annotated[list[str] | None, help_], None, _comma_list)
    kind = str if any(isinstance(part, BeforeValidator) for part in field.metadata) else _simple(field.annotation)
    if kind is str and not isinstance(default, str) and default not in (None, inspect.Parameter.empty):
        default = str(default)
    optional = field.annotation is not kind and default is None
    return Option(Annotated[(kind | None) if optional else kind, help_], default, lambda value: value)


def _simple(annotation: Any) -> Any:
    """Return the one type that a command line reads for a field."""
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) in (Union, UnionType):
        annotation = parts[0] if len(parts) == 1 else str
    return str if annotation is ByteSize else annotation


def _comma_list(values: list[str] | None) -> tuple[str, ...]:
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())
