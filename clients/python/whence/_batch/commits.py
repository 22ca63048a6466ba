"""Commits: the one place that says what is done.

A commit names the files of one chunk at one revision. It is created where there is none, so of two workers that did the
same chunk one wins; the other deletes what it wrote. Of a chunk the highest revision counts.
"""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from whence._batch.output import Output
from whence._errors import DataLoss, NotFound

TABLES = ("results", "failures", "maps")

_DONE = re.compile(r"done/chunk-(\d+)-r(\d+)\.json")
_FILE = re.compile(r"(?:results|failures|maps)/chunk-(\d+)-r(\d+)-\w+\.parquet")
_AT_ONCE = 32
"""Commits that are read at a time."""


@dataclass(frozen=True)
class File:
    """A Parquet file of a chunk."""

    name: str
    rows: int
    byte_count: int
    sha256: str
    """Hexadecimal."""


@dataclass(frozen=True)
class Commit:
    """A chunk that is done."""

    chunk: int
    revision: int
    explained: int
    """Images in the results."""
    failed: int
    """Images among the failures."""
    retryable: int
    """Those of them that may succeed later."""
    reasons: Mapping[str, int]
    """Failures by reason."""
    files: Mapping[str, File] = field(default_factory=dict)
    """By table; none of tables without rows."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def decode(content: bytes) -> Commit:
    """Read a commit."""
    try:
        found: dict[str, Any] = json.loads(content)
        files = {table: File(**file) for table, file in found.pop("files").items()}
        return Commit(**found, files=files)
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise DataLoss("A commit of the output cannot be read: use another output.", reason="CORRUPT_OUTPUT") from (
            failure
        )


def done_name(chunk: int, revision: int) -> str:
    """Name of a commit in the output."""
    return f"done/chunk-{chunk:06d}-r{revision}.json"


def file_name(table: str, chunk: int, revision: int, worker: str) -> str:
    """Name of a chunk's file in the output; no two workers write the same."""
    return f"{table}/chunk-{chunk:06d}-r{revision}-{worker}.parquet"


class Done:
    """Highest revision at which each chunk is done; four bytes a chunk."""

    def __init__(self) -> None:
        self._revisions = array("I")

    def note(self, chunk: int, revision: int) -> None:
        """Take a commit."""
        if chunk >= len(self._revisions):
            self._revisions.extend([0] * (chunk + 1 - len(self._revisions)))
        self._revisions[chunk] = max(self._revisions[chunk], revision)

    def __getitem__(self, chunk: int) -> int:
        """0 where the chunk was never done."""
        return self._revisions[chunk] if chunk < len(self._revisions) else 0

    def chunks(self) -> list[int]:
        """Numbers of all chunks that were ever done."""
        return [chunk for chunk, revision in enumerate(self._revisions) if revision]


async def done(output: Output) -> Done:
    """See what is done."""
    found = Done()
    async for name in output.names("done"):
        if (match := _DONE.fullmatch(name)) is not None:
            found.note(int(match[1]), int(match[2]))
    return found


async def exists(output: Output, chunk: int, revision: int) -> bool:
    """Whether a chunk is done at a revision, by a look at the store."""
    try:
        await output.get(done_name(chunk, revision))
    except NotFound:
        return False
    return True


async def read(output: Output, finished: Done, chunks: Iterable[int]) -> AsyncIterator[Commit]:
    """Commits of chunks that are done, in order; several are read at a time."""
    numbers = list(chunks)
    for start in range(0, len(numbers), _AT_ONCE):
        some = numbers[start : start + _AT_ONCE]
        for content in await asyncio.gather(*(output.get(done_name(chunk, finished[chunk])) for chunk in some)):
            yield decode(content)


async def sweep(output: Output) -> None:
    """Delete the files of finished chunks that no commit names any more, or ever named.

    Files of chunks that are not done, or of revisions to come, may be somebody's work in progress.
    """
    finished = await done(output)
    written: dict[int, list[str]] = {}
    for table in TABLES:
        async for name in output.names(table):
            match = _FILE.fullmatch(name)
            if match is not None and int(match[2]) <= finished[int(match[1])]:
                written.setdefault(int(match[1]), []).append(name)
    async for commit in read(output, finished, sorted(written)):
        named = {file.name for file in commit.files.values()}
        await output.delete([name for name in written.pop(commit.chunk) if name not in named])
