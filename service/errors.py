"""Failures as callers meet them: the one table from domain errors to gRPC codes, and what goes with a code."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from concepts import errors
from whence.v1 import explanation_service_pb2 as pb

DOMAIN = "whence"
"""Domain of every ``google.rpc.ErrorInfo`` that this server sends."""

CODES: Mapping[type[errors.WhenceError], int] = MappingProxyType(
    {
        errors.WhenceError: code_pb2.UNKNOWN,
        errors.InvalidInput: code_pb2.INVALID_ARGUMENT,
        errors.InvalidImage: code_pb2.INVALID_ARGUMENT,
        errors.UnknownClass: code_pb2.INVALID_ARGUMENT,
        errors.UnsupportedOption: code_pb2.INVALID_ARGUMENT,
        errors.NotFound: code_pb2.NOT_FOUND,
        errors.UnknownModel: code_pb2.NOT_FOUND,
        errors.UnknownBank: code_pb2.NOT_FOUND,
        errors.UnknownLayer: code_pb2.NOT_FOUND,
        errors.UnknownConcept: code_pb2.NOT_FOUND,
        errors.InvalidCut: code_pb2.FAILED_PRECONDITION,
        errors.InvalidModel: code_pb2.FAILED_PRECONDITION,
        errors.NotTrainable: code_pb2.FAILED_PRECONDITION,
        errors.CorruptData: code_pb2.DATA_LOSS,
        errors.WeightsMismatch: code_pb2.FAILED_PRECONDITION,
        errors.AlreadyExists: code_pb2.ALREADY_EXISTS,
        errors.NumericalFailure: code_pb2.FAILED_PRECONDITION,
        errors.Overloaded: code_pb2.RESOURCE_EXHAUSTED,
        errors.Unavailable: code_pb2.UNAVAILABLE,
        errors.DeadlineExceeded: code_pb2.DEADLINE_EXCEEDED,
    }
)
"""The ``google.rpc.Code`` of each class of failure. INTERNAL is not among them: it means a bug."""

_LONGEST = 400
"""Most characters of a message, or of a value of its metadata."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure, ready to be sent."""

    code: int
    """A ``google.rpc.Code``."""
    message: str
    reason: str
    metadata: dict[str, str]
    retry_after_s: float | None = None
    """Present where trying again later helps."""

    def status(self) -> bytes:
        """Return a serialised ``google.rpc.Status``, the value of ``grpc-status-details-bin``."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        details = [_packed(info)]
        if self.retry_after_s is not None:
            details.append(_packed(error_details_pb2.RetryInfo(retry_delay=_duration(self.retry_after_s))))
        status = status_pb2.Status(code=self.code, message=self.message, details=details)
        return bytes(status.SerializeToString())

    def trailers(self) -> list[tuple[str, str | bytes]]:
        """Return the trailing metadata that go with the code and message."""
        trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", self.status())]
        if self.retry_after_s is not None:
            trailers.append(("retry-after", f"{self.retry_after_s:.3f}"))
        return trailers

    def failure(self) -> pb.Failure:
        """Return the failure as a message within a stream."""
        failure = pb.Failure(code=self.code, message=self.message, reason=self.reason, metadata=self.metadata)
        if self.retry_after_s is not None:
            failure.retry_after.CopyFrom(_duration(self.retry_after_s))
        return failure


def fault(error: Exception, request_id: str) -> Fault:
    """Say what a caller may know of an error.

    What is not a `WhenceError` is a bug: the caller gets a neutral sentence and the request id under which the trace
    is found in the server's log.
    """
    if isinstance(error, errors.WhenceError):
        return Fault(
            code=CODES[type(error)],
            message=_short(error.message),
            reason=error.reason,
            metadata={**{key: _short(value) for key, value in error.metadata.items()}, "request_id": request_id},
            retry_after_s=getattr(error, "retry_after_s", None),
        )
    trace = "".join(traceback.format_exception(error))
    _log.error("request %s failed by a bug:\n%s", request_id, trace)
    return Fault(
        code=code_pb2.INTERNAL,
        message=f"The server failed on this request. Report it with its id: {request_id}",
        reason="INTERNAL",
        metadata={"request_id": request_id},
    )


def _short(text: str) -> str:
    # Messages may quote what the caller sent, and gRPC's trailers have room for a few kilobytes.
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
