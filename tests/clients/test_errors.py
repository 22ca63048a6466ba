"""The error tree, and the seam where gRPC's failures enter it."""

from __future__ import annotations

import inspect
import pickle

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import code_pb2, error_details_pb2, status_pb2
from numpy.typing import NDArray

import whence
from tests.clients.blocking import Connect
from whence import _errors, _status
from whence.testing import FakeServer, serve
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


def tree(cls: type[whence.WhenceError]) -> list[type[whence.WhenceError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in tree(child))]


def test_no_code_is_unmapped() -> None:
    assert set(_status.ERRORS_BY_CODE) == set(CODES)
    assert {code.value[0] for code in CODES} == set(code_pb2.Code.values()) - {code_pb2.OK}


def test_no_class_is_missing_from_the_docstring_or_the_package() -> None:
    drawing = inspect.getdoc(_errors) or ""
    for cls in tree(whence.WhenceError):
        assert cls.__name__ in drawing
        assert getattr(whence, cls.__name__) is cls
        assert cls.default_code in {code.name for code in CODES}


@pytest.mark.parametrize("code", CODES)
def test_every_code_comes_back_whole(
    code: grpc.StatusCode, server: FakeServer, image: NDArray[np.uint8], connect: Connect
) -> None:
    sent = _status.ERRORS_BY_CODE[code](
        "Over\nthere.", code=code.name, reason="SOME_REASON", metadata={"bank": "a/b/c", "request_id": "r-1"}
    )
    server.fail_next(sent)
    with (
        connect(server.address, max_attempts=1) as client,
        pytest.raises(whence.WhenceError) as caught,
    ):
        client.explain(image, bank="a/b/c")
    got = caught.value
    assert type(got) is type(sent)
    assert (got.message, got.code, got.reason) == ("Over\nthere.", code.name, "SOME_REASON")
    assert got.metadata == sent.metadata
    assert got.request_id == "r-1"
    assert got.retry_after_s is None
    assert got.retryable == (code is grpc.StatusCode.UNAVAILABLE)
    assert isinstance(got.__cause__, grpc.RpcError)


def test_busy_and_too_large_are_told_apart(server: FakeServer, image: NDArray[np.uint8], connect: Connect) -> None:
    with connect(server.address, max_attempts=1) as client:
        server.fail_next(whence.Overloaded("busy", retry_after_s=0.25))
        with pytest.raises(whence.Overloaded) as busy:
            client.explain(image, bank="a/b/c")
        server.fail_next(whence.ResourceExhausted("too large"))
        with pytest.raises(whence.ResourceExhausted) as large:
            client.explain(image, bank="a/b/c")
    assert busy.value.retryable
    assert busy.value.retry_after_s == 0.25
    assert type(large.value) is whence.ResourceExhausted
    assert not large.value.retryable


class Stranger(service_grpc.ExplanationServiceServicer):
    """Fails without details of ours: as a proxy would."""

    def __init__(self, details: bytes) -> None:
        self.details = details

    def ListModels(  # noqa: N802
        self, request: service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> service_pb2.ListModelsResponse:
        context.set_trailing_metadata((("grpc-status-details-bin", self.details),))
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")


def foreign_details() -> bytes:
    packed = Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason="THEIRS", domain="proxy.example"))
    return bytes(status_pb2.Status(code=7, details=[packed]).SerializeToString())


@pytest.mark.parametrize("details", [b"", b"\xff\xff not a status", foreign_details()])
def test_foreign_details_do_not_hide_the_failure(details: bytes, connect: Connect) -> None:
    with (
        serve(Stranger(details)) as address,
        connect(address) as client,
        pytest.raises(whence.PermissionDenied, match="not you") as caught,
    ):
        client.models()
    assert caught.value.reason == "PERMISSION_DENIED"
    assert len(caught.value.request_id) == 32


def test_what_the_service_lacks(server: FakeServer, connect: Connect) -> None:
    with (
        serve(service_grpc.ExplanationServiceServicer()) as address,
        connect(address) as client,
        pytest.raises(whence.Unimplemented),
    ):
        client.models()


@pytest.mark.parametrize("cls", tree(whence.WhenceError))
def test_errors_travel_between_processes(cls: type[whence.WhenceError]) -> None:
    error = cls("no", reason="R", request_id="7", metadata={"a": "b"}, retry_after_s=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert vars(copy) == vars(error)
    assert str(copy) == "no"


def test_a_missing_extra_is_an_import_error() -> None:
    error = _errors.missing_extra("pictures", "matplotlib")
    assert isinstance(error, ImportError)
    assert "pip install 'whence[pictures]'" in str(error)
