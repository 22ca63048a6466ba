"""Where results go: few operations, of which one decides everything, ``create``."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from whence._batch.locations import Location
from whence._batch.store_errors import from_store
from whence._errors import NotFound, Unavailable, missing_extra

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_ATTEMPTS = 6


class Output(Protocol):
    """A folder or a part of a bucket to write to; names are relative to it."""

    place: Location

    async def create(self, name: str, content: bytes) -> bool:
        """Write an object if there is none of this name; whether the one that is there is this."""

    async def put(self, name: str, file: Path) -> None:
        """Write a file whole, or not at all."""

    async def get(self, name: str) -> bytes:
        """Read an object; raises `NotFound` if there is none."""

    async def fetch(self, name: str, file: Path) -> None:
        """Copy an object to this machine, however large it is."""

    def names(self, folder: str) -> AsyncIterator[str]:
        """Names of all objects within a folder, in any order."""

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are gone are no failure."""


class StoredOutput:
    """An output in any store that obstore knows."""

    def __init__(self, store: ObjectStore, place: Location) -> None:
        self._store = store
        self.place = place

    async def create(self, name: str, content: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        for attempt in range(_ATTEMPTS):
            try:
                await obstore.put_async(self._store, name, content, mode="create")
            except AlreadyExistsError:
                try:
                    # A store's answer may be lost and the request repeated; then what is there is what was sent.
                    return await self.get(name) == content
                except NotFound:  # two wrote at the same time, and S3 let neither win
                    await asyncio.sleep(2**attempt * random.uniform(0.1, 0.2))
            except Exception as failure:
                raise from_store(failure, self.place) from failure
            else:
                return True
        raise Unavailable(f"{self.place} does not let {name} be created: run the same again.", reason="STORE_CONFLICT")

    async def put(self, name: str, file: Path) -> None:
        import obstore

        try:
            await obstore.put_async(self._store, name, file)
        except Exception as failure:
            raise from_store(failure, self.place) from failure

    async def get(self, name: str) -> bytes:
        import obstore

        try:
            found = await obstore.get_async(self._store, name)
            return bytes(await found.bytes_async())
        except FileNotFoundError as failure:
            error = from_store(failure, self.place)
            if error.reason == "NO_SUCH_OBJECT":
                error = NotFound(f"There is no {name} in {self.place}.", reason="NO_SUCH_OBJECT")
            raise error from failure
        except Exception as failure:
            raise from_store(failure, self.place) from failure

    async def fetch(self, name: str, file: Path) -> None:
        import obstore

        try:
            found = await obstore.get_async(self._store, name)
            with file.open("wb") as target:
                async for piece in found.stream():
                    target.write(piece)
        except Exception as failure:
            raise from_store(failure, self.place) from failure

    async def names(self, folder: str) -> AsyncIterator[str]:
        import obstore

        try:
            async for page in obstore.list(self._store, folder, chunk_size=1000):
                for found in page:
                    yield found["path"]
        except Exception as failure:
            raise from_store(failure, self.place) from failure

    async def delete(self, names: Sequence[str]) -> None:
        import obstore

        for name in names:
            try:
                await obstore.delete_async(self._store, name)
            except FileNotFoundError:
                continue
            except Exception as failure:
                raise from_store(failure, self.place) from failure


def open_output(place: Location, *, create: bool) -> StoredOutput:
    """Open an output.

    Parameters
    ----------
    create
        Make the folder where there is none; buckets are never made.

    Raises
    ------
    NotFound
        If there is no such folder or bucket.
    """
    try:
        from obstore.store import GCSStore, LocalStore
    except ImportError as failure:
        raise missing_extra("batch", "obstore") from failure
    if place.scheme == "s3":
        from whence._batch import s3

        return StoredOutput(s3.Bucket(place).store(place.prefix), place)
    try:
        if place.scheme == "gs":
            return StoredOutput(GCSStore(place.bucket, prefix=place.prefix or None), place)
        if not create and not Path(place.prefix).is_dir():
            raise NotFound(f"There is no folder {place}.", reason="NO_SUCH_FOLDER")
        return StoredOutput(LocalStore(place.prefix, mkdir=True), place)
    except Exception as failure:
        raise from_store(failure, place) from failure
