"""A batch from the question to the summary."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import whence
from whence import _requests
from whence._batch import commits, plan, planning, reader, schema
from whence._batch.images import Images
from whence._batch.listing import Listing
from whence._batch.locations import Location, refuse_overlap
from whence._batch.output import Output, StoredOutput, open_output
from whence._batch.patient_output import PatientOutput
from whence._batch.plan import Plan
from whence._batch.planning import Selection, Shard
from whence._batch.records import BatchSummary, Progress
from whence._batch.service import Connection, Explain, Options, explainer, find_bank
from whence._batch.sources import Source, open_source
from whence._batch.worker import Worker
from whence._errors import InvalidArgument, NotFound, ResourceExhausted
from whence._inventory import Bank


@dataclass(frozen=True)
class Job:
    """What is asked of a batch."""

    source: Location
    output: Location
    options: Options = Options()  # noqa: RUF009  it is frozen
    selection: Selection = Selection()  # noqa: RUF009
    shard: Shard = Shard(1, 1)  # noqa: RUF009
    chunk_size: int | None = None
    refresh: bool = False
    retry_failed: bool = False
    timeout_s: float = 30.0
    patience_s: float = 900.0
    dry_run: bool = False


def check(job: Job, bank: str) -> None:
    """Refuse what cannot be right, before anything is asked."""
    job.options.check(bank)
    _requests.timeout(job.timeout_s)
    _requests.timeout(job.patience_s)
    if job.chunk_size is not None:
        _requests.at_least_one("chunk_size", job.chunk_size)
    number, count = job.shard.number, job.shard.count
    if not 1 <= number <= count:
        raise InvalidArgument(f"shard is (i, n) with i from 1 to n, as in (2, 8); not ({number}, {count}).")
    refuse_overlap(job.source, job.output)


async def ask_service(
    job: Job, connection: Connection, reference: str, progress: Callable[[Progress], None] | None
) -> BatchSummary:
    """Do a job with a real service and real stores; see `whence.explain_batch`."""
    bank, request_bytes = await find_bank(connection, reference)
    source = await asyncio.to_thread(open_source, job.source)
    output: Output = await asyncio.to_thread(_open, job)
    async with connection.client() as client:
        explain = explainer(client, f"{bank.reference}@{bank.digest}", job.options)
        return await run_job(job, source, output, bank, explain, progress, request_bytes)


async def run_job(
    job: Job,
    source: Source,
    output: Output,
    bank: Bank,
    explain: Explain,
    progress: Callable[[Progress], None] | None = None,
    request_bytes: int | None = None,
) -> BatchSummary:
    """Do a job with whatever explains, reads and stores.

    Parameters
    ----------
    bank
        As the service has it now; the output belongs to its digest.
    explain
        Asks about one image and this bank.
    request_bytes
        Largest request that the service takes, in bytes.
    """
    began_s = time.monotonic()
    output = PatientOutput(output, job.patience_s)
    with _temporary_folder() as folder:
        todo = await _prepare(job, source, output, bank, folder)
        finished_now = 0
        if not job.dry_run:
            images = Images(
                source, explain, timeout_s=job.timeout_s, patience_s=job.patience_s, request_bytes=request_bytes
            )
            worker = Worker(output, images, todo, job.shard, folder, progress)
            await worker.run()
            finished_now = worker.tally.finished_now
            todo = await plan.latest(output) or todo  # another run may have made the next one
        finished = await commits.done(output)
        summary = await _summary(job, bank, todo, output, finished)
        summary = replace(summary, finished_now=finished_now, seconds=time.monotonic() - began_s)
        if not job.dry_run and summary.complete:
            await _finish(output, summary, folder)
        return summary


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder of this machine for what is not committed yet."""
    try:
        with tempfile.TemporaryDirectory(prefix="whence-batch-") as folder:
            yield Path(folder)
    except (OSError, sqlite3.OperationalError) as failure:
        full = getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(failure)
        if not full:
            raise
        raise ResourceExhausted(
            "There is no room left for temporary files: make some, or name another folder by TMPDIR, and run the same "
            "again; what is committed stays.",
            reason="DISK_FULL",
        ) from failure


async def _prepare(job: Job, source: Source, output: Output, bank: Bank, folder: Path) -> Plan:
    """The plan to work on."""
    manifest = _manifest(job, bank)
    begun = await _found_manifest(output)
    if begun is not None:
        planning.check_agreement(manifest, begun, str(job.output))
    before = await plan.latest(output)
    with Listing(folder) as listing:
        if before is None or job.refresh:
            await planning.list_source(source, job.selection, listing)

        async def derive(found: Plan | None) -> planning.Draft | Plan:
            if found is None:
                return planning.first(listing, folder, job.chunk_size, maps=bool(job.options.maps))
            return await planning.refreshed(output, found, listing, folder) if job.refresh else found

        if job.dry_run:
            draft = await derive(before)
            return draft if isinstance(draft, Plan) else draft.plan
        await planning.agree(output, manifest)  # of what was begun, too: a store that was refused is refused again
        todo = await planning.settle(output, derive)
    if not job.retry_failed:
        return todo
    return await planning.settle(output, lambda found: planning.retried(output, found or todo, job.shard))


async def _found_manifest(output: Output) -> Mapping[str, Any] | None:
    """What the output was begun with; None where it was not."""
    try:
        await output.get("manifest.json")
    except NotFound as error:
        if error.reason != "NO_SUCH_OBJECT":
            raise
        return None
    return await reader.read_manifest(output)


def _manifest(job: Job, bank: Bank) -> dict[str, Any]:
    return {
        "schema_version": schema.VERSION,
        "source": str(job.source),
        "bank": bank.reference,
        "bank_digest": bank.digest,
        "model": bank.model,
        "model_digest": bank.weights_digest,
        "options": job.options.record(),
        "include": list(job.selection.include),
        "exclude": list(job.selection.exclude),
        "by_list": job.selection.keys is not None,
        "sdk_version": whence.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


async def _summary(job: Job, bank: Bank, todo: Plan, output: Output, finished: commits.Done) -> BatchSummary:
    """What the output holds."""
    explained = failed = 0
    reasons: Counter[str] = Counter()
    async for commit in commits.read(output, finished, finished.chunks()):
        explained += commit.explained
        failed += commit.failed
        reasons.update(commit.reasons)
    return BatchSummary(
        source=str(job.source),
        output=str(job.output),
        bank=bank.reference,
        bank_digest=bank.digest,
        revision=todo.number,
        objects=todo.objects,
        bytes=todo.byte_count,
        chunks=len(todo.sizes),
        chunks_done=sum(finished[chunk] >= revision for chunk, revision in enumerate(todo.revisions)),
        explained=explained,
        failed=failed,
        reasons=dict(reasons.most_common()),
        dry_run=job.dry_run,
    )


async def _finish(output: Output, summary: BatchSummary, folder: Path) -> None:
    """Leave nothing but what counts, so that whoever knows nothing of commits reads the same."""
    await commits.sweep(output)
    path = folder / "summary.json"
    path.write_text(json.dumps(asdict(summary), indent=2), encoding="utf-8")
    await output.put("summary.json", path)


def _open(job: Job) -> Output:
    """The output; counting makes no folder."""
    if job.dry_run and job.output.scheme == "file" and not Path(job.output.prefix).is_dir():
        from obstore.store import MemoryStore

        return StoredOutput(MemoryStore(), job.output)
    return open_output(job.output, create=True)
