"""All keys of a source, each once and sorted, on disk: memory is the same for ten images and ten million."""

from __future__ import annotations

import fnmatch
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from whence._batch.sources import Listed

_COLUMNS = "key TEXT PRIMARY KEY, etag TEXT, size INTEGER, refused INTEGER"


class Listing:
    """A table of what was listed, and of what was planned before, to compare the two; a context manager."""

    def __init__(self, folder: Path) -> None:
        # Used by one thread at a time, but not always by the same: listing blocks, so it is done beside the loop.
        self._path = folder / "listing.sqlite"
        self._database = sqlite3.connect(self._path, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(f"CREATE TABLE listed ({_COLUMNS}) WITHOUT ROWID")
        self._database.execute(f"CREATE TABLE planned ({_COLUMNS}, chunk INTEGER) WITHOUT ROWID")

    def __enter__(self) -> Listing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._path.unlink()

    def add(self, objects: Iterable[Listed]) -> None:
        """Take objects; of one key the first counts."""
        self._database.executemany("INSERT OR IGNORE INTO listed VALUES (?, ?, ?, ?)", objects)

    def totals(self) -> tuple[int, int]:
        """Number of objects, and their size in bytes."""
        count, size = self._database.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM listed").fetchone()
        return int(count), int(size)

    def objects(self) -> Iterator[Listed]:
        """All objects, by key."""
        rows = self._database.execute("SELECT key, etag, size, refused FROM listed ORDER BY key")
        return (_listed(row) for row in rows)

    def compare(self, planned: Iterable[tuple[int, Listed]]) -> None:
        """Take what was planned before, with the number of its chunk; for the next three questions."""
        self._database.execute("DELETE FROM planned")
        rows = ((*item, chunk) for chunk, item in planned)
        self._database.executemany("INSERT INTO planned VALUES (?, ?, ?, ?, ?)", rows)

    def changed_chunks(self) -> set[int]:
        """Chunks of which an object has changed or is gone."""
        return {
            chunk
            for (chunk,) in self._database.execute(
                "SELECT DISTINCT planned.chunk FROM planned LEFT JOIN listed USING (key) "
                "WHERE listed.key IS NULL OR listed.etag IS NOT planned.etag"
            )
        }

    def kept(self) -> Iterator[tuple[int, Listed]]:
        """Objects that were planned and are still there, as they are now, by chunk."""
        rows = self._database.execute(
            "SELECT key, listed.etag, listed.size, listed.refused, chunk FROM planned JOIN listed USING (key) "
            "ORDER BY chunk, key"
        )
        return ((row[4], _listed(row)) for row in rows)

    def new_count(self) -> int:
        """Number of objects that were not planned."""
        query = "SELECT COUNT(*) FROM listed WHERE key NOT IN (SELECT key FROM planned)"
        return int(self._database.execute(query).fetchone()[0])

    def new(self) -> Iterator[Listed]:
        """Objects that were not planned."""
        rows = self._database.execute(
            "SELECT key, etag, size, refused FROM listed WHERE key NOT IN (SELECT key FROM planned) ORDER BY key"
        )
        return (_listed(row) for row in rows)


class Filter:
    """Which keys are meant: those that match one of ``include``, if there are any, and none of ``exclude``.

    A pattern is matched against the whole key and, where it has no slash, against its last part alone; ``*`` matches
    slashes, too.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include = [_pattern(text) for text in include]
        self._exclude = [_pattern(text) for text in exclude]

    def __call__(self, key: str) -> bool:
        wanted = not self._include or any(pattern.fullmatch(key) for pattern in self._include)
        return wanted and not any(pattern.fullmatch(key) for pattern in self._exclude)


def _pattern(text: str) -> re.Pattern[str]:
    anywhere = "" if "/" in text else "(?:.*/)?"
    return re.compile(f"{anywhere}(?:{fnmatch.translate(text)})", re.DOTALL)


def _listed(row: tuple[Any, ...]) -> Listed:
    key, etag, size, refused = row[:4]
    return Listed(key, etag, size, bool(refused))
