"""What stores raise, made into errors of the SDK: the one seam for boto3, obstore and files."""

from __future__ import annotations

from whence._batch.locations import Location
from whence._errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    WhenceError,
)

_NO_SUCH_BUCKET = ("NoSuchBucket", "The specified bucket does not exist")
_BAD_CREDENTIALS = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "CredentialRetrievalError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "RefreshError",
)
_DENIED = ("AccessDenied", "PermissionDenied", "AllAccessDisabled", "(403)", "403 Forbidden")
_NO_CREATE = ("NotImplemented", "501 Not Implemented", "conditional put is disabled")


def from_store(failure: BaseException, place: Location | str) -> WhenceError:
    """The error for what a store raised.

    Stores tell a cause by class or by a code within the text, so both are looked at.
    """
    if isinstance(failure, WhenceError):
        return failure
    kind, text = type(failure).__name__, str(failure)
    said = f"{kind} {text}"
    if _has(said, _BAD_CREDENTIALS) or kind == "UnauthenticatedError":
        return unauthenticated(place, "are not accepted, or have expired")
    if _has(said, _NO_SUCH_BUCKET):
        return NotFound(f"There is no bucket for {place}: create it, or correct the name.", reason="NO_SUCH_BUCKET")
    if isinstance(failure, (FileNotFoundError, NotADirectoryError)) or _has(said, ("NoSuchKey", "(404)")):
        return NotFound(f"There is nothing at {place}.", reason="NO_SUCH_OBJECT")
    if isinstance(failure, PermissionError) or kind == "PermissionDeniedError" or _has(said, _DENIED):
        return PermissionDenied(
            f"Access to {place} is denied: grant reading of the source, and reading, writing, listing and deleting of "
            "the output.",
            reason="STORE_DENIED",
        )
    if isinstance(failure, NotImplementedError) or _has(said, _NO_CREATE):
        return no_conditional_create(place)
    if isinstance(failure, OSError) and failure.errno is not None:
        return DataLoss(f"Cannot use {place}: {failure.strerror}.", reason="UNREADABLE_OBJECT")
    return Unavailable(f"The store of {place} cannot be used: {_first_line(text)}", reason="STORE_UNAVAILABLE")


def unauthenticated(place: Location | str, what: str) -> Unauthenticated:
    """The error for credentials that are missing or stale."""
    return Unauthenticated(
        f"The credentials for {place} {what}: renew them as for the store's own command (aws, gcloud), and run "
        "the same again; what is committed stays.",
        reason="STORE_UNAUTHENTICATED",
    )


def no_conditional_create(place: Location | str) -> FailedPrecondition:
    """The error for a store that cannot create an object only where there is none."""
    return FailedPrecondition(
        f"The store of {place} cannot create an object only if there is none (If-None-Match), on which each key's "
        "ending once rests: write to a folder or another bucket, and copy from there.",
        reason="NO_CONDITIONAL_CREATE",
    )


def _has(text: str, marks: tuple[str, ...]) -> bool:
    return any(mark in text for mark in marks)


def _first_line(text: str) -> str:
    return (text.splitlines() or ["no reason was given"])[0][:300]
