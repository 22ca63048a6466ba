"""One worker's run over the chunks of a plan that are its share."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from whence._batch import commits, plan
from whence._batch.chunk import Chunk
from whence._batch.images import Images
from whence._batch.patient_output import PatientOutput
from whence._batch.pipeline import Pipeline
from whence._batch.plan import Plan
from whence._batch.planning import Shard, fetch_keys
from whence._batch.reader import read_table
from whence._batch.records import Progress
from whence._batch.sources import Listed
from whence._errors import NotFound

_REPORT_EVERY_S = 0.25
_RATE_OVER_S = 30.0
"""Over how long the rate is taken, in seconds."""


@dataclass
class Tally:
    """How far a worker is."""

    total: int
    finished: int = 0
    """Images that have ended, before this run, too."""
    finished_now: int = 0
    failed_now: int = 0


class Worker:
    """Does what is left of a plan, or of a shard's share of it.

    Parameters
    ----------
    folder
        Of this machine, for files until they are committed.
    progress
        Told a few times a second how far it is.
    """

    def __init__(
        self,
        output: PatientOutput,
        images: Images,
        todo: Plan,
        shard: Shard,
        folder: Path,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._output, self._images, self._plan, self._shard = output, images, todo, shard
        self._folder, self._progress = folder, progress
        self._name = uuid.uuid4().hex[:12]
        self._done = commits.Done()
        self._recent: deque[tuple[float, int]] = deque()
        self.tally = Tally(total=sum(size for chunk, size in enumerate(todo.sizes) if shard.has(chunk)))

    async def run(self) -> None:
        """Do it; of chunks that others do at the same time each counts once."""
        self._done = await commits.done(self._output)
        pipeline = Pipeline(self._images, self._commit, self._count)
        tasks = [asyncio.create_task(work) for work in (pipeline.run(self._work()), self._report_often())]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()  # reporting ends only by what the caller's function raises, which ends the run
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._report()

    async def _work(self) -> AsyncIterator[tuple[Chunk, Listed]]:
        """Images that are left, chunk by chunk.

        The order is another one in each run, so that runs on one output share the work; and so is that of a chunk's
        images, of which neighbours are often alike.
        """
        keys = await fetch_keys(self._output, self._plan, self._folder)
        blocks = list(range(plan.block_count(self._plan)))
        random.shuffle(blocks)
        for block in blocks:
            chunks = list((await asyncio.to_thread(plan.read_keys, keys, self._plan, block)).items())
            random.shuffle(chunks)
            for number, items in chunks:
                if not self._shard.has(number):
                    continue
                if await self._is_done(number):
                    self.tally.finished += len(items)
                    continue
                chunk = Chunk(number, self._plan.revisions[number], self._folder, self._name)
                left = await self._keep(chunk, items)
                self.tally.finished += len(items) - len(left)
                random.shuffle(left)
                chunk.left = len(left)
                if not left:
                    await self._commit(chunk)
                for item in left:
                    yield chunk, item

    async def _is_done(self, number: int) -> bool:
        """Whether a chunk is done, perhaps by another run since this one began."""
        revision = self._plan.revisions[number]
        return self._done[number] >= revision or await commits.exists(self._output, number, revision)

    async def _keep(self, chunk: Chunk, items: list[Listed]) -> list[Listed]:
        """Copy the rows of the revision before whose objects are as they were; return what has to be done."""
        while (base := self._done[chunk.number]) > 0:
            try:
                return await self._copy(chunk, base, items)
            except NotFound:  # a later revision took the place of that one
                self._done = await commits.done(self._output)
                if self._done[chunk.number] == base:
                    raise
        return items

    async def _copy(self, chunk: Chunk, base: int, items: list[Listed]) -> list[Listed]:
        commit = commits.decode(await self._output.get(commits.done_name(chunk.number, base)))
        tables = {name: await read_table(self._output, commit, name) for name in commits.TABLES}
        wanted = {item.key: item.etag for item in items}
        # Rows made after the listing stay, though an object may have been another one by then than the one listed.
        of_this_listing = base >= self._plan.listing
        kept: set[str] = set()
        for name, rows in tables.items():
            if rows is None:
                continue
            etags = zip(rows["key"].to_pylist(), rows["etag"].to_pylist(), strict=True)
            same = [key in wanted and (of_this_listing or wanted[key] == etag) for key, etag in etags]
            if name == "failures" and chunk.number in self._plan.retries:
                same = [old and not again for old, again in zip(same, rows["retryable"].to_pylist(), strict=True)]
            unchanged = rows.filter(same)
            chunk.keep(name, unchanged)
            kept.update(unchanged["key"].to_pylist())
        return [item for item in items if item.key not in kept]

    async def _commit(self, chunk: Chunk) -> None:
        if await chunk.commit(self._output) is not None:
            self._done.note(chunk.number, chunk.revision)

    def _count(self, failed: bool) -> None:
        self.tally.finished += 1
        self.tally.finished_now += 1
        self.tally.failed_now += failed

    async def _report_often(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(_REPORT_EVERY_S)

    def _report(self) -> None:
        if self._progress is None:
            return
        now_s, tally = time.monotonic(), self.tally
        self._recent.append((now_s, tally.finished_now))
        while now_s - self._recent[0][0] > _RATE_OVER_S:
            self._recent.popleft()
        began_s, before = self._recent[0]
        rate = (tally.finished_now - before) / (now_s - began_s) if now_s > began_s else 0.0
        self._progress(
            Progress(
                total=tally.total,
                finished=tally.finished,
                failed=tally.failed_now,
                in_flight=self._images.gate.running,
                limit=self._images.limiter.limit,
                rate=rate,
                remaining_s=(tally.total - tally.finished) / rate if rate else None,
                waiting=self._images.waiting or self._output.waiting,
            )
        )
