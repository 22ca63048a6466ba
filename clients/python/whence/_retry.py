"""What is tried again, and when; nothing here waits."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

from whence._errors import DeadlineExceeded, WhenceError

_SUCCESSES_PER_RETRY = 10


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


class RetryBudget:
    """How often all calls of a client together may be tried again.

    A retry takes one token, ten calls that succeed give one back. So a service in trouble is asked little more than it
    would be without retries, and not ``max_attempts`` times as often, by a client that makes many calls.

    Parameters
    ----------
    tokens
        How many there are at most, and at first.
    """

    def __init__(self, tokens: int) -> None:
        self._most = self._parts = tokens * _SUCCESSES_PER_RETRY
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take a token; False if there is none."""
        with self._lock:
            if self._parts < _SUCCESSES_PER_RETRY:
                return False
            self._parts -= _SUCCESSES_PER_RETRY
            return True

    def give_back(self) -> None:
        """Note that a call succeeded."""
        with self._lock:
            self._parts = min(self._parts + 1, self._most)


class Attempts:
    """The attempts at one call: how much time there is, and whether to try again."""

    def __init__(self, policy: RetryPolicy, budget: RetryBudget, timeout_s: float) -> None:
        self._policy = policy
        self._budget = budget
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._number = 1

    def remaining_s(self) -> float:
        """Time left, in seconds.

        Raises
        ------
        DeadlineExceeded
            If there is none.
        """
        remaining_s = self._deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceeded(f"No answer within {self._timeout_s:g} s.")
        return remaining_s

    def pause_s(self, error: WhenceError) -> float | None:
        """How long to wait before the next attempt, in seconds; None if the error is final."""
        pause_s = self._policy.pause_s(error, self._number, self._deadline_s - time.monotonic())
        if pause_s is None or not self._budget.take():
            return None
        self._number += 1
        return pause_s
