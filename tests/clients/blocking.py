"""`AsyncClient` with the face of `Client`, so that one suite says what both do."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import whence

T = TypeVar("T")

Connect = Callable[..., whence.Client]


class Blocking:
    """An asynchronous client, driven from other threads than its loop's."""

    def __init__(self, run: Callable[[Coroutine[Any, Any, Any]], Any], *args: Any, **options: Any) -> None:
        self._client = whence.AsyncClient(*args, **options)
        self._run = run

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **options: Any) -> Any:
            answer = method(*args, **options)
            return self._run(answer) if inspect.iscoroutine(answer) else self._iterate(answer)

        return call

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._client.close())

    def _iterate(self, outcomes: AsyncGenerator[T, None]) -> Iterator[T]:
        async def following() -> T | None:
            return await anext(outcomes, None)

        try:
            while (outcome := self._run(following())) is not None:
                yield outcome
        finally:
            self._run(close(outcomes))


async def close(outcomes: AsyncGenerator[Any, None]) -> None:
    """Close a generator, in its loop."""
    await outcomes.aclose()


async def left_tasks() -> set[asyncio.Task[Any]]:
    """The loop's tasks but this one, once those of gRPC had time to hear that their calls were cancelled."""
    for _ in range(200):
        left = asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}
        if not left:
            break
        await asyncio.sleep(0.05)
    return left


@contextmanager
def blocking_clients() -> Iterator[Connect]:
    """Makes clients in a loop of their own, and checks at the end that they left no task in it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    try:
        yield cast(Connect, lambda *args, **options: Blocking(run, *args, **options))
        leaked = run(left_tasks())
    finally:
        run(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert not leaked
