"""Answering a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.stream import answers


async def numbers(count: int, read: list[int]) -> AsyncIterator[int]:
    for number in range(count):
        read.append(number)
        yield number


async def test_every_request_is_answered_once_as_soon_as_it_is_done() -> None:
    async def answer(number: int) -> int:
        await asyncio.sleep(0.001 * (7 - number % 7))
        return 10 * number

    replies = [reply async for reply in answers(numbers(50, []), answer, in_flight=8)]
    assert sorted(replies) == [10 * number for number in range(50)]
    assert replies != sorted(replies)


async def test_no_more_is_read_than_may_be_in_flight() -> None:
    read: list[int] = []
    gate = asyncio.Event()

    async def answer(number: int) -> int:
        await gate.wait()
        return number

    stream = answers(numbers(50, read), answer, in_flight=5)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    assert len(read) == 5
    gate.set()
    await first
    await asyncio.sleep(0.01)
    # What is answered but not yet taken still has its place; a place is free again once the next answer is asked for.
    assert len(read) == 5
    await anext(stream)
    await asyncio.sleep(0.01)
    assert len(read) == 6
    assert len([reply async for reply in stream]) == 48


async def test_when_the_caller_leaves_the_work_is_cancelled() -> None:
    cancelled = []

    async def answer(number: int) -> int:
        if number == 0:
            return number
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    stream = answers(numbers(50, []), answer, in_flight=4)
    assert await anext(stream) == 0
    await asyncio.sleep(0.01)
    await stream.aclose()  # type: ignore[attr-defined]
    assert sorted(cancelled) == [1, 2, 3]


async def test_an_empty_stream_ends_and_a_broken_one_says_so() -> None:
    async def answer(number: int) -> int:
        return number

    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ConnectionError("gone")

    assert [reply async for reply in answers(numbers(0, []), answer, in_flight=2)] == []
    with pytest.raises(BaseExceptionGroup) as problem:  # noqa: F821 - the server needs Python 3.11
        async for _ in answers(broken(), answer, in_flight=2):
            pass
    assert problem.group_contains(ConnectionError)
