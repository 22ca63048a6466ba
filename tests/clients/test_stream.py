"""Many images over one stream: bounded, in any order on the wire, each answered exactly once."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import whence
from tests.clients.blocking import Connect
from whence import _fake_answers
from whence.testing import FakeServer, make_explanation, serve
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

BANK = "fake/layer/bank"


def numbered(count: int) -> Iterator[NDArray[np.uint8]]:
    """Images whose first pixel is their number."""
    for number in range(count):
        yield np.full((2, 3, 3), number, np.uint8)


def echo(request: service_pb2.ExplainRequest) -> whence.Explanation:
    """An explanation that holds the number of its image."""
    return make_explanation(concept_count=1, runtime=f"image {request.image.raw.data[0]}")


def check_pairing(outcomes: Iterable[whence.Outcome]) -> list[int]:
    """Check that each outcome belongs to its image; gives the order."""
    order = []
    for outcome in outcomes:
        explanation = outcome.result()
        assert explanation.runtime == f"image {outcome.index}"
        assert explanation.image is not None
        assert explanation.image.pixels()[0, 0, 0] == outcome.index
        order.append(outcome.index)
    return order


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_every_image_gets_its_own_answer_in_order(count: int, connect: Connect) -> None:
    with FakeServer(echo, shuffle=True) as server, connect(server.address) as client:
        assert check_pairing(client.explain_many(numbered(count), bank=BANK, max_in_flight=8)) == list(range(count))
    assert len({call.request.request_id for call in server.calls}) == count
    assert all(call.method == "ExplainStream" for call in server.calls)


def test_answers_come_as_they_are_ready(connect: Connect) -> None:
    with FakeServer(echo, shuffle=True) as server, connect(server.address) as client:
        order = check_pairing(client.explain_many(numbered(60), bank=BANK, max_in_flight=16, ordered=False))
    assert sorted(order) == list(range(60))
    assert order != sorted(order)  # the server did answer out of order


class Holding(service_grpc.ExplanationServiceServicer):
    """Reads all it is sent, and answers only once nothing more comes, the newest first."""

    def __init__(self) -> None:
        self.most_waiting = 0

    def ExplainStream(  # noqa: N802
        self, request_iterator: Iterator[service_pb2.ExplainStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ExplainStreamResponse]:
        waiting: list[service_pb2.ExplainRequest] = []
        ended = threading.Event()

        def read() -> None:
            with contextlib.suppress(grpc.RpcError):
                for message in request_iterator:
                    waiting.append(message.request)  # noqa: PERF401  (to be seen while more come)
            ended.set()

        threading.Thread(target=read, daemon=True).start()
        while not ended.is_set():
            before = len(waiting)
            time.sleep(0.05)
            if waiting and len(waiting) == before:
                self.most_waiting = max(self.most_waiting, before)
                request = waiting.pop()
                answer = service_pb2.ExplainStreamResponse(request_id=request.request_id)
                answer.explanation.CopyFrom(_fake_answers.explanation(echo(request)))
                yield answer


@pytest.mark.parametrize("ordered", [True, False])
def test_no_more_than_allowed_are_in_flight(ordered: bool, connect: Connect) -> None:
    servicer = Holding()
    read = 0

    def counted() -> Iterator[NDArray[np.uint8]]:
        nonlocal read
        for image in numbered(30):
            read += 1
            yield image

    taken = 0
    with serve(servicer) as address, connect(address) as client:
        for outcome in client.explain_many(counted(), bank=BANK, max_in_flight=5, ordered=ordered):
            assert read - taken <= 5  # sent, or answered and not yet taken
            taken += 1
            assert outcome.error is None
    assert taken == 30
    assert servicer.most_waiting == 5  # and the stream is filled


def test_images_are_read_in_the_callers_thread_and_only_as_needed(connect: Connect) -> None:
    threads = set()

    def endless() -> Iterator[NDArray[np.uint8]]:
        for number in itertools.count():
            threads.add(threading.current_thread())
            yield np.full((2, 2, 3), number % 256, np.uint8)

    with FakeServer(echo) as server, connect(server.address) as client:
        outcomes = client.explain_many(endless(), bank=BANK, max_in_flight=4)
        assert not server.calls  # nothing before the first is asked for
        first = list(itertools.islice(outcomes, 10))
        outcomes.close()
    assert [outcome.index for outcome in first] == list(range(10))
    assert len(threads) == 1
    assert connect is not whence.Client or threads == {threading.current_thread()}
    assert not [thread for thread in threading.enumerate() if thread.name == "whence-stream"]


def test_an_error_of_the_callers_own_images_reaches_the_caller(server: FakeServer, client: whence.Client) -> None:
    def failing() -> Iterator[NDArray[np.uint8]]:
        yield from numbered(2)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(client.explain_many(failing(), bank=BANK))


def test_failures_are_outcomes_and_spare_the_others(connect: Connect) -> None:
    def picky(request: service_pb2.ExplainRequest) -> whence.Explanation:
        if request.image.raw.data[0] % 3 == 1:
            raise whence.InvalidArgument("odd one", reason="INVALID_IMAGE", metadata={"why": "test"})
        return echo(request)

    images: list[Any] = [*numbered(9), "/nowhere/absent.jpg", np.full((2, 2, 3), np.nan)]
    with FakeServer(picky, shuffle=True) as server, connect(server.address) as client:
        outcomes = list(client.explain_many(images, bank=BANK))
    assert [outcome.index for outcome in outcomes] == list(range(11))
    errors = {outcome.index: outcome.error for outcome in outcomes if outcome.error is not None}
    assert set(errors) == {1, 4, 7, 9, 10}
    assert {type(error) for error in errors.values()} == {whence.InvalidArgument}
    assert (errors[1].reason, errors[1].metadata) == ("INVALID_IMAGE", {"why": "test"})
    assert errors[9].reason == "UNREADABLE_FILE"
    check_pairing(outcome for outcome in outcomes if outcome.error is None)
    with pytest.raises(whence.InvalidArgument, match="odd one"):
        outcomes[1].result()


def test_a_busy_service_is_asked_again(server: FakeServer, client: whence.Client) -> None:
    server.explain = echo
    server.fail_next(whence.Overloaded("busy", retry_after_s=0.02), times=6)
    assert check_pairing(client.explain_many(numbered(10), bank=BANK)) == list(range(10))
    assert len(server.calls) == 16


def test_a_busy_service_takes_nothing_from_the_budget(server: FakeServer, connect: Connect) -> None:
    server.explain = echo
    server.fail_next(whence.Overloaded("busy", retry_after_s=0.01), times=60)
    with connect(server.address, retry_budget=1, max_attempts=10) as client:
        assert check_pairing(client.explain_many(numbered(40), bank=BANK)) == list(range(40))


def test_failures_of_a_service_take_from_the_budget(server: FakeServer, connect: Connect) -> None:
    server.fail_next(whence.Unavailable("down"), times=1000)
    with connect(server.address, retry_budget=5) as client:
        outcomes = list(client.explain_many(numbered(8), bank=BANK))
    assert [type(outcome.error) for outcome in outcomes] == [whence.Unavailable] * 8
    assert len(server.calls) == 8 + 5


def test_an_answer_does_not_wait_for_the_window_to_fill(connect: Connect) -> None:
    read = 0

    def slow() -> Iterator[NDArray[np.uint8]]:
        nonlocal read
        for image in numbered(100):
            read += 1
            time.sleep(0.05)
            yield image

    with FakeServer(echo) as server, connect(server.address) as client:
        outcomes = client.explain_many(slow(), bank=BANK, max_in_flight=100)
        next(outcomes)
        assert read < 50
        outcomes.close()


def test_a_service_that_stays_busy_is_not_asked_for_ever(server: FakeServer, client: whence.Client) -> None:
    server.fail_next(whence.Overloaded("busy", retry_after_s=0.01), times=1000)
    outcomes = list(client.explain_many(numbered(3), bank=BANK))
    assert [type(outcome.error) for outcome in outcomes] == [whence.Overloaded] * 3
    assert len(server.calls) == 3 * 5


class Breaking(service_grpc.ExplanationServiceServicer):
    """Ends each stream after a few answers; answers lone requests, but for one that it cannot stand."""

    def __init__(self, end: Callable[[grpc.ServicerContext], None], poison: int = -1) -> None:
        self.end = end
        self.poison = poison
        self.streams = 0
        self.alone = 0

    def ExplainStream(  # noqa: N802
        self, request_iterator: Iterator[service_pb2.ExplainStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ExplainStreamResponse]:
        self.streams += 1
        for message in itertools.islice(request_iterator, 5):
            request = message.request
            if request.image.raw.data[0] == self.poison:
                break
            answer = service_pb2.ExplainStreamResponse(request_id=request.request_id)
            answer.explanation.CopyFrom(_fake_answers.explanation(echo(request)))
            yield answer
        self.end(context)

    def Explain(  # noqa: N802
        self, request: service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> service_pb2.ExplainResponse:
        self.alone += 1
        if request.image.raw.data[0] == self.poison:
            context.abort(grpc.StatusCode.INTERNAL, "cannot stand it")
        explanation = _fake_answers.explanation(echo(request))
        return service_pb2.ExplainResponse(request_id=request.request_id, explanation=explanation)


@pytest.mark.parametrize(
    "end",
    [
        lambda context: None,
        lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "restarting"),
        lambda context: context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream is too old"),
    ],
    ids=["closed", "unavailable", "too old"],
)
def test_a_stream_that_breaks_loses_nothing(end: Callable[[grpc.ServicerContext], None], connect: Connect) -> None:
    servicer = Breaking(end)
    with serve(servicer) as address, connect(address) as client:
        assert check_pairing(client.explain_many(numbered(40), bank=BANK, max_in_flight=8)) == list(range(40))
    assert servicer.streams > 1


def test_an_image_that_breaks_streams_fails_by_itself(connect: Connect) -> None:
    servicer = Breaking(lambda context: context.abort(grpc.StatusCode.INTERNAL, "crash"), poison=7)
    with serve(servicer) as address, connect(address) as client:
        outcomes = list(client.explain_many(numbered(20), bank=BANK, max_in_flight=6))
    assert [outcome.index for outcome in outcomes if outcome.error is not None] == [7]
    assert isinstance(outcomes[7].error, whence.InternalError)
    check_pairing(outcome for outcome in outcomes if outcome.error is None)


def test_a_service_that_cannot_be_reached(connect: Connect) -> None:
    with connect("localhost:1", max_attempts=2) as client:
        outcomes = list(client.explain_many(numbered(3), bank=BANK))
    assert [type(outcome.error) for outcome in outcomes] == [whence.Unavailable] * 3


def test_a_silent_service_is_not_waited_for(connect: Connect) -> None:
    release = threading.Event()

    def stuck(request: service_pb2.ExplainRequest) -> whence.Explanation:
        if request.image.raw.data[0] == 1:
            release.wait(30)
        return echo(request)

    with FakeServer(stuck) as server, connect(server.address) as client:
        outcomes = list(client.explain_many(numbered(2), bank=BANK, timeout_s=0.5))
        release.set()
    assert outcomes[0].error is None
    assert isinstance(outcomes[1].error, whence.DeadlineExceeded)
    assert server.calls[0].request.deadline.ToTimedelta().total_seconds() <= 0.5


def test_a_slow_caller_loses_no_answers(connect: Connect) -> None:
    with FakeServer(echo) as server, connect(server.address) as client:
        outcomes = client.explain_many(numbered(4), bank=BANK, timeout_s=0.5, ordered=False)
        first = next(outcomes)
        time.sleep(1.0)  # beyond the others' deadlines; their answers are here
        assert check_pairing([first, *outcomes]) == [0, 1, 2, 3]


@pytest.mark.parametrize("images", ["photo.jpg", b"bytes"])
def test_one_image_is_not_many(images: Any, client: whence.Client) -> None:
    with pytest.raises(whence.InvalidArgument, match="holds many"):
        client.explain_many(images, bank=BANK)
