"""Who may call the service now."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from whence._batch.limiter import Limiter


class Gate:
    """Lets in as many as a limiter allows; or one, alone."""

    def __init__(self, limiter: Limiter) -> None:
        self.running = 0
        self._limiter = limiter
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._one_at_a_time = asyncio.Lock()
        self._closed = False
        self._empty = asyncio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Call beside others."""
        while self._closed or self.running >= self._limiter.limit:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                self._wake()  # the turn may have come with the cancellation
                raise
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self._empty.set()
            self._wake()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Call while nobody else does."""
        async with self._one_at_a_time:
            self._closed = True
            try:
                while self.running:
                    self._empty.clear()
                    await self._empty.wait()
                yield
            finally:
                self._closed = False
                self._wake()

    def _wake(self) -> None:
        if self._closed:
            return
        room = self._limiter.limit - self.running
        while room > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1
