"""What a client asks its server before the first call."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import whence
from tests.clients.blocking import Connect
from whence import _fake_answers, _handshake
from whence.testing import FakeServer, make_server_info, serve
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

BANK = "fake/layer/bank"


class Introducing(service_grpc.ExplanationServiceServicer):
    """Says what it is, or fails to, and counts how often it is asked."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        self.asked = 0
        self.calls = 0
        self.codes = list(codes)
        self._lock = threading.Lock()

    def GetServerInfo(  # noqa: N802
        self, request: service_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> service_pb2.GetServerInfoResponse:
        with self._lock:
            self.asked += 1
            code = self.codes.pop(0) if self.codes else None
        if code is not None:
            context.abort(code, "no answer")
        return _fake_answers.server_info(make_server_info())

    def ListModels(  # noqa: N802
        self, request: service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> service_pb2.ListModelsResponse:
        with self._lock:
            self.calls += 1
        return service_pb2.ListModelsResponse()


def test_a_server_is_asked_once_by_all_threads(connect: Connect) -> None:
    servicer = Introducing()
    with serve(servicer, max_workers=32) as address, connect(address) as client, ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(client.models) for _ in range(32)]:
            assert done.result() == ()
        client.models()
    assert (servicer.asked, servicer.calls) == (1, 33)


def test_nothing_is_asked_where_it_is_turned_off(connect: Connect) -> None:
    servicer = Introducing()
    with serve(servicer) as address, connect(address, check_version=False) as client:
        client.models()
    assert (servicer.asked, servicer.calls) == (0, 1)


def test_a_server_that_does_not_know_the_question_is_not_asked_again(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_handshake, "_ASK_AGAIN_S", 0.0)
    servicer = Introducing(grpc.StatusCode.UNIMPLEMENTED)
    with serve(servicer) as address, connect(address) as client:
        client.models()
        client.models()
    assert (servicer.asked, servicer.calls) == (1, 2)


def test_a_question_that_fails_hinders_no_call_and_is_asked_later(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer = Introducing(grpc.StatusCode.PERMISSION_DENIED)
    with serve(servicer) as address, connect(address) as client:
        client.models()
        client.models()
        assert servicer.asked == 1  # not so soon
    monkeypatch.setattr(_handshake, "_ASK_AGAIN_S", 0.0)
    servicer = Introducing(grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with serve(servicer) as address, connect(address) as client:
        for _ in range(4):
            client.models()
    assert (servicer.asked, servicer.calls) == (3, 4)


def test_a_server_that_never_says_what_it_is_has_time_to_answer(connect: Connect) -> None:
    class Silent(Introducing):
        def GetServerInfo(  # noqa: N802
            self, request: service_pb2.GetServerInfoRequest, context: grpc.ServicerContext
        ) -> service_pb2.GetServerInfoResponse:
            ended = threading.Event()
            context.add_callback(ended.set)
            ended.wait(30)
            return service_pb2.GetServerInfoResponse()

    servicer = Silent()
    with serve(servicer) as address, connect(address, timeout_s=2.0) as client:
        assert client.models() == ()
    assert servicer.calls == 1


def test_a_server_that_is_not_there_yet_is_asked_with_the_next_attempt(connect: Connect) -> None:
    servicer = Introducing(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE)
    with serve(servicer) as address, connect(address) as client:
        client.models()
    assert (servicer.asked, servicer.calls) == (3, 1)


@pytest.mark.parametrize("version", ["1.0.0", "17.2"])
def test_another_major_version_is_refused(
    version: str, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    server.server_info = make_server_info(version=version)
    for call in (
        client.models,
        lambda: client.explain(image, bank=BANK),
        lambda: list(client.explain_many([image], bank=BANK)),
    ):
        with pytest.raises(whence.FailedPrecondition, match=f"{version}.*{whence.__version__}.*pip install") as caught:
            call()
        assert caught.value.reason == "INCOMPATIBLE_SERVER"
        assert caught.value.metadata == {"server_version": version, "client_version": whence.__version__}
        assert not caught.value.retryable
    assert not server.calls
    assert client.server_info().version == version  # which asks of any
    server.server_info = make_server_info()
    client.models()  # it was replaced


@pytest.mark.parametrize("version", [f"{whence.__version__.split('.')[0]}.99.7", "", "unknown"])
def test_other_versions_are_taken(version: str, server: FakeServer, client: whence.Client) -> None:
    server.server_info = make_server_info(version=version, contract_revision=_handshake.CONTRACT_REVISION + 5)
    assert client.models() == ()


def test_an_older_server_is_warned_of_once(server: FakeServer, client: whence.Client) -> None:
    server.server_info = make_server_info(contract_revision=0)
    with pytest.warns(whence.VersionWarning, match="contract revision 0"):
        client.models()
    client.models()  # warnings are errors here


def test_an_image_beyond_the_servers_limit_is_not_sent(server: FakeServer, client: whence.Client) -> None:
    limits = make_server_info().limits
    server.server_info = make_server_info(limits=dataclasses.replace(limits, request_bytes=100_000))
    large, small = np.zeros((200, 200, 3), np.uint8), np.zeros((150, 200, 3), np.uint8)
    with pytest.raises(whence.ResourceExhausted, match="95,904 can be sent") as caught:
        client.explain(large, bank=BANK)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    outcomes = list(client.explain_many([large, small], bank=BANK))
    assert [type(outcome.error) for outcome in outcomes] == [whence.ResourceExhausted, type(None)]
    assert [call.method for call in server.calls] == ["ExplainStream"]


def test_the_servers_limit_holds_whatever_the_caller_allows(
    server: FakeServer, connect: Connect, image: NDArray[np.uint8]
) -> None:
    limits = make_server_info().limits
    server.server_info = make_server_info(limits=dataclasses.replace(limits, request_bytes=100_000))
    large = np.zeros((200, 200, 3), np.uint8)
    with connect(server.address, max_message_bytes=10**6) as client:
        with pytest.raises(whence.ResourceExhausted, match="95,904 can be sent"):
            client.explain(large, bank=BANK)
        client.explain(image, bank=BANK)
    with (
        connect(server.address, max_message_bytes=10_000) as client,
        pytest.raises(whence.ResourceExhausted, match="5,904 can be sent"),
    ):
        client.explain(np.zeros((50, 50, 3), np.uint8), bank=BANK)


def test_server_info_comes_back_whole(server: FakeServer, client: whence.Client) -> None:
    assert client.server_info() == make_server_info()
    changed = make_server_info(version="0.7.1", contract_revision=3)
    server.server_info = changed
    assert client.server_info() == changed
    assert not server.calls
    server.server_info = whence.PermissionDenied("not you")
    with pytest.raises(whence.PermissionDenied, match="not you"):
        client.server_info()
