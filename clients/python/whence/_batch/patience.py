"""Waiting for a service or a store that is away, but not for ever."""

from __future__ import annotations

import asyncio
import random
import time

from whence._errors import WhenceError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0


class Patience:
    """How long nothing has succeeded; what waits, waits longer each time.

    Parameters
    ----------
    limit_s
        How long to wait since the first failure after the last success, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None
        self.reason = ""
        """Why nothing goes on; empty while all is well."""

    def succeeded(self) -> None:
        """Something did."""
        self._since_s, self.reason = None, ""

    async def pause(self, error: WhenceError, attempt: int) -> None:
        """Wait before the next attempt; raises the error when patience is at its end."""
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s >= self._limit_s:
            raise error
        self.reason = error.message
        # Half of the pause is random: those who were refused together must not come back together.
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(attempt - 1, 16), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
        await asyncio.sleep(min((error.retry_after_s or 0.0) + pause_s, self._limit_s))
