"""What users call; the extra ``whence[batch]`` is needed from the call on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from whence._batch.records import BatchSummary, Progress
from whence._explanation import ConceptScope, Estimator, InputMethod, MapKind, MapSize, Order

if TYPE_CHECKING:
    import pyarrow as pa

    from whence._channel import TLS


def explain_batch(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    bank: str,
    target: int | str | None = None,
    top_k: int = 10,
    order: Order = "contribution",
    estimator: Estimator = "gradient",
    maps: MapKind | Sequence[MapKind] = (),
    map_size: MapSize = "grid",
    substitute: bool | None = None,
    input_method: InputMethod = "gradient",
    concepts: ConceptScope = "target",
    keys: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shard: tuple[int, int] = (1, 1),
    chunk_size: int | None = None,
    refresh: bool = False,
    retry_failed: bool = False,
    patience_s: float = 900.0,
    progress: Callable[[Progress], None] | None = None,
    dry_run: bool = False,
    address: str = "localhost:9000",
    timeout_s: float = 30.0,
    token: str | Callable[[], str] | None = None,
    tls: TLS | bool | None = None,
    application: str = "whence",
) -> BatchSummary:
    """Explain all images of a folder or bucket; call it again to go on after whatever stopped it.

    Every object ends exactly once, among the results or the failures. What is finished is never read again. Options of
    the explanations are those of `Client.explain`, those of the connection those of `Client`.

    Parameters
    ----------
    source
        A folder, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.
    output
        Likewise; read it with `read_batch`.
    maps
        Which maps to write, as float16; none by default, since they take far more room than all else.
    keys
        A file of keys, one a line, relative to the source or whole; ``-`` for standard input. Default: all there are.
    include, exclude
        Patterns such as ``*.jpg``: only keys that match one of the first, and none of the second.
    shard
        ``(i, n)``: do the i-th of n shares, i from 1; runs may also share an output without it.
    chunk_size
        Images that are committed together. Default: by the number of images, between 16 and 1000.
    refresh
        List the source again: explain what is new or changed, drop what is gone.
    retry_failed
        Try failures again that may pass.
    patience_s
        How long to wait for a service or a store that is away, in seconds.
    progress
        Called a few times a second; what it raises ends the run.
    dry_run
        Only count.

    Raises
    ------
    WhenceError
        One of its subclasses, by what made going on useless. What is committed stays.
    """
    from whence._batch import run  # needs the extra, which importing whence must not
    from whence._batch.locations import parse
    from whence._batch.planning import Selection, Shard
    from whence._batch.reader import block_on
    from whence._batch.service import Connection, Options

    chosen = (maps,) if isinstance(maps, str) else tuple(maps)
    job = run.Job(
        source=parse(source),
        output=parse(output),
        options=Options(target, top_k, order, estimator, chosen, map_size, substitute, input_method, concepts),
        selection=Selection(None if keys is None else os.fspath(keys), tuple(include), tuple(exclude)),
        shard=Shard(*shard),
        chunk_size=chunk_size,
        refresh=refresh,
        retry_failed=retry_failed,
        timeout_s=timeout_s,
        patience_s=patience_s,
        dry_run=dry_run,
    )
    run.check(job, bank)
    return block_on(run.ask_service(job, Connection(address, timeout_s, token, tls, application), bank, progress))


def read_batch(
    path: str | os.PathLike[str],
    table: Literal["results", "failures", "maps"] = "results",
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Read a table of a batch's output; each key is in results or in failures, once.

    Parameters
    ----------
    path
        The output folder or bucket that `explain_batch` was given. It may be read while the batch runs: then it holds
        what is finished.
    table
        ``results`` (one row an image), ``failures`` or ``maps``.
    columns
        Which columns to read. Default: all.

    Returns
    -------
    pyarrow.Table
        With the schema that the documentation of batches gives; in no particular order.

    Raises
    ------
    FailedPrecondition
        If there is no batch output, or one of a schema that this version cannot read.
    InvalidArgument
        If there is no such table or column.
    """
    from whence._batch.reader import read

    return read(path, table, columns)
