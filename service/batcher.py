"""A work-conserving batcher: the next batch forms when the worker is free, never by a timer.

Whenever the worker is free it takes all that waits with the same key, up to the batch limit, the key of the
longest-waiting item first. So a lone item never waits, and the batch grows with the load by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from concepts.errors import DeadlineExceeded, Overloaded, Unavailable, WhenceError

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
        Most items that wait, those being computed not counted.
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
        observer: Observer | None = None,
    ) -> None:
        self._run = run
        self._batch_limit = batch_limit
        self._queue_limit = queue_limit
        self._observer = observer
        self._waiting: dict[Key, dict[int, _Job[Item, Result]]] = {}
        self._length = 0
        self._numbers = itertools.count()
        self._pace = Pace()
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        """Return how many items wait."""
        return self._length

    @property
    def retry_after_s(self) -> float:
        """When there will be room again, judging by the recent rate."""
        return self._pace.wait_s(self._length)

    async def submit(self, key: Key, item: Item, *, deadline: float) -> Answer[Result]:
        """Have one item computed together with others of the same key.

        Raises
        ------
        Overloaded
            If the queue is full.
        DeadlineExceeded
            If the answer is not there by ``deadline``, or could not be.
        Unavailable
            If the batcher is closed.
        WhenceError
            Whatever ``run`` returned for this item.
        """
        self._admit(deadline)
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        job: _Job[Item, Result] = _Job(item, deadline, time.monotonic(), loop.create_future())
        self._waiting.setdefault(key, {})[number] = job
        self._resized(+1)
        self._wake.set()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await job.future
        except TimeoutError:
            raise _too_late() from None
        finally:
            self._discard(key, number)

    async def close(self) -> None:
        """Refuse what waits, let the running batch end, and stop."""
        self._closed = True
        for jobs in self._waiting.values():
            for job in jobs.values():
                _settle(job, _closing())
        self._waiting.clear()
        self._resized(-self._length)
        self._wake.set()
        if self._worker is not None:
            await self._worker

    def _admit(self, deadline: float) -> None:
        if self._closed:
            raise _closing()
        if deadline <= time.monotonic():
            raise _too_late()
        if self._length >= self._queue_limit:
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
        if not self._waiting:
            return None
        key = min(self._waiting, key=lambda each: next(iter(self._waiting[each])))
        in_time = time.monotonic() + self._pace.fastest_s(key)
        batch: list[_Job[Item, Result]] = []
        refused = False
        for number, job in list(self._waiting[key].items()):
            if len(batch) == self._batch_limit:
                break
            self._discard(key, number)
            if job.deadline < in_time:
                _settle(job, _too_late())
                refused = True
            elif not job.future.done():
                batch.append(job)
        if refused and not batch:
            self._pace.doubt(key)
        return key, batch

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

    def _discard(self, key: Key, number: int) -> None:
        """Forget a waiting item, if it still waits."""
        jobs = self._waiting.get(key)
        if jobs is None or jobs.pop(number, None) is None:
            return
        if not jobs:
            del self._waiting[key]
        self._resized(-1)

    def _resized(self, change: int) -> None:
        self._length += change
        if self._observer:
            self._observer.queue(self._length)


class Pace:
    """How fast work has been done lately."""

    def __init__(self) -> None:
        # By hash, not by key: a key may hold an engine, which must go when nothing else needs it.
        self._fastest_s: dict[int, float] = {}
        self._item_s = 0.0

    def note(self, key: Hashable, size: int, took_s: float) -> None:
        """Learn from one batch."""
        # The fastest recent batch, forgotten slowly: an item is refused only if even that would be too late.
        if len(self._fastest_s) > _KEYS_REMEMBERED:
            self._fastest_s.clear()
        number = hash(key)
        self._fastest_s[number] = min(took_s, self._fastest_s.get(number, took_s) * 1.2)
        self._item_s += 0.2 * (took_s / size - self._item_s) if self._item_s else took_s / size

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
