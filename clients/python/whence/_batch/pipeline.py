"""Many images at a time, with bounded memory: read ahead, explained, written, committed chunk by chunk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from whence._batch.chunk import Chunk
from whence._batch.images import Images
from whence._batch.sources import Listed
from whence._errors import WhenceError

_AHEAD = 16
"""Images that are read ahead, beside as many as are in flight."""
_BYTES = 256 * 2**20
"""Of images in memory; a single larger one is taken alone."""
_UNKNOWN_BYTES = 2**20
"""What an object is taken for whose size is not known."""


class Pipeline:
    """Takes the images of chunks through the service.

    Parameters
    ----------
    commit
        What to do with a chunk whose last image has ended.
    ended
        Told of every image that ends, and whether it failed.
    """

    def __init__(
        self, images: Images, commit: Callable[[Chunk], Awaitable[None]], ended: Callable[[bool], None]
    ) -> None:
        self._images, self._commit, self._ended = images, commit, ended
        self._alive: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._failure: BaseException | None = None
        self._news = asyncio.Event()

    async def run(self, work: AsyncIterator[tuple[Chunk, Listed]]) -> None:
        """Take all images through; of chunks that were begun each is committed.

        Raises
        ------
        WhenceError
            What made going on useless; all that ran is cancelled.
        """
        try:
            async for chunk, item in work:
                size = _UNKNOWN_BYTES if item.size is None else item.size
                while not self._has_room(size):
                    await self._wait()
                self._bytes += size
                task = asyncio.create_task(self._image(chunk, item, size))
                self._alive.add(task)
                task.add_done_callback(self._forget)
            while self._alive:
                await self._wait()
            self._check()
        finally:
            for task in self._alive:
                task.cancel()
            await asyncio.gather(*self._alive, return_exceptions=True)

    def _has_room(self, size: int) -> bool:
        self._check()
        if len(self._alive) >= 2 * self._images.limiter.limit + _AHEAD:
            return False
        return self._bytes + size <= _BYTES or not self._bytes

    async def _wait(self) -> None:
        """Until an image has ended."""
        self._news.clear()
        self._check()
        await self._news.wait()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._alive.discard(task)
        self._news.set()
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()

    async def _image(self, chunk: Chunk, item: Listed, size: int) -> None:
        """Take one image from its key to its row."""
        try:
            failed = await self._end(chunk, item)
        finally:
            self._bytes -= size
        self._ended(failed)
        chunk.left -= 1
        if chunk.left == 0:
            await self._commit(chunk)

    async def _end(self, chunk: Chunk, item: Listed) -> bool:
        """Read and explain one image, and write its row; whether it failed."""
        content = await self._images.read(item)
        if isinstance(content, WhenceError):
            chunk.failed(item, content)
            return True
        # What is written is what was read, which may have changed since it was listed.
        read = item._replace(etag=content.etag, size=len(content.data))
        answer = await self._images.explain(content.data)
        if isinstance(answer, WhenceError):
            chunk.failed(read, answer)
            return True
        chunk.explained(read, answer)
        return False
