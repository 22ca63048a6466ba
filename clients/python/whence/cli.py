"""The ``whence`` command."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from whence import _errors
from whence._cli.failures import EXIT_CODES, INTERRUPTED, line
from whence._errors import WhenceError


def main() -> None:
    """Run the command; a failure is one line on standard error and a documented exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own log is no part of that line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text, nor terminals know Unicode
    try:
        code = _runner()()
    except WhenceError as error:
        print(line(error, as_json="--json" in sys.argv), file=sys.stderr)  # noqa: T201
        code = EXIT_CODES[type(error)]
    except KeyboardInterrupt:  # before the command runs, or after
        code = INTERRUPTED
    sys.exit(code)


def _runner() -> Callable[[], int]:
    """What runs the commands; loads typer and rich."""
    try:
        from whence._cli.app import run
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "whence":
            raise
        raise _errors.missing_extra("cli", exc.name or "typer") from exc
    return run
