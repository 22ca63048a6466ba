"""Who is served first, and for whom there is room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Priority = Literal["interactive", "background"]
"""Whether somebody waits for the answer."""

PRIORITIES: tuple[Priority, ...] = get_args(Priority)


def background_limit(limit: int) -> int:
    """Return beyond how many items, of whatever priority, background ones are refused: half, but at least one."""
    return max(1, limit // 2)


def is_full(priority: Priority, taken: Mapping[Priority, int], limit: int) -> bool:
    """Say whether there is no room for one more item of a priority.

    Background items take no place from interactive ones, which are counted alone, and are refused long before them. So
    there are never more than ``limit + background_limit(limit)``.
    """
    if priority == "interactive":
        return taken["interactive"] >= limit
    return sum(taken.values()) >= background_limit(limit)
