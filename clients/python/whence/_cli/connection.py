"""The options that every command has which asks the service."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from whence import _config
from whence._cli import printing
from whence._client import Client

_FLAGS = {"tls": ("--tls/--no-tls",), "certificate": ("--certificate", "--cert"), "timeout_s": ("--timeout",)}
_TYPES = {"text": str, "path": Path, "seconds": float, "flag": bool}


class Connection:
    """Where the service is and how it is reached.

    Parameters
    ----------
    given
        What the command line says of it, by the names of settings.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def configuration(self) -> _config.Configuration:
        """The settings in force; what is unwise about them is said on standard error."""
        configuration = _config.load(self._given)
        for warning in configuration.warnings:
            printing.warn(warning)
        return configuration

    def client(self) -> Client:
        """A client of the service."""
        return Client(**self.configuration().client_options())


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of its first parameter ``connection``, one option for each setting."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    @wraps(command)
    def connected(**options: Any) -> None:
        given = {name: options.pop(name) for name in _config.SETTINGS}
        command(Connection(given), **options)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *_options())]
    connected.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    connected.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return connected


def _options() -> list[inspect.Parameter]:
    """An option for each setting; unset ones are left to the environment and the file."""
    return [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_TYPES[setting.kind] | None, _option(setting)],
        )
        for setting in _config.SETTINGS.values()
    ]


def _option(setting: _config.Setting) -> Any:
    default = "" if setting.default is None else f" [default: {setting.default}]"
    return typer.Option(
        *_FLAGS.get(setting.name, (f"--{setting.name.replace('_', '-')}",)),
        help=f"{setting.help} [env var: {setting.variable}]{default}".replace("[", r"\["),
        rich_help_panel="Connection",
        show_default=False,
    )
