"""Failures on their way to callers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from concepts import errors
from service.errors import CODES, fault


def tree(root: type[errors.WhenceError]) -> Iterator[type[errors.WhenceError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_every_class_of_failure_has_a_code_of_its_own_entry() -> None:
    domain = {cls for cls in tree(errors.WhenceError) if cls.__module__ == errors.__name__}
    assert set(CODES) == domain
    assert code_pb2.INTERNAL not in CODES.values(), "INTERNAL means a bug"
    assert code_pb2.OK not in CODES.values()
    assert set(CODES.values()) <= {code.value[0] for code in grpc.StatusCode}


def test_details_name_the_reason_the_facts_and_the_request() -> None:
    problem = fault(errors.UnknownBank("there is no bank m/l/n", bank="m/l/n"), "r-1")
    assert problem.code == code_pb2.NOT_FOUND
    ((key, value),) = problem.trailers()
    assert key == "grpc-status-details-bin"
    assert isinstance(value, bytes)
    status = status_pb2.Status.FromString(value)
    assert (status.code, status.message) == (code_pb2.NOT_FOUND, "there is no bank m/l/n")
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.domain, info.reason) == ("whence", "UNKNOWN_BANK")
    assert dict(info.metadata) == {"bank": "m/l/n", "request_id": "r-1"}


def test_where_trying_again_helps_it_is_said_when() -> None:
    problem = fault(errors.Overloaded("busy", retry_after_s=1.5), "r")
    trailers = dict(problem.trailers())
    assert trailers["retry-after"] == "1.500"
    value = trailers["grpc-status-details-bin"]
    assert isinstance(value, bytes)
    retry = error_details_pb2.RetryInfo()
    assert status_pb2.Status.FromString(value).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert problem.failure().retry_after.ToMilliseconds() == 1500
    assert not fault(errors.UnknownClass("x"), "r").failure().HasField("retry_after")


def test_a_bug_is_told_to_the_log_and_not_to_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        try:
            open("/secret/place")  # noqa: PTH123, SIM115
        except OSError as error:
            problem = fault(error, "r-9")
    assert problem.code == code_pb2.INTERNAL
    assert "r-9" in problem.message
    for text in (problem.message, str(problem.metadata), repr(problem.trailers())):
        assert "secret" not in text
        assert "Traceback" not in text
    assert "/secret/place" in caplog.text
    assert "r-9" in caplog.text


def test_messages_that_quote_the_caller_stay_short_enough_for_trailers() -> None:
    problem = fault(errors.InvalidInput("x" * 100_000, field="é" * 100_000), "r")
    assert sum(len(key) + len(value) for key, value in problem.trailers()) < 4096
    assert len(problem.message) == 400
