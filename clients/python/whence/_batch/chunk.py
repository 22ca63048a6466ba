"""A chunk in progress: rows go to files of this machine; a commit makes them the chunk's, all at once."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from whence._batch import commits, schema
from whence._batch.output import Output
from whence._batch.sources import Listed
from whence._batch.verdicts import retryable
from whence._errors import WhenceError, missing_extra
from whence._explanation import Explanation

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError as absent:
    raise missing_extra("batch", "pyarrow") from absent

_ROWS, _MAP_ROWS = 128, 512
"""Rows of a row group; of maps fewer where they are large."""
_MAP_BYTES = 4 * 2**20


class _Table:
    """A table that grows on disk, a row group at a time."""

    def __init__(self, name: str, path: Path) -> None:
        self._name, self.path, self.rows = name, path, 0
        self._waiting: list[dict[str, Any]] = []
        self._waiting_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        self._waiting_bytes += row["values"].nbytes if self._name == "maps" else 0
        limit = _MAP_ROWS if self._name == "maps" else _ROWS
        if len(self._waiting) >= limit or self._waiting_bytes >= _MAP_BYTES:
            self._flush()

    def append(self, table: pa.Table) -> None:
        """Write rows as they are."""
        if table.num_rows:
            if self._writer is None:
                self._writer = pq.ParquetWriter(self.path, schema.SCHEMAS[self._name], compression="zstd")
            self._writer.write_table(table)
            self.rows += table.num_rows

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        rows, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if rows:
            self.append(schema.table(self._name, rows))


class Chunk:
    """One chunk at one revision, while it is worked on.

    Parameters
    ----------
    folder
        Of this machine, for its files until they are committed.
    worker
        An id that no other run has.
    """

    def __init__(self, number: int, revision: int, folder: Path, worker: str) -> None:
        self.number, self.revision, self._worker = number, revision, worker
        self.left = 0
        """Keys that have not ended yet."""
        self._tables = {name: _Table(name, folder / f"{name}-{number}-r{revision}.parquet") for name in commits.TABLES}
        self._reasons: Counter[str] = Counter()
        self._retryable = 0

    def explained(self, item: Listed, explanation: Explanation) -> None:
        """Take an answer."""
        self._tables["results"].add(schema.result(item, explanation))
        for row in schema.maps(item, explanation):
            self._tables["maps"].add(row)

    def failed(self, item: Listed, error: WhenceError) -> None:
        """Take a failure."""
        self._tables["failures"].add(schema.failure(item, error))
        self._reasons[error.reason] += 1
        self._retryable += retryable(error)

    def keep(self, table: str, rows: pa.Table) -> None:
        """Take rows of the revision before."""
        self._tables[table].append(rows)
        if table == "failures":
            self._reasons.update(rows["reason"].to_pylist())
            self._retryable += pc.sum(rows["retryable"]).as_py() or 0

    async def commit(self, output: Output) -> commits.Commit | None:
        """Write the files and make them count; None, and nothing is left, where another worker was faster."""
        files: dict[str, commits.File] = {}
        try:
            for name, table in self._tables.items():
                table.close()
                if table.rows:
                    target = commits.file_name(name, self.number, self.revision, self._worker)
                    await output.put(target, table.path)
                    files[name] = await asyncio.to_thread(_described, target, table)
            commit = commits.Commit(
                chunk=self.number,
                revision=self.revision,
                explained=self._tables["results"].rows,
                failed=self._tables["failures"].rows,
                retryable=self._retryable,
                reasons=dict(self._reasons),
                files=files,
            )
            won = await output.create(commits.done_name(self.number, self.revision), commit.encode())
        finally:
            self.discard()
        if not won:
            await output.delete([file.name for file in files.values()])
        return commit if won else None

    def discard(self) -> None:
        """Delete the files of this machine."""
        for table in self._tables.values():
            table.close()
            table.path.unlink(missing_ok=True)


def _described(name: str, table: _Table) -> commits.File:
    with table.path.open("rb") as file:
        digest = hashlib.sha256()
        for piece in iter(lambda: file.read(2**20), b""):
            digest.update(piece)
    return commits.File(name, table.rows, table.path.stat().st_size, digest.hexdigest())
