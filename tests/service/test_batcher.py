"""Laws of the batcher, with a worker that records what it is given."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from concepts.errors import DeadlineExceeded, InvalidImage, NumericalFailure, Overloaded, Unavailable, WhenceError
from service.batcher import LEISURE, TURNS, Batcher, Pace
from service.priority import PRIORITIES, background_limit, is_full

Items = Sequence[Any]


class Worker:
    """Doubles numbers, in batches that it remembers; works only while the gate is open."""

    def __init__(self, result: Callable[[Any], Any] = lambda item: 2 * item, took_s: float = 0.0) -> None:
        self.batches: list[tuple[Any, list[Any]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = 0
        self._result = result
        self._took_s = took_s

    async def __call__(self, key: Any, items: Items) -> list[Any]:
        assert not self.running, "two batches at a time"
        self.running += 1
        self.batches.append((key, list(items)))
        try:
            await self.gate.wait()
            await asyncio.sleep(self._took_s)
            return [self._result(item) for item in items]
        finally:
            self.running -= 1


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def make(
    run: Callable[[Any, Items], Awaitable[Any]], batch_limit: int = 4, queue_limit: int = 100
) -> Batcher[Any, Any, Any]:
    return Batcher(run, batch_limit=batch_limit, queue_limit=queue_limit, background_batch_s=1e3)


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_lone_item_is_computed_at_once_and_alone() -> None:
    worker = Worker()
    answer = await make(worker).submit("a", 21, deadline=soon())
    assert answer.result == 42
    assert answer.waited_s >= 0
    assert worker.batches == [("a", [21])]


async def test_what_waits_while_the_worker_is_busy_is_computed_together_by_key_oldest_first() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker, batch_limit=3)
    first = asyncio.create_task(batcher.submit("a", 0, deadline=soon()))
    await settle()
    keys = ["b", "a", "b", "b", "a", "b"]
    later = [asyncio.create_task(batcher.submit(key, n, deadline=soon())) for n, key in enumerate(keys, 1)]
    await settle()
    assert len(batcher) == 6
    worker.gate.set()
    results = [answer.result for answer in await asyncio.gather(first, *later)]
    assert results == [0, 2, 4, 6, 8, 10, 12]
    # "b" waits longest; then its rest is younger than "a".
    assert worker.batches == [("a", [0]), ("b", [1, 3, 4]), ("a", [2, 5]), ("b", [6])]
    assert len(batcher) == 0


def _moody(item: int) -> Any:
    if item % 7 == 3:
        return InvalidImage(f"{item}")
    if item % 31 == 5:
        raise RuntimeError(f"{item}")
    return 2 * item


@pytest.mark.parametrize("seed", range(5))
async def test_random_traffic_is_answered_as_if_alone(seed: int) -> None:
    """Whatever comes, is cancelled, fails or is too late: every caller gets its own answer, within the limits."""
    chance = random.Random(seed)

    worker = Worker(_moody, took_s=0.001)
    batcher = make(worker, batch_limit=5, queue_limit=1000)
    cancelled = set()

    async def caller(item: int) -> Any:
        await asyncio.sleep(chance.random() * 0.05)
        priority: Any = chance.choice(PRIORITIES)
        return (await batcher.submit(item % 3, item, deadline=soon(), priority=priority)).result

    tasks = [asyncio.create_task(caller(item)) for item in range(150)]
    for item in chance.sample(range(150), 30):
        await asyncio.sleep(0.001)
        if tasks[item].cancel():
            cancelled.add(item)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for item, outcome in enumerate(outcomes):
        if item in cancelled:
            assert isinstance(outcome, asyncio.CancelledError)
        elif item % 7 == 3 or item % 31 == 5:
            assert isinstance(outcome, InvalidImage if item % 7 == 3 else RuntimeError)
            assert str(outcome) == str(item)
        else:
            assert outcome == 2 * item
    assert all(len(items) <= 5 and {item % 3 for item in items} == {key} for key, items in worker.batches)
    assert len(batcher) == 0


async def test_an_error_for_one_item_is_its_alone() -> None:
    worker = Worker(lambda item: NumericalFailure("NaN") if item == 2 else item)
    worker.gate.clear()
    batcher = make(worker, batch_limit=10)
    tasks = [asyncio.create_task(batcher.submit("a", item, deadline=soon())) for item in range(4)]
    await settle()
    worker.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[2], WhenceError)
    assert [outcome.result for i, outcome in enumerate(outcomes) if i != 2] == [0, 1, 3]  # type: ignore[union-attr]


async def test_when_a_batch_raises_only_the_culprit_fails() -> None:
    def result(item: int) -> int:
        if item == 2:
            raise ZeroDivisionError
        return item

    worker = Worker(result)
    worker.gate.clear()
    batcher = make(worker, batch_limit=10)
    blocker = asyncio.create_task(batcher.submit("first", 7, deadline=soon()))
    await settle()
    tasks = [asyncio.create_task(batcher.submit("a", item, deadline=soon())) for item in range(4)]
    await settle()
    worker.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await blocker
    assert isinstance(outcomes[2], ZeroDivisionError)
    assert [outcome.result for i, outcome in enumerate(outcomes) if i != 2] == [0, 1, 3]  # type: ignore[union-attr]
    assert worker.batches[1:] == [("a", [0, 1, 2, 3]), ("a", [0]), ("a", [1]), ("a", [2]), ("a", [3])]
    assert (await batcher.submit("a", 5, deadline=soon())).result == 5, "the worker has died"


async def test_too_few_results_are_noticed() -> None:
    async def run(key: str, items: Items) -> list[Any]:
        return []

    with pytest.raises(RuntimeError, match="1 items gave 0 results"):
        await make(run).submit("a", 1, deadline=soon())


async def test_cancelled_work_is_never_computed_and_its_mates_are_answered() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker, batch_limit=10)
    blocker = asyncio.create_task(batcher.submit("a", 0, deadline=soon()))
    await settle()
    tasks = [asyncio.create_task(batcher.submit("a", item, deadline=soon())) for item in (1, 2, 3)]
    await settle()
    tasks[1].cancel()
    await settle()
    assert len(batcher) == 2
    worker.gate.set()
    assert (await blocker).result == 0
    assert [(await tasks[i]).result for i in (0, 2)] == [2, 6]
    assert worker.batches == [("a", [0]), ("a", [1, 3])]


async def test_an_item_cancelled_in_the_very_moment_its_batch_forms_is_left_out() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker, batch_limit=10)
    blocker = asyncio.create_task(batcher.submit("a", 0, deadline=soon()))
    await settle()
    tasks = [asyncio.create_task(batcher.submit("a", item, deadline=soon())) for item in (1, 2)]
    await settle()
    tasks[0].cancel()
    taken = batcher._take()  # before the cancelled caller has run again
    assert taken is not None
    assert [job.item for job in taken[1]] == [2]
    for task in (*tasks, blocker):
        task.cancel()


async def test_cancelling_while_computing_leaves_the_mates_alone() -> None:
    worker = Worker()
    batcher = make(worker, batch_limit=10)
    worker.gate.clear()
    blocker = asyncio.create_task(batcher.submit("b", 0, deadline=soon()))
    await settle()
    tasks = [asyncio.create_task(batcher.submit("a", item, deadline=soon())) for item in (1, 2)]
    worker.gate.set()
    await blocker
    worker.gate.clear()
    await settle()
    assert worker.batches[-1] == ("a", [1, 2])
    tasks[0].cancel()
    await settle()
    worker.gate.set()
    assert (await tasks[1]).result == 4


async def test_a_full_queue_is_said_with_when_to_come_back() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker, queue_limit=2)
    tasks = []
    for item in range(3):  # one is computed, two wait
        tasks.append(asyncio.create_task(batcher.submit("a", item, deadline=soon())))
        await settle()
    with pytest.raises(Overloaded) as refusal:
        await batcher.submit("a", 9, deadline=soon())
    assert 0 < refusal.value.retry_after_s <= 60
    worker.gate.set()
    await asyncio.gather(*tasks)
    assert (await batcher.submit("a", 9, deadline=soon())).result == 18


async def test_a_caller_never_waits_beyond_its_deadline() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker)
    blocker = asyncio.create_task(batcher.submit("a", 0, deadline=soon()))
    await settle()
    with pytest.raises(DeadlineExceeded):
        await batcher.submit("a", 1, deadline=soon(0.02))
    with pytest.raises(DeadlineExceeded):
        await batcher.submit("a", 2, deadline=time.monotonic() - 1)
    assert len(batcher) == 0
    worker.gate.set()
    await blocker
    assert worker.batches == [("a", [0])], "what came too late was computed"


async def test_what_cannot_be_done_in_time_is_refused_at_first_and_tried_again_later() -> None:
    worker = Worker(took_s=0.2)
    batcher = make(worker)
    await batcher.submit("a", 0, deadline=soon())
    with pytest.raises(DeadlineExceeded):
        await batcher.submit("a", 1, deadline=soon(0.1))
    assert len(worker.batches) == 1, "it was computed although it could not be in time"
    assert (await batcher.submit("b", 1, deadline=soon())).result == 2, "another key knows nothing of this"
    # The worker has become fast: that must be found out, although short deadlines are refused at first.
    worker._took_s = 0.0
    for _ in range(50):
        try:
            assert (await batcher.submit("a", 1, deadline=soon(0.1))).result == 2
            break
        except DeadlineExceeded:
            continue
    else:
        pytest.fail("one slow batch has short deadlines refused for ever")


async def test_closing_refuses_what_waits_and_ends_what_runs() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker)
    running = asyncio.create_task(batcher.submit("a", 1, deadline=soon()))
    await settle()
    waiting = asyncio.create_task(batcher.submit("a", 2, deadline=soon()))
    await settle()
    closing = asyncio.create_task(batcher.close())
    await settle()
    worker.gate.set()
    await closing
    assert (await running).result == 2
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await batcher.submit("a", 3, deadline=soon())


async def test_the_observer_sees_batches_and_the_queue() -> None:
    class Observer:
        sizes: list[int] = []  # noqa: RUF012
        lengths: list[int] = []  # noqa: RUF012

        def batch(self, size: int) -> None:
            self.sizes.append(size)

        def queue(self, length: int) -> None:
            self.lengths.append(length)

    observer, worker = Observer(), Worker()
    batcher: Batcher[str, int, int] = Batcher(worker, batch_limit=4, queue_limit=9, observer=observer)
    worker.gate.clear()
    tasks = [asyncio.create_task(batcher.submit("a", item, deadline=soon())) for item in range(3)]
    await settle()
    worker.gate.set()
    await asyncio.gather(*tasks)
    assert sum(observer.sizes) == 3
    assert max(observer.lengths) >= 1
    assert observer.lengths[-1] == 0


async def held(batcher: Batcher[Any, Any, Any], worker: Worker, *items: tuple[str, Any]) -> asyncio.Future[Any]:
    """Have items wait, by priority, behind a first one that is computed; open the gate, and return all answers."""
    worker.gate.clear()
    blocker = asyncio.create_task(batcher.submit("first", 0, deadline=soon()))
    await settle()
    tasks = []
    for priority, item in items:
        tasks.append(asyncio.create_task(batcher.submit("a", item, deadline=soon(), priority=priority)))  # type: ignore[arg-type]
        await settle()
    worker.gate.set()
    await blocker
    return asyncio.gather(*tasks)


async def test_interactive_items_come_first_and_are_never_mixed_with_background_ones() -> None:
    worker = Worker()
    batcher = make(worker, batch_limit=3)
    batcher._pace.note("a", 100, 0.01)
    items = [("background", n) for n in range(4)] + [("interactive", 10 + n) for n in range(4)]
    answers = await (await held(batcher, worker, *items))
    assert [answer.result for answer in answers] == [2 * item for _, item in items]
    assert [batch for _, batch in worker.batches[1:]] == [[10, 11, 12], [13], [0, 1, 2], [3]]
    assert len(batcher) == 0


async def test_background_items_are_not_passed_over_for_ever() -> None:
    """One batch in so many is theirs, though interactive items wait all the time."""
    worker = Worker()
    batcher = make(worker, batch_limit=1, queue_limit=1000)
    rounds = 3
    items = [("background", -n) for n in range(1, rounds + 1)] + [("interactive", n) for n in range(1, 10 * TURNS)]
    await (await held(batcher, worker, *items))
    order = [batch[0] for _, batch in worker.batches[1:]]
    assert [place for place, item in enumerate(order) if item < 0] == [TURNS * n - 1 for n in range(1, rounds + 1)]
    assert [item for item in order if item < 0] == [-1, -2, -3]
    assert [item for item in order if item > 0] == sorted(item for item in order if item > 0)


async def test_what_did_not_wait_yet_is_owed_no_turn() -> None:
    worker = Worker()
    batcher = make(worker, batch_limit=1)
    for n in range(2 * TURNS):
        await batcher.submit("a", n, deadline=soon())
    await (await held(batcher, worker, ("background", 100), ("interactive", 101)))
    assert [batch for _, batch in worker.batches[-2:]] == [[101], [100]]


async def test_background_batches_begin_small_and_grow_with_what_is_known() -> None:
    worker = Worker()
    batcher: Batcher[Any, Any, Any] = Batcher(worker, batch_limit=16, queue_limit=1000, background_batch_s=1.0)
    await (await held(batcher, worker, *[("background", n) for n in range(100)]))
    sizes = [len(batch) for _, batch in worker.batches[1:]]
    assert sizes[:2] == [1, 16], "nothing was known at first; then, that they take next to nothing"
    # As slow as this: three in the time allowed.
    worker.batches.clear()
    batcher._pace = Pace()
    batcher._pace.note("a", 1, 0.3)
    await (await held(batcher, worker, *[("background", n) for n in range(100)]))
    sizes = [len(batch) for _, batch in worker.batches[1:]]
    assert sizes[0] == 3
    assert sizes[:-1] == sorted(sizes[:-1]), "they grow as the worker is found to be faster"
    assert max(sizes) == 16
    # However slow: one at a time; and interactive batches are as large as ever.
    worker.batches.clear()
    for _ in range(100):
        batcher._pace.note("a", 1, 5.0)
    await (await held(batcher, worker, ("background", 1), ("background", 2), *[("interactive", n) for n in range(9)]))
    assert [len(batch) for _, batch in worker.batches[1:3]] == [9, 1]


async def test_background_batches_are_larger_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    batcher: Batcher[Any, Any, Any] = Batcher(worker, batch_limit=100, queue_limit=1000, background_batch_s=1.0)
    sizes = []
    for quiet_s in (math.inf, 1e3, 0.0):
        monkeypatch.setattr("service.batcher.QUIET_S", quiet_s)
        worker.batches.clear()
        batcher._pace = Pace()
        batcher._pace.note("a", 1, 0.2)
        await (await held(batcher, worker, *[("background", n) for n in range(100)]))  # behind an interactive one
        sizes.append(len(worker.batches[1][1]))
    assert sizes == [5, 5, 5 * LEISURE]


async def test_background_items_are_refused_first_and_take_no_place_from_the_others() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker, queue_limit=6)
    tasks = [asyncio.create_task(batcher.submit("a", 0, deadline=soon()))]  # computed, so it does not wait
    await settle()

    async def waits(item: int, priority: Any) -> bool:
        task = asyncio.create_task(batcher.submit("a", item, deadline=soon(), priority=priority))
        await settle()
        if not task.done():
            tasks.append(task)
            return True
        with pytest.raises(Overloaded) as refusal:
            await task
        assert refusal.value.retry_after_s > 0
        return False

    assert [await waits(n, "background") for n in range(1, 6)] == [True, True, True, False, False]
    assert [await waits(n, "interactive") for n in range(10, 18)] == [True] * 6 + [False] * 2
    assert len(batcher) == 9
    for task in tasks[1:4]:
        task.cancel()
    await settle()
    assert not await waits(6, "background"), "interactive items fill more than half"
    worker.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) == 3
    assert (await batcher.submit("a", 7, deadline=soon(), priority="background")).result == 14


async def test_deadlines_and_closing_hold_for_background_items_too() -> None:
    worker = Worker()
    worker.gate.clear()
    batcher = make(worker)
    blocker = asyncio.create_task(batcher.submit("a", 0, deadline=soon()))
    await settle()
    with pytest.raises(DeadlineExceeded):
        await batcher.submit("a", 1, deadline=soon(0.02), priority="background")
    assert len(batcher) == 0
    waiting = asyncio.create_task(batcher.submit("a", 2, deadline=soon(), priority="background"))
    await settle()
    closing = asyncio.create_task(batcher.close())
    await settle()
    worker.gate.set()
    await closing
    await blocker
    with pytest.raises(Unavailable):
        await waiting
    assert worker.batches == [("a", [0])]


def test_a_queue_of_one_has_room_for_either() -> None:
    assert background_limit(1) == 1
    for priority in PRIORITIES:
        assert not is_full(priority, dict.fromkeys(PRIORITIES, 0), 1)
        assert is_full(priority, {**dict.fromkeys(PRIORITIES, 0), priority: 1}, 1)


def test_the_pace_knows_how_many_items_fit() -> None:
    pace = Pace()
    assert pace.items_within("a", 1.0) == 0
    for _ in range(50):
        pace.note("a", 10, 2.0)
        pace.note("b", 1, 0.01)
    assert (pace.items_within("a", 1.0), pace.items_within("a", 0.1)) == (5, 0)
    assert pace.items_within("b", 1.0) == pytest.approx(100, abs=1)


def test_the_pace_follows_the_recent_rate() -> None:
    pace = Pace()
    assert pace.fastest_s("a") == 0
    for _ in range(50):
        pace.note("a", 10, 2.0)
    assert pace.wait_s(100) == pytest.approx(20.0, rel=1e-3)
    assert pace.wait_s(0) == 0.05
    assert pace.wait_s(10**6) == 60.0
    pace.note("a", 10, 1.0)
    assert pace.fastest_s("a") == 1.0


def test_the_pace_does_not_keep_keys_alive() -> None:
    """Keys hold engines: remembering how fast they were must not keep dropped ones in memory."""

    class Key:
        pass

    pace, key = Pace(), Key()
    gone = weakref.ref(key)
    pace.note(key, 1, 1.0)
    pace.doubt(key)
    assert pace.fastest_s(key) == pytest.approx(0.9)
    del key
    gc.collect()
    assert gone() is None
