"""Answers for a stream of requests, as they are done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

Request = TypeVar("Request")
Reply = TypeVar("Reply")

_END: Final = object()


async def answers(
    requests: AsyncIterator[Request], answer: Callable[[Request], Awaitable[Reply]], *, in_flight: int
) -> AsyncIterator[Reply]:
    """Yield the answer to each request as soon as it is there, in whatever order.

    Parameters
    ----------
    requests
        Read only while fewer than ``in_flight`` are unanswered: the rest stays with the caller.
    answer
        Answers one request; must not raise, a failure is an answer too.
    in_flight
        Most requests read and not yet answered.
    """
    done: asyncio.Queue[object] = asyncio.Queue()
    places = asyncio.Semaphore(in_flight)

    async def work(request: Request) -> None:
        done.put_nowait(await answer(request))

    async def read() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await places.acquire()
                async for request in requests:
                    group.create_task(work(request))
                    await places.acquire()
        finally:
            done.put_nowait(_END)

    reader = asyncio.create_task(read())
    try:
        while (reply := await done.get()) is not _END:
            yield reply  # type: ignore[misc]  # only `work` and the end put something there
            places.release()
        await reader
    finally:
        # The caller is gone, or all is done: what is still being worked on is for nobody.
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
