"""Values that are costly to get, fetched once for all who ask at the same time."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(eq=False, slots=True)
class _Entry(Generic[Value]):
    task: asyncio.Task[Value]
    expires: float


class Memo(Generic[Key, Value]):
    """A least-recently-used store in front of an asynchronous function; belongs to one event loop.

    A caller that gives up does not disturb others that wait for the same value.

    Parameters
    ----------
    fetch
        Gets the value of a key.
    limit
        Most values kept.
    keep_s
        How long a value is kept, counted from when it was asked for, in seconds.
    keep_failure_s
        How long a failure is kept, so that a broken thing is not tried anew by every caller, in seconds.
    """

    def __init__(
        self,
        fetch: Callable[[Key], Awaitable[Value]],
        *,
        limit: int,
        keep_s: float = math.inf,
        keep_failure_s: float = 0.0,
    ) -> None:
        self._fetch = fetch
        self._limit = limit
        self._keep_s = keep_s
        self._keep_failure_s = keep_failure_s
        self._entries: OrderedDict[Key, _Entry[Value]] = OrderedDict()

    async def get(self, key: Key) -> Value:
        """Return the value of a key, or raise what fetching it raised."""
        now = time.monotonic()
        entry = self._entries.get(key)
        if entry is None or now > entry.expires:
            entry = _Entry(asyncio.ensure_future(self._fetched(key)), now + self._keep_s)
            self._entries[key] = entry
            entry.task.add_done_callback(lambda task: self._note_failure(entry, task))
        self._entries.move_to_end(key)
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)
        return await asyncio.shield(entry.task)

    async def _fetched(self, key: Key) -> Value:
        return await self._fetch(key)

    def _note_failure(self, entry: _Entry[Value], task: asyncio.Task[Value]) -> None:
        if task.cancelled() or task.exception() is not None:
            entry.expires = time.monotonic() + self._keep_failure_s
