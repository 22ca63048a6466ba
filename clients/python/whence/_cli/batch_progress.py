"""How far a batch is, on standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import typer
from rich import progress as bars
from rich.console import Console
from rich.text import Text

from whence._batch.records import Progress
from whence._cli.failures import printable

LINE_EVERY_S = 10.0


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """What shows how far a batch is, each time it is told."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (bars.BarColumn(), bars.TaskProgressColumn(), bars.TextColumn("{task.description}", markup=False))
    with bars.Progress(*columns, console=console, transient=True) as bar:
        yield Bar(bar)


class Bar:
    """Moves a bar, and says above it why nothing goes on."""

    def __init__(self, bar: bars.Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("looking at the source", total=None)
        self._waiting = ""

    def __call__(self, now: Progress) -> None:
        if now.waiting and now.waiting != self._waiting:
            self._bar.console.print(Text(f"waiting: {printable(now.waiting)}"), soft_wrap=True)
        self._waiting = now.waiting
        self._bar.update(self._task, total=now.total, completed=now.finished, description=described(now))


class Lines:
    """Writes a line every ten seconds, and one for the end."""

    def __init__(self) -> None:
        self._due_s = 0.0

    def __call__(self, now: Progress) -> None:
        if now.finished < now.total:
            if time.monotonic() < self._due_s:
                return
            self._due_s = time.monotonic() + LINE_EVERY_S
        elif self._due_s == math.inf:
            return
        else:
            self._due_s = math.inf
        waiting = f", waiting: {printable(now.waiting)}" if now.waiting else ""
        typer.echo(f"{described(now)}{waiting}", file=sys.stderr)


def described(now: Progress) -> str:
    """How far a batch is, in a line."""
    parts = [f"{now.finished:,} of {now.total:,}", f"{now.rate:,.1f} a second"]
    if now.finished < now.total and now.remaining_s is not None:
        parts.append(f"{timedelta(seconds=round(now.remaining_s))} left")
    if now.failed:
        parts.append(f"{now.failed:,} failed")
    if now.finished < now.total:
        parts.append(f"{now.in_flight} of {now.limit} in flight")
    return ", ".join(parts)
