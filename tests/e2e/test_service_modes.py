"""The other ways to run the service, and how it ends."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.conftest import RunningServer, Start
from tests.e2e.repository import BANK, PER_CLASS, held_out
from tests.e2e.test_service import ask, refused, what_if
from whence.v1 import explanation_service_pb2 as pb


@pytest.fixture(scope="module")
def server(start: Start, repository: Path) -> RunningServer:
    """Ray's own proxy, and engines in replicas of their own."""
    return start(repository, ingress_mode="proxy", placement="apart")


def test_calls_and_streams(server: RunningServer) -> None:
    with server.connected() as (stub, _):
        reply = stub.Explain(ask(held_out()[0], request_id="r-1"))
        assert (reply.request_id, reply.explanation.bank.reference) == ("r-1", BANK)
        requests = [pb.ExplainStreamRequest(request=ask(path, request_id=path.stem)) for path in held_out()]
        requests[2].request.bank = "m/l/none"
        requests[3].request.priority = pb.PRIORITY_BACKGROUND
        replies = list(stub.ExplainStream(iter(requests)))
    assert {reply.request_id for reply in replies} == {path.stem for path in held_out()}
    assert [reply.error.reason for reply in replies if reply.HasField("error")] == ["UNKNOWN_BANK"]


def test_interventions(server: RunningServer) -> None:
    with server.connected() as (stub, _):
        target = stub.Explain(ask(held_out()[0])).explanation.target.index
        scales = {target * PER_CLASS: 0.0, target * PER_CLASS + 1: 2.0}
        reply = stub.Intervene(what_if(held_out()[0], scales))
        assert (reply.request_id, reply.bank.reference, reply.target.index) == ("r-2", BANK, target)
        assert {score.index for score in reply.before} == {score.index for score in reply.after}
        # What the engine's replica refuses arrives typed too.
        other = {(target + 1) % 10 * PER_CLASS: 0.0}
        assert refused(stub.Intervene, what_if(held_out()[0], other))[1].reason == "UNSUPPORTED_OPTION"


def test_errors_are_typed(server: RunningServer) -> None:
    with server.connected() as (stub, channel):
        assert refused(stub.Explain, ask(held_out()[0], bank="m/l/none"))[0] == "NOT_FOUND"
        assert refused(stub.Explain, ask(held_out()[0], image=None))[1].reason == "INVALID_IMAGE"
        call: Any = channel.unary_unary("/whence.v1.ExplanationService/Explain")
        assert refused(call, b"\xff\xff\xff")[1].reason == "INVALID_INPUT"
        # What the engine's replica refuses arrives typed too.
        wanting = ask(held_out()[0])
        wanting.options.parts = True
        assert refused(stub.Explain, wanting)[0] == "INVALID_ARGUMENT"


def test_a_cancelled_call_leaves_the_next_alone(server: RunningServer) -> None:
    with server.connected() as (stub, _):
        call = stub.Explain.future(ask(held_out()[0]))
        call.cancel()
        assert stub.Explain(ask(held_out()[1]), timeout=30).explanation.concepts


def test_an_interrupted_server_ends_well_and_leaves_nothing(server: RunningServer) -> None:
    before = descendants(server.process.pid)
    assert len(before) > 3
    assert server.stop(signal.SIGINT) == 0
    assert [pid for pid in before if alive(pid)] == []
    with server.connected() as (stub, _), pytest.raises(grpc.RpcError):
        stub.ListModels(pb.ListModelsRequest(), timeout=2)
    assert "Traceback" not in server.log.read_text()


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
