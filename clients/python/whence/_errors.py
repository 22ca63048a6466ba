"""Every failure that a caller of the SDK can meet, in one tree.

::

    WhenceError
    ├── InvalidArgument        the request cannot be served as it is; often refused before it is sent
    ├── NotFound               no such bank, model, layer or concept
    ├── AlreadyExists
    ├── FailedPrecondition     the service's or the client's state does not allow it
    │   └── MissingExtra       an optional package is not installed (also an ImportError)
    ├── Unauthenticated        no token, or one that is not accepted
    ├── PermissionDenied
    ├── ResourceExhausted      a limit was met, such as the largest message
    │   └── Overloaded         the service is busy: try again after ``retry_after_s``
    ├── DeadlineExceeded       no answer within ``timeout_s``
    ├── Cancelled
    ├── Unavailable            the service cannot be reached, is starting or is stopping
    ├── Unimplemented          the service does not offer this yet
    ├── DataLoss               stored or received data is not what was written
    └── InternalError          a bug in the service

An error knows nothing of gRPC beyond the name of the code: ``whence._status`` maps each status to a class in one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class WhenceError(Exception):
    """Root of the tree.

    Parameters
    ----------
    message
        What is wrong and what to do about it.
    code
        Name of the gRPC status code, e.g. ``"NOT_FOUND"``. Default: that of the class.
    reason
        Stable upper snake case name of the failure, e.g. ``"UNKNOWN_BANK"``. Default: the code.
    request_id
        Id of the request, to be found in the service's logs; empty where nothing was sent.
    metadata
        Facts for programs.
    retry_after_s
        How long to wait, in seconds, before trying again; None where the service did not say.
    """

    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str | None = None,
        request_id: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason or self.code
        self.request_id = request_id
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.retry_after_s is not None

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries; the default would lose the keyword arguments.
        return _rebuild, (type(self), self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, reason={self.reason!r}, request_id={self.request_id!r})"


def _rebuild(cls: type[WhenceError], state: dict[str, object]) -> WhenceError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    error.args = (state["message"],)
    return error


class InvalidArgument(WhenceError):
    """The request cannot be served as it is."""

    default_code = "INVALID_ARGUMENT"


class NotFound(WhenceError):
    """No such bank, model, layer or concept."""

    default_code = "NOT_FOUND"


class AlreadyExists(WhenceError):
    """What should be made is there already."""

    default_code = "ALREADY_EXISTS"


class FailedPrecondition(WhenceError):
    """The state of the service or of the client does not allow it."""

    default_code = "FAILED_PRECONDITION"


class MissingExtra(FailedPrecondition, ImportError):
    """An optional package is not installed."""


class Unauthenticated(WhenceError):
    """No token, or one that is not accepted."""

    default_code = "UNAUTHENTICATED"


class PermissionDenied(WhenceError):
    """The token does not allow it."""

    default_code = "PERMISSION_DENIED"


class ResourceExhausted(WhenceError):
    """A limit was met, such as the largest message."""

    default_code = "RESOURCE_EXHAUSTED"


class Overloaded(ResourceExhausted):
    """The service is busy; try again after ``retry_after_s``."""


class DeadlineExceeded(WhenceError):
    """No answer in time."""

    default_code = "DEADLINE_EXCEEDED"


class Cancelled(WhenceError):
    """The call was cancelled."""

    default_code = "CANCELLED"


class Unavailable(WhenceError):
    """The service cannot be reached, is starting or is stopping."""

    default_code = "UNAVAILABLE"

    @property
    def retryable(self) -> bool:
        """Always: every call only reads, so asking twice does no harm."""
        return True


class Unimplemented(WhenceError):
    """The service does not offer this yet."""

    default_code = "UNIMPLEMENTED"


class DataLoss(WhenceError):
    """Stored or received data is not what was written."""

    default_code = "DATA_LOSS"


class InternalError(WhenceError):
    """A bug in the service."""

    default_code = "INTERNAL"


def missing_extra(extra: str, package: str) -> MissingExtra:
    """The error that names the command to run when an optional package is absent."""
    return MissingExtra(
        f"{package} is not installed: pip install 'whence[{extra}]'",
        reason="MISSING_EXTRA",
        metadata={"extra": extra, "package": package},
    )
