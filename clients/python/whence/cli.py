"""The ``whence`` command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from whence import _errors
from whence._errors import WhenceError

if TYPE_CHECKING:
    import typer

EXIT_CODES: dict[type[WhenceError], int] = {
    WhenceError: 1,
    _errors.InternalError: 1,
    _errors.DataLoss: 1,
    _errors.InvalidArgument: 2,  # as for a wrong command line
    _errors.NotFound: 3,
    _errors.Unavailable: 4,
    _errors.ResourceExhausted: 4,
    _errors.Overloaded: 4,
    _errors.DeadlineExceeded: 4,
    _errors.Cancelled: 4,
    _errors.Unauthenticated: 5,
    _errors.PermissionDenied: 5,
    _errors.Unimplemented: 6,
    _errors.FailedPrecondition: 6,
    _errors.MissingExtra: 6,
    _errors.AlreadyExists: 6,
}
"""What the command exits with, by failure."""


def main() -> None:
    """Run the command; a failure is one line on standard error and a documented exit code."""
    try:
        app = _app()
        app()
    except WhenceError as error:
        message = " ".join(error.message.split())
        request = f" (request {error.request_id})" if error.request_id else ""
        print(f"whence: {message}{request}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_CODES[type(error)])


def _app() -> typer.Typer:
    """The commands; loads typer and rich."""
    try:
        from whence._commands import app
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "whence":
            raise
        raise _errors.missing_extra("cli", exc.name or "typer") from exc
    return app
