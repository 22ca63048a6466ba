"""Reading what a batch wrote, at any time: while it runs, after it was killed, when it is done."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from whence._batch import commits, plan
from whence._batch.commits import Commit
from whence._batch.locations import parse
from whence._batch.output import Output, open_output
from whence._batch.schema import SCHEMAS, VERSION
from whence._errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, missing_extra

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as absent:
    raise missing_extra("batch", "pyarrow") from absent

TableName = Literal["results", "failures", "maps"]
T = TypeVar("T")

_COMMITS_AT_ONCE, _TABLES_AT_ONCE = 32, 8
_ATTEMPTS = 5
"""How often a chunk is looked up anew when its file is replaced while it is read."""


class BatchOutput:
    """The output of a batch, chunk by chunk.

    Parameters
    ----------
    path
        The output folder or bucket that `explain_batch` was given.

    Raises
    ------
    FailedPrecondition
        If there is no batch output, or one of a schema that this version cannot read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._output: Output = open_output(parse(path), create=False)
        self.manifest: Mapping[str, Any] = block_on(read_manifest(self._output))
        """What was asked."""
        self._done = block_on(commits.done(self._output))

    def finished(self) -> Iterator[Commit]:
        """What every finished chunk says of itself."""
        for numbers in _groups(self._done.chunks(), _COMMITS_AT_ONCE):
            yield from block_on(_gather(map(self._commit, numbers)))

    def planned(self) -> int:
        """How many objects there are, finished or not."""
        found = block_on(plan.latest(self._output))
        return found.objects if found else 0

    def tables(self, table: TableName = "results", columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The table of every finished chunk that has one, so that memory holds few chunks at a time."""
        return (found for _, found in self.numbered(table, columns))

    def numbered(
        self, table: TableName, columns: Sequence[str] | None = None, only: Container[int] | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """As `tables`, each with the number of its chunk; ``only`` of some chunks."""
        check_columns(table, columns)
        chunks = [chunk for chunk in self._done.chunks() if only is None or chunk in only]
        # Maps are large; of the other tables several are read at a time, which hides how long a store takes to answer.
        for numbers in _groups(chunks, 1 if table == "maps" else _TABLES_AT_ONCE):
            found = block_on(_gather(self._table(chunk, table, columns) for chunk in numbers))
            yield from ((chunk, each) for chunk, each in zip(numbers, found, strict=True) if each is not None)

    async def _table(self, chunk: int, table: TableName, columns: Sequence[str] | None) -> pa.Table | None:
        for _ in range(_ATTEMPTS):
            commit = await self._commit(chunk)
            try:
                return await read_table(self._output, commit, table, columns)
            except NotFound:  # a later revision took its place
                self._done = await commits.done(self._output)
        raise DataLoss(f"A file of chunk {chunk} is gone: the output was changed by hand.", reason="CORRUPT_OUTPUT")

    async def _commit(self, chunk: int) -> Commit:
        return commits.decode(await self._output.get(commits.done_name(chunk, self._done[chunk])))


def read(path: str | os.PathLike[str], table: TableName, columns: Sequence[str] | None) -> pa.Table:
    """A whole table; see `whence.read_batch`."""
    schema = check_columns(table, columns)
    tables = list(BatchOutput(path).tables(table, columns))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def check_columns(table: str, columns: Sequence[str] | None) -> pa.Schema:
    """The schema of some columns of a table."""
    if table not in SCHEMAS:
        raise InvalidArgument(f"table must be one of {', '.join(map(repr, SCHEMAS))}; not {table!r}.")
    schema = SCHEMAS[table]
    if columns is None:
        return schema
    unknown = [name for name in columns if name not in schema.names]
    if unknown:
        raise InvalidArgument(f"{table} has no column {unknown[0]!r}; it has {', '.join(schema.names)}.")
    return pa.schema([schema.field(name) for name in columns])


async def read_manifest(output: Output) -> Mapping[str, Any]:
    """What was asked of the batch that wrote here."""
    try:
        manifest: dict[str, Any] = json.loads(await output.get("manifest.json"))
        version = manifest.get("schema_version")
    except (NotFound, ValueError, AttributeError) as failure:
        raise FailedPrecondition(
            f"{output.place} is no output of a batch: name the folder or bucket that whence batch wrote to.",
            reason="NO_BATCH_OUTPUT",
        ) from failure
    if version != VERSION:
        raise FailedPrecondition(
            f"{output.place} has schema version {version}, and this SDK reads {VERSION}: use the version of the SDK "
            "that wrote it.",
            reason="OTHER_SCHEMA_VERSION",
        )
    return manifest


async def read_table(
    output: Output, commit: Commit, table: str, columns: Sequence[str] | None = None
) -> pa.Table | None:
    """A table of a chunk; None if it has no rows."""
    file = commit.files.get(table)
    if file is None:
        return None
    content = await output.get(file.name)
    if len(content) != file.byte_count:
        raise DataLoss(f"{file.name} is not what was written: delete the output and start again.")
    return await asyncio.to_thread(
        lambda: pq.ParquetFile(pa.BufferReader(content)).read(columns=None if columns is None else list(columns))
    )


async def _gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return await asyncio.gather(*work)


def _groups(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def block_on(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, within a running loop (as in notebooks), too; an interrupt cancels it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def cancellable() -> T:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await work

    with ThreadPoolExecutor(1, thread_name_prefix="whence-batch") as executor:
        ending = executor.submit(lambda: asyncio.run(cancellable()))
        try:
            return ending.result()
        except KeyboardInterrupt:
            for loop, task in running:
                if task is not None:
                    loop.call_soon_threadsafe(task.cancel)
            raise
