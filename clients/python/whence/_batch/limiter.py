"""How many calls to have in flight: as few as give the service's best throughput.

A service's throughput grows with the calls in flight until it is busy; beyond that only its latency does (Little's law:
calls in flight = throughput × latency). Latency alone tells nothing, since a service that computes in batches answers
later, the better it is used. So the limit climbs a ladder of levels as long as a step brings throughput, and goes down
again where it does not. No clocks and no tasks here: the caller tells what happened, and when.
"""

from __future__ import annotations

import math
from bisect import bisect_right

LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Limits that are tried; each is about half as much again as the one before."""

_FIRST = LEVELS.index(8)
_CYCLES, _MOST_CYCLES = 12, 64
"""Length of a measurement. A cycle is as many answers as the limit: of a batch all are in the same cycle."""
_FEWEST = 24
"""Answers per measurement at the least."""
_ENOUGH = 1500
"""Answers at which a measurement ends, however they vary: the service may have changed meanwhile."""
_NOISE = 0.02
"""Relative standard error at which a measurement ends."""
_WORTH = 1.03
"""Throughput that a step up has to bring."""
_COSTS_NOTHING = 0.95
"""Throughput that a step up has to keep, where answers take less than `_SOON_S`: all of it, within the noise."""
_SOON_S = 1.0
_CHANGED = 1.25
"""Change of throughput at a level that is taken for a change of the service."""
_SURE = 3.0
"""Standard errors between two levels at which a try ends early."""
_FAST = 1.3
"""Throughput that twice the limit has to bring for the first, fast climb to go on."""
_MOST_PATIENCE = 8
"""Measurements between two tries of another level, at the most."""


class Limiter:
    """A hill climber over `LEVELS`.

    ``limit`` says how many calls may be in flight now. Tell `answered` and `refused` what became of them.
    """

    def __init__(self) -> None:
        self._level = _FIRST
        self._ceiling = len(LEVELS) - 1
        self._throughput: dict[int, float] = {}
        """Last measured, in answers per second, by level."""
        self._noise: dict[int, float] = {}
        """Relative standard error of that."""
        self._climbing = True
        """Whether this is still the first climb, two levels at a time."""
        self._wait = self._patience = 0
        """Measurements to go before another level is tried, and how many that is after the next failed try."""
        self._up = True
        """Whether the next try is upwards."""
        self._home: int | None = None
        """The level to go back to, while another is tried."""
        self._since_s = 0.0
        """When the measurement began: answers to earlier calls do not count."""
        self._ended_s: float | None = None
        """When its last cycle ended; None before the first answer, with which the first cycle begins."""
        self._count = 0
        """Answers in the cycle that runs."""
        self._cycles: list[float] = []
        """Seconds that each cycle took."""

    @property
    def limit(self) -> int:
        """Calls that may be in flight."""
        return LEVELS[self._level]

    def answered(self, now_s: float, latency_s: float) -> None:
        """Take an answer, of whatever kind; ``latency_s`` is the time since the call was made."""
        if now_s - latency_s < self._since_s:
            return  # made at another level
        if self._ended_s is None:
            self._ended_s = now_s
            return
        self._count += 1
        if self._count == self.limit:
            self._cycles.append(now_s - self._ended_s)
            self._ended_s, self._count = now_s, 0
            if self._is_settled():
                measured = self.limit * len(self._cycles) / max(sum(self._cycles), 1e-9)
                self._judge(measured)
                self._restart(now_s)

    def refused(self, now_s: float, latency_s: float) -> None:
        """Take a refusal for lack of room; refusals of calls that were made before the last one count once."""
        if now_s - latency_s < self._since_s:
            return
        self._ceiling = max(self._level - 1, 0)
        self._level = max(self._level - 2, 0)
        self._climbing, self._up = False, True
        # Down here a refusal costs little, and staying costs much: a service may refuse for a second only.
        self._settle(patience=min(2 * self._level, _MOST_PATIENCE))
        self._restart(now_s)

    def _is_settled(self) -> bool:
        """Whether the cycles say enough."""
        count = len(self._cycles)
        if count < max(_CYCLES, _FEWEST / self.limit):
            return False
        typical = max(sum(self._cycles) / count, 1e-9)
        variance = sum((cycle_s - typical) ** 2 for cycle_s in self._cycles) / (count - 1)
        noise = self._noise[self._level] = math.sqrt(variance / count) / typical
        if self._climbing or noise <= _NOISE or count >= min(_MOST_CYCLES, _ENOUGH / self.limit):
            return True
        if self._home is None:
            return False
        change = self.limit / typical / self._throughput[self._home] - 1
        return abs(change) > _SURE * math.hypot(noise, self._noise[self._home])

    def _judge(self, measured: float) -> None:
        """Decide what a measurement of the level means."""
        known = self._throughput.get(self._level)
        self._throughput[self._level] = measured
        if self._climbing:
            self._climb(measured)
        elif self._home is not None:
            self._end_try(self._home, measured)
        elif known is not None and not known / _CHANGED < measured < known * _CHANGED:
            self._begin_anew(known, measured)
        elif self._wait > 0:
            self._wait -= 1
        else:
            self._try_another()

    def _begin_anew(self, known: float, measured: float) -> None:
        """The service got faster or slower: what is known of other levels is of another service."""
        self._throughput = {self._level: measured}
        self._ceiling = len(LEVELS) - 1
        self._up = True
        self._settle(patience=0)
        if measured > known:
            self._try_another()
        else:
            soon = max(bisect_right(LEVELS, measured * _SOON_S) - 1, 0)
            self._level = min(self._level, soon)

    def _climb(self, measured: float) -> None:
        """Go on with the first climb while it pays."""
        before = self._throughput.get(self._level - 2, 0.0)
        following = self._level + 2
        if following <= self._ceiling and (
            measured > before * _FAST
            or (measured > before * _COSTS_NOTHING and LEVELS[following] <= measured * _SOON_S)
        ):
            self._level = following
            return
        self._climbing = False
        if not _pays(self._level, measured, before):
            self._level -= 2

    def _try_another(self) -> None:
        if self._up and self._level == self._ceiling < len(LEVELS) - 1:
            self._ceiling += 1  # what was refused then may be welcome now: the next try is that
            return
        step = 1 if self._up else -1
        self._up = not self._up
        if 0 <= self._level + step <= self._ceiling:
            self._home, self._level = self._level, self._level + step

    def _end_try(self, home: int, measured: float) -> None:
        """Stay at the level that was tried, or go back home."""
        before = self._throughput[home]
        upwards = self._level > home
        if _pays(self._level, measured, before) if upwards else not _pays(home, before, measured):
            self._up = upwards  # go on the same way
            self._settle(patience=0)
        else:
            self._level = home
            self._settle(patience=min(max(2 * self._patience, 1), _MOST_PATIENCE))

    def _settle(self, *, patience: int) -> None:
        self._home = None
        self._wait = self._patience = patience

    def _restart(self, now_s: float) -> None:
        """Begin a measurement: count the answers to calls made from now on."""
        self._since_s, self._ended_s, self._count = now_s, None, 0
        self._cycles.clear()


def _pays(level: int, throughput: float, below: float) -> bool:
    """Whether a level is better than the one below it."""
    soon = LEVELS[level] <= throughput * _SOON_S
    return throughput > below * (_COSTS_NOTHING if soon else _WORTH)
