"""The store in front of slow functions."""

from __future__ import annotations

import asyncio

import pytest

from service.memo import Memo


class Source:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails = False

    async def __call__(self, key: str) -> str:
        self.asked.append(key)
        await asyncio.sleep(0.01)
        if self.fails:
            raise KeyError(key)
        return key.upper()


async def test_all_who_ask_at_once_share_one_fetch() -> None:
    source = Source()
    memo = Memo(source, limit=10)
    assert await asyncio.gather(*[memo.get("a") for _ in range(5)]) == ["A"] * 5
    assert await memo.get("a") == "A"
    assert source.asked == ["a"]


async def test_one_who_gives_up_does_not_disturb_the_others() -> None:
    source = Source()
    memo = Memo(source, limit=10)
    first = asyncio.create_task(memo.get("a"))
    await asyncio.sleep(0)
    second = asyncio.create_task(memo.get("a"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == "A"
    assert source.asked == ["a"]


async def test_values_expire_and_the_least_recently_used_goes_first() -> None:
    source = Source()
    memo = Memo(source, limit=2, keep_s=10)
    for key in "abacab":  # b is dropped when c comes, c when b comes back
        await memo.get(key)
    assert source.asked == ["a", "b", "c", "b"]
    brief = Memo(source, limit=2, keep_s=0.0)
    source.asked.clear()
    await brief.get("a")
    await asyncio.sleep(0.001)
    await brief.get("a")
    assert source.asked == ["a", "a"]


async def test_a_failure_is_kept_briefly_and_then_tried_again() -> None:
    source = Source()
    memo = Memo(source, limit=2, keep_failure_s=0.05)
    source.fails = True
    for _ in range(3):
        with pytest.raises(KeyError):
            await memo.get("a")
    assert source.asked == ["a"]
    source.fails = False
    await asyncio.sleep(0.06)
    assert await memo.get("a") == "A"
