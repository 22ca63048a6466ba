"""The limiter before simulated services: it finds their best throughput, stays near the knee, and follows changes."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from whence._batch.gate import Gate
from whence._batch.limiter import _SOON_S as SOON_S
from whence._batch.limiter import LEVELS, Limiter


@dataclass(frozen=True)
class Service:
    """Replicas that take all that waits, up to a batch; a batch takes a fixed time and a time for each image."""

    replicas: int
    batch: int
    fixed_s: float
    each_s: float = 0.0
    jitter: float = 0.0
    """Standard deviation of a batch's time, relative to it."""
    queue: int = 10**9
    """Calls that may wait; the rest is refused."""

    @property
    def best(self) -> float:
        return self.replicas * self.batch / (self.fixed_s + self.batch * self.each_s)

    @property
    def knee(self) -> int:
        """Calls in flight at which nobody idles."""
        return self.replicas * self.batch


@dataclass
class Outcome:
    throughput: float
    """In the second half, in answers per second."""
    mean_limit: float
    """In the second half."""
    refusals: int


def simulate(service: Callable[[float], Service], seconds: float, seed: int = 0) -> Outcome:
    """A closed system: as many calls as the limiter allows, all the time."""
    limiter, randomly = Limiter(), random.Random(seed)
    now_s, in_flight, busy, serial = 0.0, 0, 0, 0
    waiting: deque[float] = deque()
    events: list[tuple[float, int, list[float], bool]] = []
    answers = refusals = 0
    limit_time = last_s = 0.0
    while now_s < seconds:
        here = service(now_s)
        while in_flight < limiter.limit:
            in_flight += 1
            serial += 1
            if len(waiting) < here.queue:
                waiting.append(now_s)
            else:
                heapq.heappush(events, (now_s + 0.001, serial, [now_s], True))
        while waiting and busy < here.replicas:
            batch = [waiting.popleft() for _ in range(min(here.batch, len(waiting)))]
            busy, serial = busy + 1, serial + 1
            noise = randomly.gammavariate(here.jitter**-2, here.jitter**2) if here.jitter else 1.0
            took_s = (here.fixed_s + here.each_s * len(batch)) * noise
            heapq.heappush(events, (now_s + took_s, serial, batch, False))
        now_s, _, ended, refused = heapq.heappop(events)
        in_flight -= len(ended)
        busy -= not refused
        for began_s in ended:
            (limiter.refused if refused else limiter.answered)(now_s, now_s - began_s)
        if now_s > seconds / 2:
            limit_time += limiter.limit * (now_s - max(last_s, seconds / 2))
            answers, refusals = answers + len(ended) * (not refused), refusals + len(ended) * refused
        last_s = now_s
    return Outcome(answers / (now_s - seconds / 2), limit_time / (now_s - seconds / 2), refusals)


STEADY = {
    "one at a time": Service(1, 1, 0.01),
    "one at a time, slowly": Service(1, 1, 0.5),
    "eight replicas": Service(8, 1, 0.05),
    "sixty-four replicas": Service(64, 1, 0.1),
    "batches": Service(1, 32, 0.02, 0.002),
    "batches on four replicas": Service(4, 32, 0.02, 0.002),
    "batches that gain little": Service(1, 16, 0.05, 0.022),
    "batches that cost the same, however small": Service(1, 64, 0.2, 0.001),
}


@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("name", STEADY)
def test_reaches_the_best_throughput_near_the_knee(name: str, jitter: float) -> None:
    base = STEADY[name]
    service = Service(base.replicas, base.batch, base.fixed_s, base.each_s, jitter)
    cycle_s = service.fixed_s + service.batch * service.each_s
    for seed in range(3 if jitter else 1):
        found = simulate(lambda now_s: service, 1500 * cycle_s, seed)
        assert found.throughput >= 0.95 * service.best
        # Beyond the knee only where nobody waits long for it.
        assert found.mean_limit <= max((3 if jitter < 0.2 else 5) * service.knee, 1.5 * SOON_S * service.best, 16)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize(("before", "after"), [(16, 8), (8, 16), (2, 16), (32, 4)])
def test_follows_a_capacity_that_changes(before: int, after: int, jitter: float) -> None:
    old, new = Service(before, 1, 0.05, jitter=jitter), Service(after, 1, 0.05, jitter=jitter)
    found = simulate(lambda now_s: old if now_s < 30 else new, 200)
    assert found.throughput >= 0.95 * new.best
    assert found.mean_limit <= max(3 * new.knee, 1.5 * SOON_S * new.best)


def test_keeps_off_a_service_that_refuses() -> None:
    service = Service(4, 1, 0.05, queue=4)
    found = simulate(lambda now_s: service, 200)
    assert found.throughput >= 0.95 * service.best
    assert found.refusals <= 0.02 * found.throughput * 100


def test_recovers_from_a_second_of_refusals() -> None:
    service, full = Service(64, 1, 0.1), Service(64, 1, 0.1, queue=0)
    found = simulate(lambda now_s: full if 20 < now_s < 21 else service, 120)
    assert found.throughput >= 0.95 * service.best


def test_refusals_at_once_count_once() -> None:
    limiter = Limiter()
    for _ in range(100):
        limiter.refused(now_s=10.0, latency_s=1.0)
    assert limiter.limit == LEVELS[LEVELS.index(8) - 2]


def test_limits_have_bounds() -> None:
    limiter, now_s = Limiter(), 0.0
    for _ in range(100):
        now_s += 1.0
        limiter.refused(now_s, 0.5)
    assert limiter.limit == 1
    endless = simulate(lambda now_s: Service(10**6, 1, 0.1), 60)
    assert 0.9 * LEVELS[-1] <= endless.mean_limit <= LEVELS[-1] == 256


async def test_the_gate_lets_in_as_many_as_the_limiter_says() -> None:
    gate, seen = Gate(Limiter()), []

    async def call() -> None:
        async with gate.shared():
            seen.append(gate.running)
            await asyncio.sleep(0.001)

    await asyncio.gather(*(call() for _ in range(50)))
    assert max(seen) == 8
    assert gate.running == 0


async def test_alone_means_alone() -> None:
    gate, others = Gate(Limiter()), 0

    async def call() -> None:
        nonlocal others
        async with gate.shared():
            others += 1
            await asyncio.sleep(0.001)
            others -= 1

    async def alone() -> None:
        async with gate.alone():
            for _ in range(5):
                assert others == 0
                await asyncio.sleep(0.001)

    await asyncio.gather(*(call() for _ in range(20)), alone(), *(call() for _ in range(20)), alone())


async def test_those_who_stop_waiting_leave_no_gap() -> None:
    gate = Gate(Limiter())
    held = [asyncio.create_task(_hold(gate)) for _ in range(8)]
    waiting = [asyncio.create_task(_hold(gate)) for _ in range(4)]
    await asyncio.sleep(0)
    for task in (*held[:2], *waiting[:2]):
        task.cancel()
    await asyncio.sleep(0.01)
    assert gate.running == 8
    for task in (*held, *waiting):
        task.cancel()
    await asyncio.gather(*held, *waiting, return_exceptions=True)
    assert gate.running == 0


async def _hold(gate: Gate) -> None:
    async with gate.shared():
        await asyncio.sleep(60)
