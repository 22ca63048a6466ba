"""The one seam where gRPC failures become errors of the SDK."""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from whence import _errors
from whence._errors import WhenceError
from whence.v1 import explanation_service_pb2 as service_pb2

ERROR_DOMAIN = "whence"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "request_id"

ERRORS_BY_CODE: dict[grpc.StatusCode, type[WhenceError]] = {
    grpc.StatusCode.CANCELLED: _errors.Cancelled,
    grpc.StatusCode.UNKNOWN: _errors.InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: _errors.InvalidArgument,
    grpc.StatusCode.DEADLINE_EXCEEDED: _errors.DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: _errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: _errors.AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: _errors.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: _errors.ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: _errors.FailedPrecondition,
    grpc.StatusCode.ABORTED: _errors.FailedPrecondition,
    grpc.StatusCode.OUT_OF_RANGE: _errors.InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: _errors.Unimplemented,
    grpc.StatusCode.INTERNAL: _errors.InternalError,
    grpc.StatusCode.UNAVAILABLE: _errors.Unavailable,
    grpc.StatusCode.DATA_LOSS: _errors.DataLoss,
    grpc.StatusCode.UNAUTHENTICATED: _errors.Unauthenticated,
}
"""Every status but OK."""

_TRANSPORT_FAILURES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "The service did not answer in time",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "A limit was met on the way",
    grpc.StatusCode.UNAVAILABLE: "The service cannot be reached",
}

_CODES_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in ERRORS_BY_CODE}


def from_rpc_error(failure: grpc.RpcError, request_id: str) -> WhenceError:
    """The error for a failed call.

    Parameters
    ----------
    failure
        What a stub raised.
    request_id
        The id that was sent, for answers that do not repeat it.
    """
    call: grpc.Call = failure  # type: ignore[assignment]  # what stubs raise is both
    info, retry = _details(call)
    metadata = dict(info.metadata) if info else {}
    return make(
        call.code() or grpc.StatusCode.UNKNOWN,
        _message(call) if info is None else call.details() or "",
        reason=info.reason if info else None,
        request_id=metadata.get(REQUEST_ID_KEY) or request_id,
        metadata=metadata,
        retry_after_s=seconds(retry.retry_delay) if retry else None,
    )


def from_failure(failure: service_pb2.Failure, request_id: str) -> WhenceError:
    """The error for one request's failure within a stream."""
    return make(
        _CODES_BY_NUMBER.get(failure.code, grpc.StatusCode.UNKNOWN),
        failure.message,
        reason=failure.reason or None,
        request_id=request_id,
        metadata=dict(failure.metadata),
        retry_after_s=seconds(failure.retry_after) if failure.HasField("retry_after") else None,
    )


def make(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str | None,
    request_id: str,
    metadata: dict[str, str],
    retry_after_s: float | None,
) -> WhenceError:
    """An error of the class that belongs to a status."""
    cls = ERRORS_BY_CODE.get(code, _errors.InternalError)
    # RESOURCE_EXHAUSTED is back-pressure only where the service says when to come back; else it is a limit.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after_s is not None:
        cls = _errors.Overloaded
    return cls(
        message,
        code=code.name,
        reason=reason,
        request_id=request_id,
        metadata=metadata,
        retry_after_s=retry_after_s,
    )


def _message(call: grpc.Call) -> str:
    """What to say of a failure that does not come from the service's own code."""
    details = call.details() or "no reason was given"
    lead = _TRANSPORT_FAILURES.get(call.code())
    return f"{lead}: {details}" if lead else details


def _details(call: grpc.Call) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.RetryInfo | None]:
    """The service's ErrorInfo and RetryInfo, as far as they came with a failure."""
    packed = dict(call.trailing_metadata() or ()).get(STATUS_DETAILS_KEY, b"")
    try:
        details = status_pb2.Status.FromString(packed).details if isinstance(packed, bytes) else ()
    except DecodeError:  # a proxy's own idea of this key is no reason to hide the failure
        details = ()
    info: error_details_pb2.ErrorInfo | None = None
    retry: error_details_pb2.RetryInfo | None = None
    for detail in details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            candidate = error_details_pb2.ErrorInfo.FromString(detail.value)
            info = candidate if candidate.domain == ERROR_DOMAIN else info
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
    return info, retry


def seconds(duration: Duration) -> float:
    """A duration of the wire, in seconds."""
    return duration.seconds + duration.nanos / 1e9
