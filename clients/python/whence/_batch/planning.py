"""Agreeing on what there is to do: workers that begin at the same time end with the same manifest and plan."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from whence._batch import commits, plan
from whence._batch.listing import Filter, Listing
from whence._batch.output import Output
from whence._batch.plan import Plan
from whence._batch.reader import read_manifest
from whence._batch.sources import Listed, Source
from whence._batch.store_errors import no_conditional_create
from whence._errors import FailedPrecondition, InvalidArgument, NotFound

_HEADS_AT_ONCE = 64


@dataclass(frozen=True)
class Selection:
    """Which objects of a source are meant."""

    keys: str | None = None
    """File with a key a line, or ``-`` for standard input; None for all there are."""
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()


@dataclass(frozen=True)
class Shard:
    """A worker's share of the chunks."""

    number: int
    """From 1."""
    count: int

    def has(self, chunk: int) -> bool:
        return chunk % self.count == self.number - 1


@dataclass(frozen=True)
class Draft:
    """A plan that is not in force yet."""

    plan: Plan
    keys: Path | None = None
    """File of its keys on this machine; None where those of the plan before are its, too."""


async def list_source(source: Source, selection: Selection, listing: Listing) -> None:
    """Put all objects that are meant into a listing.

    Raises
    ------
    NotFound
        If there are none.
    InvalidArgument
        If the list of keys cannot be read, or names what is not of the source.
    """
    wanted = Filter(selection.include, selection.exclude)
    if selection.keys is None:
        stopped = threading.Event()  # who interrupts a long listing does not wait for its end
        objects = takewhile(lambda _: not stopped.is_set(), source.list())
        try:
            await asyncio.to_thread(listing.add, (item for item in objects if wanted(item.key)))
        finally:
            stopped.set()
    else:
        keys = (key for key in _named(selection.keys, str(source.place)) if wanted(key))
        while some := [key for key, _ in zip(keys, range(1000))]:  # noqa: B905  of the endless the first thousand
            listing.add(await _heads(source, some))
    if listing.totals()[0] == 0:
        raise NotFound(
            f"There is nothing at {source.place} that is meant: correct the prefix, or the patterns that include and "
            "exclude keys.",
            reason="EMPTY_SOURCE",
        )


async def agree(output: Output, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or see that the one that is there says the same.

    Raises
    ------
    FailedPrecondition
        If another run, of another bank or of other options, wrote here; or the store cannot create without
        overwriting.
    """
    content = json.dumps({**manifest}, indent=2).encode()
    await output.create("manifest.json", content)
    # A store that ignores the condition would let two workers win every race: one that knows it refuses other content.
    if await output.create("manifest.json", content + b"\n"):
        raise no_conditional_create(output.place)
    check_agreement(manifest, await read_manifest(output), str(output.place))


def check_agreement(asked: Mapping[str, Any], found: Mapping[str, Any], place: str) -> None:
    """Refuse an output that was begun with something else."""
    for name in ("source", "bank", "bank_digest", "options", "include", "exclude", "by_list"):
        ours, theirs = asked[name], found.get(name)
        if ours == theirs:
            continue
        remedy = "choose another output, or ask the same again"
        if name == "bank_digest":
            remedy = f"ask for bank {found['bank']}@{theirs}, or choose another output"
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            ours, theirs = _unlike(ours, theirs), _unlike(theirs, ours)
        raise FailedPrecondition(
            f"{place} was begun with {name} {theirs!r}, and this asks for {ours!r}: {remedy}.",
            reason="OUTPUT_OF_ANOTHER_RUN",
            metadata={"field": name, "found": str(theirs), "asked": str(ours)},
        )


def _unlike(some: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Of some options those that others do not have, or have otherwise."""
    return {name: value for name, value in some.items() if name not in others or others[name] != value}


async def settle(output: Output, derive: Callable[[Plan | None], Awaitable[Draft | Plan]]) -> Plan:
    """Put the next plan in force, as derived from the one before; where another worker was faster, derive anew.

    Parameters
    ----------
    derive
        The next plan, or the one before where that will do.
    """
    while True:
        before = await plan.latest(output)
        draft = await derive(before)
        if isinstance(draft, Plan):
            return draft
        if draft.keys is not None:
            await output.put(draft.plan.keys, draft.keys)
        if await output.create(draft.plan.name, draft.plan.encode()):
            return draft.plan
        if draft.keys is not None:
            await output.delete([draft.plan.keys])


def first(listing: Listing, folder: Path, chunk_size: int | None, *, maps: bool) -> Draft:
    """The plan of a new output; ``maps`` says whether there will be any."""
    objects, size = listing.totals()
    per_chunk = chunk_size or plan.default_chunk_size(objects, maps=maps)
    chunks = -(-objects // per_chunk)
    path = folder / "keys.parquet"
    sizes, per_block = plan.write_keys(path, plan.chunked(listing.objects(), per_chunk), chunks, per_chunk)
    return Draft(Plan(1, _keys_name(1), size, per_chunk, per_block, sizes, [1] * chunks), path)


async def refreshed(output: Output, before: Plan, listing: Listing, folder: Path) -> Draft | Plan:
    """The plan after a new listing: what changed is done anew, what is new is added, what is gone is dropped."""
    old = await fetch_keys(output, before, folder)
    finished = await commits.done(output)
    return await asyncio.to_thread(_refreshed, before, old, listing, folder, finished)


def _refreshed(before: Plan, old: Path, listing: Listing, folder: Path, finished: commits.Done) -> Draft | Plan:
    listing.compare(plan.planned(old, before))
    changed, more = listing.changed_chunks(), listing.new_count()
    if not changed and not more:
        return before
    number, known = before.number + 1, len(before.sizes)
    chunks = known + -(-more // before.chunk_size)
    rows = chain(listing.kept(), plan.chunked(listing.new(), before.chunk_size, known))
    path = folder / f"keys-{number}.parquet"
    sizes, per_block = plan.write_keys(path, rows, chunks, before.chunk_size)
    revisions = [number if chunk in changed else revision for chunk, revision in enumerate(before.revisions)]
    after = Plan(
        number=number,
        keys=_keys_name(number),
        byte_count=listing.totals()[1],
        chunk_size=before.chunk_size,
        chunks_per_block=per_block,
        sizes=sizes,
        revisions=revisions + [number] * (chunks - known),
        retries=_pending_retries(before, finished),
    )
    return Draft(after, path)


async def retried(output: Output, before: Plan, shard: Shard) -> Draft | Plan:
    """The plan in which failures that may pass are tried again, as far as they are the shard's.

    Only the shard's own, so that shards that are all told to try again do not undo each other's work.
    """
    finished = await commits.done(output)
    pending = _pending_retries(before, finished)
    mine = sorted({chunk for chunk in finished.chunks() if shard.has(chunk)}.difference(pending))
    again = {commit.chunk async for commit in commits.read(output, finished, mine) if commit.retryable}
    if not again:
        return before
    number = before.number + 1
    revisions = [number if chunk in again else revision for chunk, revision in enumerate(before.revisions)]
    return Draft(replace(before, number=number, revisions=revisions, retries=sorted({*pending, *again})))


async def fetch_keys(output: Output, wanted: Plan, folder: Path) -> Path:
    """A plan's file of keys on this machine."""
    path = folder / Path(wanted.keys).name
    if not path.exists():
        await output.fetch(wanted.keys, path)
    return path


def _pending_retries(before: Plan, finished: commits.Done) -> list[int]:
    """Chunks that are still to be tried again."""
    return [chunk for chunk in before.retries if finished[chunk] < before.revisions[chunk]]


def _keys_name(number: int) -> str:
    return f"plan/r{number}-{uuid.uuid4().hex[:12]}.parquet"


async def _heads(source: Source, keys: Sequence[str]) -> list[Listed]:
    """What is known of objects that were named; those that there are not keep their place, to end as failures."""
    room = asyncio.Semaphore(_HEADS_AT_ONCE)

    async def head(key: str) -> Listed:
        async with room:
            return await source.head(key) or Listed(key, None, None)

    return await asyncio.gather(*map(head, keys))


def _named(file: str, place: str) -> Iterator[str]:
    """Keys of a list, relative to the source."""
    try:
        with nullcontext(sys.stdin) if file == "-" else Path(file).open(encoding="utf-8") as lines:
            for line in lines:
                key = line.rstrip("\r\n")
                if key:
                    yield _relative(key, place.rstrip("/"))
    except (OSError, UnicodeDecodeError) as failure:
        raise InvalidArgument(
            f"The list of keys {file} cannot be read as UTF-8 text: {failure}.", reason="UNREADABLE_FILE"
        ) from failure


def _relative(key: str, place: str) -> str:
    absolute = "://" in key or (key.startswith("/") and "://" not in place)
    if not absolute:
        return key
    if not key.startswith(f"{place}/"):
        raise InvalidArgument(f"The list names {key}, which is not below the source {place}.", reason="FOREIGN_KEY")
    return key[len(place) + 1 :]
