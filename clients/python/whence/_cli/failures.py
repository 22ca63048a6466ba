"""What a failure looks like to who runs the command; loads neither typer nor rich."""

from __future__ import annotations

import json
import re

from whence import _errors
from whence._errors import WhenceError

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
NOT_EXPLAINED = 7
"""What a batch exits with that explained nothing, or not all where that was asked for."""
INTERRUPTED = 130
"""What shells give for a program that Ctrl-C ended."""

# Control characters, which a terminal would obey; marks that turn the direction of text; halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in one line that does nothing to a terminal, whatever a label or a file's name may hold."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def line(error: WhenceError, *, as_json: bool) -> str:
    """A failure in one line."""
    if as_json:
        facts = {
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
            "request_id": error.request_id,
            "retryable": error.retryable,
        }
        return json.dumps({"error": facts})
    request = f" (request {error.request_id})" if error.request_id else ""
    return f"whence: {printable(' '.join(error.message.split()) + request)}"
