"""What a failure of one image means: for the image, for the service, or for the run."""

from __future__ import annotations

from enum import Enum

from whence._errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    NotFound,
    Overloaded,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    WhenceError,
)


class Verdict(Enum):
    """What to do about a failure."""

    ROW = "it is this image's: write it down"
    SUSPECT = "it may be this image's: try again, and write it down if others are answered"
    WAIT = "it is nobody's fault: wait until the service or the store is back"
    STOP = "every image would fail so: stop"


_OF_THE_IMAGE = {"INVALID_IMAGE", "MESSAGE_TOO_LARGE", "NUMERICAL_FAILURE", "UNREADABLE_FILE"}
"""Reasons that the service, or the SDK in its place, gives for one image."""
_MAYBE_OF_THE_IMAGE = {"UNSUPPORTED_OPTION", "INVALID_INPUT", "INVALID_ARGUMENT"}
"""Reasons that may come from the class that is predicted, or from the request as it is."""


_FINAL = _OF_THE_IMAGE | _MAYBE_OF_THE_IMAGE | {"INVALID_KEY"}


def retryable(error: WhenceError) -> bool:
    """Whether the same object may succeed later, so that trying again is worth it."""
    return error.reason not in _FINAL and (not isinstance(error, ResourceExhausted) or isinstance(error, Overloaded))


def of_answer(error: WhenceError) -> Verdict:
    """What a failure to explain an image means."""
    if error.reason in _OF_THE_IMAGE:
        return Verdict.ROW
    if isinstance(error, (Overloaded, Unavailable)):
        return Verdict.WAIT
    if isinstance(error, ResourceExhausted):
        return Verdict.ROW  # its request or its answer is too large
    if isinstance(error, (DeadlineExceeded, InternalError, Cancelled)):
        return Verdict.SUSPECT
    if isinstance(error, InvalidArgument) and error.reason in _MAYBE_OF_THE_IMAGE:
        return Verdict.SUSPECT
    return Verdict.STOP


def of_reading(error: WhenceError) -> Verdict:
    """What a failure to read an object means; of a suspect the store is asked whether it answers at all."""
    if isinstance(error, NotFound) and error.reason == "NO_SUCH_OBJECT":
        return Verdict.ROW
    if isinstance(error, (NotFound, PermissionDenied)) or error.reason == "UNREADABLE_OBJECT":
        return Verdict.SUSPECT
    if isinstance(error, Unavailable):
        return Verdict.WAIT
    return Verdict.STOP
