"""The plan of a batch: which keys there are, in which chunks, and at which revision each chunk has to be.

A plan never changes; refreshing or trying again makes the next one. A chunk keeps its number for ever. It is done when
a commit of its revision, or of a later one, exists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from whence._batch.output import Output
from whence._batch.sources import Listed
from whence._errors import DataLoss, missing_extra

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as absent:
    raise missing_extra("batch", "pyarrow") from absent

_KEYS_PER_BLOCK = 20_000
"""Keys that are in memory at a time."""

_PLAN = re.compile(r"plan/r(\d+)\.json")
_KEYS = re.compile(r"plan/r(\d+)-\w+\.parquet")
_SCHEMA = pa.schema(
    [
        ("chunk", pa.int32()),
        pa.field("key", pa.string(), nullable=False),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("refused", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What there is to do. Keys lie in a Parquet file beside it."""

    number: int
    """1 for the first."""
    keys: str
    """Name of the file of keys in the output."""
    byte_count: int
    """Size of all objects."""
    chunk_size: int
    chunks_per_block: int
    """Of a row group of the file of keys."""
    sizes: Sequence[int]
    """Keys in each chunk."""
    revisions: Sequence[int]
    """Number of the plan that last asked for each chunk to be done."""
    retries: list[int] = field(default_factory=list)
    """Chunks of which the failures are to be tried again, too."""

    @property
    def objects(self) -> int:
        return sum(self.sizes)

    @property
    def name(self) -> str:
        return plan_name(self.number)

    @property
    def listing(self) -> int:
        """Number of the plan for which the source was listed: that which wrote the keys."""
        match = _KEYS.fullmatch(self.keys)
        return int(match[1]) if match else self.number

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def plan_name(number: int) -> str:
    """Name of a plan in the output."""
    return f"plan/r{number}.json"


def decode(content: bytes) -> Plan:
    """Read a plan."""
    try:
        return Plan(**json.loads(content))
    except (TypeError, ValueError) as failure:
        raise DataLoss("The plan of the output cannot be read: use another output.", reason="CORRUPT_OUTPUT") from (
            failure
        )


async def latest(output: Output) -> Plan | None:
    """The plan in force; None before there is one."""
    found = [match async for name in output.names("plan") if (match := _PLAN.fullmatch(name)) is not None]
    return decode(await output.get(plan_name(max(int(match[1]) for match in found)))) if found else None


def default_chunk_size(objects: int, *, maps: bool) -> int:
    """Keys in a chunk: large files for large batches, little lost and much to share out for small ones.

    A chunk with maps may take hundreds of times as much room.
    """
    return min(max(objects // 256, 16), 100 if maps else 1000)


def chunked(objects: Iterable[Listed], size: int, first: int = 0) -> Iterator[tuple[int, Listed]]:
    """Number objects by chunk, from a first number on."""
    return ((first + place // size, item) for place, item in enumerate(objects))


def write_keys(path: Path, rows: Iterable[tuple[int, Listed]], chunks: int, chunk_size: int) -> tuple[list[int], int]:
    """Write the file of keys; rows come by chunk. Return keys in each chunk, and chunks in each row group."""
    per_block = max(_KEYS_PER_BLOCK // chunk_size, 1)
    sizes = [0] * chunks
    blocks = groupby(rows, key=lambda row: row[0] // per_block)
    following = next(blocks, None)
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        for block in range(-(-chunks // per_block)):
            found: list[tuple[int, Listed]] = []
            if following is not None and following[0] == block:
                found = list(following[1])
                following = next(blocks, None)
            for chunk, _ in found:
                sizes[chunk] += 1
            writer.write_table(_block(found))
    return sizes, per_block


def read_keys(path: Path, plan: Plan, block: int) -> dict[int, list[Listed]]:
    """Keys of the chunks of one block."""
    first = block * plan.chunks_per_block
    chunks: dict[int, list[Listed]] = {
        number: [] for number in range(first, min(first + plan.chunks_per_block, len(plan.sizes)))
    }
    with pq.ParquetFile(path) as file:
        columns = file.read_row_group(block).to_pydict()
    for row in zip(*(columns[name] for name in _SCHEMA.names), strict=True):
        chunks[row[0]].append(Listed(*row[1:]))
    return chunks


def block_count(plan: Plan) -> int:
    """Number of row groups of the file of keys."""
    return -(-len(plan.sizes) // plan.chunks_per_block)


def planned(path: Path, plan: Plan) -> Iterator[tuple[int, Listed]]:
    """All keys, by chunk."""
    for block in range(block_count(plan)):
        for number, items in read_keys(path, plan, block).items():
            yield from ((number, item) for item in items)


def _block(rows: list[tuple[int, Listed]]) -> Any:
    columns: Sequence[Sequence[Any]] = list(zip(*((chunk, *item) for chunk, item in rows), strict=True))
    columns = columns or [()] * len(_SCHEMA)
    return pa.table([pa.array(column, of.type) for column, of in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
