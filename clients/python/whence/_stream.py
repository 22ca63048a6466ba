"""Many images over one bidirectional stream: bounded, in any order on the wire, each answered exactly once."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from whence import _answers, _status
from whence._errors import DeadlineExceeded, WhenceError
from whence._explanation import Explanation
from whence._images import Source
from whence._requests import Question, new_request_id
from whence._retry import RetryPolicy
from whence.v1 import explanation_service_pb2 as service_pb2

if TYPE_CHECKING:
    from whence._images import ImageLike


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one image: an explanation or an error, never both."""

    index: int
    """Place of the image among those given, from 0."""
    explanation: Explanation | None = None
    error: WhenceError | None = None

    def result(self) -> Explanation:
        """The explanation; raises the error if there is none."""
        if self.explanation is None:
            raise self.error or WhenceError("The outcome is empty.")
        return self.explanation


@dataclass(slots=True)
class _Pending:
    """An image that has no outcome yet."""

    index: int
    source: Source
    deadline_s: float
    attempt: int = 1
    resend_at_s: float | None = None
    """When to send it again; None while an answer is awaited."""


class _Exchange:
    """One open stream. Its answers arrive in ``inbox``; None means that it ended."""

    def __init__(self, open_call: Callable[[Iterator[service_pb2.ExplainStreamRequest]], Any]) -> None:
        self.inbox: queue.SimpleQueue[service_pb2.ExplainStreamResponse | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[service_pb2.ExplainStreamRequest | None] = queue.SimpleQueue()
        self._call = open_call(iter(self._outbox.get, None))
        self._listener = threading.Thread(target=self._listen, name="whence-stream", daemon=True)
        self._listener.start()

    def send(self, request: service_pb2.ExplainRequest) -> None:
        self._outbox.put(service_pb2.ExplainStreamRequest(request=request))

    def close(self) -> None:
        self._outbox.put(None)
        self._call.cancel()
        self._listener.join(timeout=1.0)

    def _listen(self) -> None:
        try:
            for answer in self._call:
                self.inbox.put(answer)
        except grpc.RpcError:
            pass  # what it held is asked again one by one, which tells each image's own failure
        finally:
            self.inbox.put(None)


class Stream:
    """The pump between a caller's iterable and one stream at a time.

    All decisions are taken in the caller's thread; the only other thread moves answers into a queue.
    """

    def __init__(
        self,
        *,
        open_call: Callable[[Iterator[service_pb2.ExplainStreamRequest]], Any],
        read: Callable[[ImageLike], Source],
        alone: Callable[[Source, Question, float], Explanation],
        question: Question,
        policy: RetryPolicy,
        timeout_s: float,
        max_in_flight: int,
    ) -> None:
        self._open_call = open_call
        self._read = read
        self._alone = alone
        self._question = question
        self._policy = policy
        self._timeout_s = timeout_s
        self._max_in_flight = max_in_flight
        self._exchange: _Exchange | None = None
        self._pending: dict[str, _Pending] = {}
        self._held = 0
        """Outcomes that exist and were not taken; with the pending ones they fill the window."""

    def ordered(self, images: Iterable[ImageLike]) -> Generator[Outcome, None, None]:
        """Outcomes in the order of the images."""
        early: dict[int, Outcome] = {}
        following = 0
        with closing(self.as_answered(images)) as outcomes:
            for outcome in outcomes:
                early[outcome.index] = outcome
                self._held += 1
                while following in early:
                    self._held -= 1
                    yield early.pop(following)
                    following += 1

    def as_answered(self, images: Iterable[ImageLike]) -> Generator[Outcome, None, None]:
        """Outcomes as they come."""
        remaining = enumerate(images)
        exhausted = False
        try:
            while True:
                while not exhausted and len(self._pending) + self._held < self._max_in_flight:
                    item = next(remaining, None)
                    if item is None:
                        exhausted = True
                    elif (refused := self._take(*item)) is not None:
                        yield refused
                if not self._pending:
                    return
                yield from self._advance()
        finally:
            self._end_exchange()
            self._pending.clear()

    def _take(self, index: int, image: ImageLike) -> Outcome | None:
        """Send one image; an outcome if it cannot be sent."""
        try:
            source = self._read(image)
        except WhenceError as error:
            return Outcome(index, error=error)
        request_id = new_request_id()
        self._pending[request_id] = item = _Pending(index, source, time.monotonic() + self._timeout_s)
        self._send(request_id, item)
        return None

    def _send(self, request_id: str, item: _Pending) -> None:
        if self._exchange is None:
            self._exchange = _Exchange(self._open_call)
        item.resend_at_s = None
        remaining_s = max(item.deadline_s - time.monotonic(), 0.0)
        self._exchange.send(self._question.request(item.source, request_id, remaining_s))

    def _advance(self) -> Iterator[Outcome]:
        """Wait for the next thing to happen, and give the outcomes that follow from it."""
        now_s = time.monotonic()
        for request_id, item in self._pending.items():
            if item.resend_at_s is not None and item.resend_at_s <= now_s < item.deadline_s:
                self._send(request_id, item)
        next_event_s = min(min(item.deadline_s, item.resend_at_s or math.inf) for item in self._pending.values())
        pause_s = max(next_event_s - now_s, 0.0)
        if self._exchange is None:  # all wait to be sent again
            time.sleep(pause_s)
            yield from self._expire()
            return
        try:
            answer = self._exchange.inbox.get(timeout=pause_s)
        except queue.Empty:
            # Only now: what arrived in time counts, however late the caller asks for it.
            yield from self._expire()
            return
        if answer is None:
            yield from self._ask_alone()
        elif (outcome := self._settle(answer)) is not None:
            yield outcome

    def _settle(self, answer: service_pb2.ExplainStreamResponse) -> Outcome | None:
        """The outcome that an answer brings; None if it is late, or its image is tried again."""
        item = self._pending.get(answer.request_id)
        if item is None or item.resend_at_s is not None:
            return None
        if answer.WhichOneof("result") == "error":
            error = _status.from_failure(answer.error, answer.request_id)
            pause_s = self._policy.pause_s(error, item.attempt, item.deadline_s - time.monotonic())
            if pause_s is not None:
                item.attempt += 1
                item.resend_at_s = time.monotonic() + pause_s
                return None
            del self._pending[answer.request_id]
            return Outcome(item.index, error=error)
        del self._pending[answer.request_id]
        try:
            return Outcome(item.index, _answers.explanation(answer.explanation, answer.request_id, item.source))
        except WhenceError as error:
            return Outcome(item.index, error=error)

    def _expire(self) -> Iterator[Outcome]:
        """Give up on what was not answered in time."""
        now_s = time.monotonic()
        for request_id in [key for key, item in self._pending.items() if item.deadline_s <= now_s]:
            item = self._pending.pop(request_id)
            yield Outcome(item.index, error=_late(self._timeout_s, request_id))

    def _ask_alone(self) -> Iterator[Outcome]:
        """After a stream broke: ask one by one, so that an image that breaks streams fails by itself."""
        self._end_exchange()
        for request_id in [key for key, item in self._pending.items() if item.resend_at_s is None]:
            item = self._pending[request_id]
            remaining_s = item.deadline_s - time.monotonic()
            try:
                if remaining_s <= 0:
                    raise _late(self._timeout_s, request_id)
                outcome = Outcome(item.index, self._alone(item.source, self._question, remaining_s))
            except WhenceError as error:
                outcome = Outcome(item.index, error=error)
            del self._pending[request_id]
            yield outcome

    def _end_exchange(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None


def _late(timeout_s: float, request_id: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"No answer within {timeout_s:g} s.", request_id=request_id)
