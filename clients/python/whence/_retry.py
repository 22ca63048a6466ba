"""What is tried again, and when."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Protocol, TypeVar

from whence._errors import DeadlineExceeded, WhenceError

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential pauses with jitter, capped, never past the deadline.

    Every call of the contract only reads, so each may be repeated; what decides is whether the failure may pass.
    """

    max_attempts: int = 5
    """Attempts altogether, the first included."""
    first_pause_s: float = 0.1
    """Doubles with every attempt."""
    longest_pause_s: float = 5.0

    def pause_s(self, error: WhenceError, attempt: int, remaining_s: float) -> float | None:
        """How long to wait before trying again, in seconds; None if the error is final.

        Parameters
        ----------
        error
            What the last attempt ended with.
        attempt
            Number of that attempt; the first is 1.
        remaining_s
            Time left until the deadline, in seconds.
        """
        if not error.retryable or attempt >= self.max_attempts:
            return None
        backoff_s = min(self.first_pause_s * 2 ** (attempt - 1), self.longest_pause_s)
        # Half of the pause is random: callers that were refused together must not come back together.
        pause_s = (error.retry_after_s or 0.0) + backoff_s * random.uniform(0.5, 1.0)
        return pause_s if pause_s < remaining_s else None


class Attempt(Protocol[T]):
    """One try of a call."""

    def __call__(self, remaining_s: float) -> T: ...


def run(attempt_call: Attempt[T], policy: RetryPolicy, timeout_s: float) -> T:
    """Call until there is an answer, a final error, or no time left.

    Raises
    ------
    WhenceError
        What the last attempt ended with.
    """
    deadline_s = time.monotonic() + timeout_s
    attempt = 1
    while True:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceeded(f"No answer within {timeout_s:g} s.")
        try:
            return attempt_call(remaining_s)
        except WhenceError as error:
            pause_s = policy.pause_s(error, attempt, deadline_s - time.monotonic())
            if pause_s is None:
                raise
        time.sleep(pause_s)
        attempt += 1
