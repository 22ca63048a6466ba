"""A work-conserving batcher: the next batch forms when the worker is free, never by a timer.

Whenever the worker is free it takes all that waits with the same key, up to the batch limit, the key of the
longest-waiting item first. So a lone item never waits, and the batch grows with the load by itself.

Interactive items come before background ones, but for one batch in `TURNS`, so that none waits for ever. The two are
never in one batch, and one of background items is small enough not to keep interactive ones waiting for long.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from concepts.errors import DeadlineExceeded, Overloaded, Unavailable, WhenceError
from service.priority import PRIORITIES, Priority, is_full

TURNS = 8
"""While background items wait, one batch in so many is theirs, however many interactive ones wait."""

QUIET_S = 10.0
"""When there was no interactive item for so long, batches of background items may take `LEISURE` times as long: larger
ones are faster altogether."""
LEISURE = 4

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
_Key = TypeVar("_Key", bound=Hashable, contravariant=True)
_Item = TypeVar("_Item", contravariant=True)
_Result = TypeVar("_Result", covariant=True)

_log = logging.getLogger(__name__)


class Run(Protocol[_Key, _Item, _Result]):
    """Computes one batch: one result, or one error, for each item in order. It is never run twice at a time."""

    def __call__(self, key: _Key, items: Sequence[_Item], /) -> Awaitable[Sequence[_Result | WhenceError]]: ...


class Answer(NamedTuple, Generic[Result]):
    """What came of one item."""

    result: Result
    waited_s: float
    """From submission until its batch started."""


class Observer(Protocol):
    """Told what the batcher does, for metrics."""

    def batch(self, size: int) -> None:
        """Say that a batch of so many items starts."""

    def queue(self, length: int) -> None:
        """Say that so many items wait."""


@dataclass(eq=False, slots=True)
class _Job(Generic[Item, Result]):
    """One waiting item."""

    item: Item
    deadline: float
    submitted: float
    future: asyncio.Future[Answer[Result]]


class _Queue(Generic[Key, Item, Result]):
    """Waiting items, by key and in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: dict[Key, dict[int, _Job[Item, Result]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, key: Key, number: int, job: _Job[Item, Result]) -> None:
        """Put in an item; numbers grow."""
        self._jobs.setdefault(key, {})[number] = job
        self._length += 1

    def discard(self, key: Key, number: int) -> bool:
        """Take out an item, and say whether it was still there."""
        jobs = self._jobs.get(key)
        if jobs is None or jobs.pop(number, None) is None:
            return False
        if not jobs:
            del self._jobs[key]
        self._length -= 1
        return True

    def oldest(self) -> tuple[Key, list[tuple[int, _Job[Item, Result]]]]:
        """Return the key of the item that waits longest, and all that wait with it."""
        key = min(self._jobs, key=lambda each: next(iter(self._jobs[each])))
        return key, list(self._jobs[key].items())

    def clear(self) -> list[_Job[Item, Result]]:
        """Take out everything."""
        jobs = [job for group in self._jobs.values() for job in group.values()]
        self._jobs.clear()
        self._length = 0
        return jobs


class Batcher(Generic[Key, Item, Result]):
    """Groups items with equal keys into batches; belongs to the event loop that it is first used on.

    Times are seconds of ``time.monotonic``.

    Parameters
    ----------
    run
        Computes a batch.
    batch_limit
        Most items in a batch.
    queue_limit
        Most items that wait, those being computed not counted; see `is_full` for background items.
    background_batch_s
        How long a batch of background items may take, judging by the recent ones of its key: about the longest that
        an interactive item waits for them. Without interactive items, see `QUIET_S`.
    observer
        Told of batches and queue lengths.

    Notes
    -----
    - An error that ``run`` returns concerns its item alone. If ``run`` raises, its items are computed one by one, so
      that only the culprit fails.
    - An item whose caller is gone is dropped before it is computed; its batch mates do not notice.
    - An item that cannot be answered in time, judging by how long recent batches took, is refused, not computed; a
      caller never waits beyond its deadline.
    """

    def __init__(
        self,
        run: Run[Key, Item, Result],
        *,
        batch_limit: int,
        queue_limit: int,
        background_batch_s: float = 0.25,
        observer: Observer | None = None,
    ) -> None:
        self._run = run
        self._batch_limit = batch_limit
        self._queue_limit = queue_limit
        self._background_batch_s = background_batch_s
        self._observer = observer
        self._queues: dict[Priority, _Queue[Key, Item, Result]] = {priority: _Queue() for priority in PRIORITIES}
        self._passed_over = 0
        self._interactive_at = -math.inf
        self._numbers = itertools.count()
        self._pace = Pace()
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        """Return how many items wait."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def retry_after_s(self) -> float:
        """When there will be room again, judging by the recent rate."""
        return self._pace.wait_s(len(self))

    async def submit(
        self, key: Key, item: Item, *, deadline: float, priority: Priority = "interactive"
    ) -> Answer[Result]:
        """Have one item computed together with others of the same key.

        Raises
        ------
        Overloaded
            If the queue has no room for this priority.
        DeadlineExceeded
            If the answer is not there by ``deadline``, or could not be.
        Unavailable
            If the batcher is closed.
        WhenceError
            Whatever ``run`` returned for this item.
        """
        self._admit(deadline, priority)
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        job: _Job[Item, Result] = _Job(item, deadline, time.monotonic(), loop.create_future())
        queue = self._queues[priority]
        queue.add(key, number, job)
        if priority == "interactive":
            self._interactive_at = job.submitted
        self._resized()
        self._wake.set()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await job.future
        except TimeoutError:
            raise _too_late() from None
        finally:
            if queue.discard(key, number):
                self._resized()

    async def close(self) -> None:
        """Refuse what waits, let the running batch end, and stop."""
        self._closed = True
        for queue in self._queues.values():
            for job in queue.clear():
                _settle(job, _closing())
        self._resized()
        self._wake.set()
        if self._worker is not None:
            await self._worker

    def _admit(self, deadline: float, priority: Priority) -> None:
        if self._closed:
            raise _closing()
        if deadline <= time.monotonic():
            raise _too_late()
        if is_full(priority, {each: len(queue) for each, queue in self._queues.items()}, self._queue_limit):
            raise Overloaded(
                "The server has as much work as it accepts; try again later.",
                retry_after_s=self.retry_after_s,
                queue_limit=self._queue_limit,
            )
        if self._worker is None:
            # Started by the first item, for the event loop that it belongs to.
            self._worker = asyncio.get_running_loop().create_task(self._work(), name="batcher")

    async def _work(self) -> None:
        while not self._closed:
            batch = self._take()
            if batch is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            key, jobs = batch
            if jobs:
                await self._compute(key, jobs)

    def _take(self) -> tuple[Key, list[_Job[Item, Result]]] | None:
        """Remove and return the next batch, without what would come too late; None if nothing waits."""
        if not len(self):
            return None
        priority = self._turn()
        queue = self._queues[priority]
        key, jobs = queue.oldest()
        limit = self._batch_limit
        if priority == "background":
            quiet = time.monotonic() - self._interactive_at > QUIET_S
            allowed_s = self._background_batch_s * (LEISURE if quiet else 1)
            limit = max(1, min(limit, self._pace.items_within(key, allowed_s)))
        in_time = time.monotonic() + self._pace.fastest_s(key)
        batch: list[_Job[Item, Result]] = []
        refused = False
        for number, job in jobs:
            if len(batch) == limit:
                break
            queue.discard(key, number)
            if job.deadline < in_time:
                _settle(job, _too_late())
                refused = True
            elif not job.future.done():
                batch.append(job)
        self._resized()
        if refused and not batch:
            self._pace.doubt(key)
        return key, batch

    def _turn(self) -> Priority:
        """Return whose batch is next; something waits."""
        interactive, background = (len(self._queues[priority]) for priority in PRIORITIES)
        if not interactive or (background and self._passed_over >= TURNS - 1):
            self._passed_over = 0
            return "background"
        self._passed_over = self._passed_over + 1 if background else 0
        return "interactive"

    async def _compute(self, key: Key, jobs: list[_Job[Item, Result]]) -> None:
        started = time.monotonic()
        if self._observer:
            self._observer.batch(len(jobs))
        try:
            results = await self._run(key, [job.item for job in jobs])
            if len(results) != len(jobs):
                raise RuntimeError(f"{len(jobs)} items gave {len(results)} results")
        except Exception as error:  # noqa: BLE001 - whatever it is, it must reach the callers and not end the worker
            await self._isolate(key, jobs, error)
            return
        self._pace.note(key, len(jobs), time.monotonic() - started)
        for job, result in zip(jobs, results, strict=True):
            _settle(job, result if isinstance(result, WhenceError) else Answer(result, started - job.submitted))

    async def _isolate(self, key: Key, jobs: list[_Job[Item, Result]], error: Exception) -> None:
        """Give the error to the item that caused it, by computing each one alone."""
        if len(jobs) == 1:
            _settle(jobs[0], error)
            return
        _log.warning("a batch of %d failed (%r): computing its items one by one", len(jobs), error)
        for job in jobs:
            if not job.future.done():
                await self._compute(key, [job])

    def _resized(self) -> None:
        if self._observer:
            self._observer.queue(len(self))


class Pace:
    """How fast work has been done lately."""

    def __init__(self) -> None:
        # By hash, not by key: a key may hold an engine, which must go when nothing else needs it.
        self._fastest_s: dict[int, float] = {}
        self._items_s: dict[int, float] = {}
        self._item_s = 0.0

    def note(self, key: Hashable, size: int, took_s: float) -> None:
        """Learn from one batch."""
        if len(self._fastest_s) > _KEYS_REMEMBERED:
            self._fastest_s.clear()
            self._items_s.clear()
        number = hash(key)
        # The fastest recent batch, forgotten slowly: an item is refused only if even that would be too late.
        self._fastest_s[number] = min(took_s, self._fastest_s.get(number, took_s) * 1.2)
        self._items_s[number] = _mixed(self._items_s.get(number, 0.0), took_s / size)
        self._item_s = _mixed(self._item_s, took_s / size)

    def items_within(self, key: Hashable, seconds: float) -> int:
        """Return how many items of a key are done in so many seconds; zero where nothing is known."""
        item_s = self._items_s.get(hash(key), 0.0)
        return int(seconds / item_s) if item_s else 0

    def fastest_s(self, key: Hashable) -> float:
        """Return how long a batch takes at best; zero where nothing is known."""
        return self._fastest_s.get(hash(key), 0.0)

    def doubt(self, key: Hashable) -> None:
        """Trust the figure of this key less, because nothing was computed on its account.

        Without that, one slow batch would have every item with a short deadline refused for ever.
        """
        self._fastest_s[hash(key)] = 0.9 * self.fastest_s(key)

    def wait_s(self, length: int) -> float:
        """Return how long so many items take, between 0.05 s and a minute."""
        return min(max(length * self._item_s, 0.05), 60.0)


_KEYS_REMEMBERED = 1000


def _mixed(known: float, new: float) -> float:
    """Follow a figure that varies; zero is not known yet."""
    return known + 0.2 * (new - known) if known else new


def _settle(job: _Job[Item, Result], outcome: Answer[Result] | Exception) -> None:
    """Answer a caller, unless it is gone."""
    if job.future.done():
        return
    if isinstance(outcome, Exception):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "The answer could not be given before the deadline; allow more time or try when it is quieter."
    )


def _closing() -> Unavailable:
    return Unavailable("The server is stopping; try again in a moment.", retry_after_s=1.0)
