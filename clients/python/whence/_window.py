"""Which of many images are on their way, and what became of them; nothing here waits."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass

from whence import _answers, _status
from whence._errors import DeadlineExceeded, WhenceError
from whence._explanation import Explanation
from whence._images import Source
from whence._requests import Question, new_request_id
from whence._retry import RetryBudget, RetryPolicy
from whence.v1 import explanation_service_pb2 as service_pb2


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
class Pending:
    """An image that has no outcome yet."""

    index: int
    source: Source
    request_id: str
    deadline_s: float
    attempt: int = 1
    resend_at_s: float | None = None
    """When to send it again; None while an answer is awaited."""

    def remaining_s(self) -> float:
        """Time left, in seconds; not less than none."""
        return max(self.deadline_s - time.monotonic(), 0.0)


class Window:
    """The images of one `explain_many` that have no outcome yet.

    Parameters
    ----------
    question
        What is asked about each image.
    policy, budget
        What is tried again.
    timeout_s
        How long an answer to each image is waited for, in seconds.
    size
        How many images may be pending, or answered and not yet taken.
    """

    def __init__(
        self, question: Question, *, policy: RetryPolicy, budget: RetryBudget, timeout_s: float, size: int
    ) -> None:
        self.question = question
        self.held = 0
        """Outcomes that exist and were not taken; with the pending images they fill the window."""
        self.orphans: deque[Pending] = deque()
        """What a stream that broke left unanswered: to be asked one by one."""
        self._policy = policy
        self._budget = budget
        self._timeout_s = timeout_s
        self._size = size
        self._pending: dict[str, Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def has_room(self) -> bool:
        """Whether another image may be taken."""
        return not self.orphans and len(self._pending) + self.held < self._size

    def add(self, index: int, source: Source) -> service_pb2.ExplainRequest:
        """Take an image; gives what to send."""
        item = Pending(index, source, new_request_id(), time.monotonic() + self._timeout_s)
        self._pending[item.request_id] = item
        return self._request(item)

    def due(self) -> list[service_pb2.ExplainRequest]:
        """What to send again now."""
        now_s = time.monotonic()
        items = [
            item
            for item in self._pending.values()
            if item.resend_at_s is not None and item.resend_at_s <= now_s < item.deadline_s
        ]
        for item in items:
            item.resend_at_s = None
        return [self._request(item) for item in items]

    def pause_s(self) -> float:
        """How long nothing need be done unless an answer comes, in seconds."""
        next_event_s = min(min(item.deadline_s, item.resend_at_s or math.inf) for item in self._pending.values())
        return max(next_event_s - time.monotonic(), 0.0)

    def settle(self, answer: service_pb2.ExplainStreamResponse) -> Outcome | None:
        """The outcome that an answer brings; None if it is late, or its image is tried again."""
        item = self._pending.get(answer.request_id)
        if item is None or item.resend_at_s is not None:
            return None
        if answer.WhichOneof("result") == "error":
            error = _status.from_failure(answer.error, answer.request_id)
            pause_s = self._policy.pause_s(error, item.attempt, item.remaining_s())
            # To be told when to come back is how a busy service paces a stream, whose window bounds what comes back
            # at a time; it takes nothing from the budget.
            if pause_s is not None and (error.retry_after_s is not None or self._budget.take()):
                item.attempt += 1
                item.resend_at_s = time.monotonic() + pause_s
                return None
            return self.close(item, error)
        self._budget.give_back()
        try:
            explanation = _answers.explanation(answer.explanation, answer.request_id, item.source)
        except WhenceError as error:
            return self.close(item, error)
        return self.close(item, explanation)

    def expire(self) -> list[Outcome]:
        """Give up on what was not answered in time."""
        now_s = time.monotonic()
        late = [item for item in self._pending.values() if item.deadline_s <= now_s]
        return [self.close(item, self.late(item)) for item in late]

    def orphan(self) -> None:
        """Note that no more answers will come to what was sent."""
        self.orphans.extend(item for item in self._pending.values() if item.resend_at_s is None)

    def late(self, item: Pending) -> DeadlineExceeded:
        """The error of an image that was not answered in time."""
        return DeadlineExceeded(f"No answer within {self._timeout_s:g} s.", request_id=item.request_id)

    def close(self, item: Pending, result: Explanation | WhenceError) -> Outcome:
        """Give an image its outcome."""
        del self._pending[item.request_id]
        if isinstance(result, WhenceError):
            return Outcome(item.index, error=result)
        return Outcome(item.index, result)

    def _request(self, item: Pending) -> service_pb2.ExplainRequest:
        return self.question.request(item.source, item.request_id, item.remaining_s())
