"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Hears of progress."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Take note that ``done`` of ``total`` steps of a stage are done, and how; ``done == total`` ends it."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Ignore progress."""
