"""Where images come from: what there is, and reading one of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from whence._batch.locations import Location
from whence._batch.store_errors import from_store
from whence._errors import NotFound, missing_extra

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class Listed(NamedTuple):
    """An object as it was listed."""

    key: str
    """Relative to the source."""
    etag: str | None
    """Names the content; None, as is the size, where a list names a key that there is not."""
    size: int | None
    """In bytes."""
    refused: bool = False
    """Whether the key is no text; it is then written with escapes, and cannot be read."""


class Content(NamedTuple):
    """An object as it was read."""

    data: bytes
    etag: str | None


class Source(Protocol):
    """A folder or a part of a bucket to read from."""

    place: Location

    def list(self) -> Iterator[Listed]:
        """All objects, in any order; blocks."""

    async def head(self, key: str) -> Listed | None:
        """One object without its content; None if there is none."""

    async def read(self, key: str) -> Content:
        """One object; raises `NotFound` if it is gone."""

    async def check(self) -> None:
        """See that the store answers; raises why it does not."""


class LocalSource:
    """Files below a folder. Links to files are followed, links to folders are not: they may lead in circles."""

    def __init__(self, place: Location) -> None:
        self.place = place
        self._root = Path(place.prefix)
        if not self._root.is_dir():
            raise NotFound(f"There is no folder {place}: correct the name of the source.", reason="NO_SUCH_FOLDER")

    def list(self) -> Iterator[Listed]:
        folders = [""]
        try:
            while folders:
                folder = folders.pop()
                with os.scandir(self._root / folder) as entries:
                    for entry in entries:
                        name = f"{folder}{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(f"{name}/")
                        elif entry.is_file():
                            yield _listed(name, entry.stat())
        except OSError as failure:
            raise from_store(failure, self.place) from failure

    async def head(self, key: str) -> Listed | None:
        try:
            path = self._path(key)
            return _listed(key, path.stat()) if path.is_file() else None
        except (OSError, ValueError, NotFound):
            return None

    async def read(self, key: str) -> Content:
        return await asyncio.to_thread(self._read, key)

    async def check(self) -> None:
        try:
            with os.scandir(self._root):
                pass
        except OSError as failure:
            raise from_store(failure, self.place) from failure

    def _read(self, key: str) -> Content:
        try:
            with self._path(key).open("rb") as file:
                return Content(file.read(), _etag(os.fstat(file.fileno())))
        except (OSError, ValueError) as failure:
            raise from_store(failure, key) from failure

    def _path(self, key: str) -> Path:
        """The file of a key; keys of lists and of outputs may name what is not below the folder."""
        if key.startswith("/") or ".." in key.split("/"):
            raise NotFound(f"There is nothing at {key} below {self.place}.", reason="NO_SUCH_OBJECT")
        return self._root / key


class StoreSource:
    """Objects of any store that obstore knows, Google's above all."""

    def __init__(self, store: ObjectStore, place: Location) -> None:
        self._store = store
        self.place = place

    def list(self) -> Iterator[Listed]:
        import obstore

        root = f"{self.place.prefix}/" if self.place.prefix else ""
        try:
            for page in obstore.list(self._store, self.place.prefix or None, chunk_size=1000):
                for found in page:
                    yield Listed(found["path"][len(root) :], found["e_tag"], found["size"])
        except Exception as failure:
            raise from_store(failure, self.place) from failure

    async def head(self, key: str) -> Listed | None:
        import obstore

        try:
            found = await obstore.head_async(self._store, self.place.full_key(key))
        except FileNotFoundError:
            return None
        except Exception as failure:
            raise from_store(failure, self.place) from failure
        return Listed(key, found["e_tag"], found["size"])

    async def read(self, key: str) -> Content:
        import obstore

        try:
            found = await obstore.get_async(self._store, self.place.full_key(key))
            return Content(bytes(await found.bytes_async()), found.meta["e_tag"])
        except Exception as failure:
            raise from_store(failure, key) from failure

    async def check(self) -> None:
        import obstore

        try:
            async for _ in obstore.list(self._store, self.place.prefix or None, chunk_size=1):
                return
        except Exception as failure:
            raise from_store(failure, self.place) from failure


def open_source(place: Location) -> Source:
    """Open a source.

    Raises
    ------
    NotFound
        If there is no such folder or bucket.
    Unauthenticated, PermissionDenied
        If the store does not let us in.
    """
    if place.scheme == "file":
        return LocalSource(place)
    try:
        from obstore.store import GCSStore
    except ImportError as failure:
        raise missing_extra("batch", "obstore") from failure
    if place.scheme == "s3":
        from whence._batch.s3 import S3Source

        return S3Source(place)
    try:
        return StoreSource(GCSStore(place.bucket), place)
    except Exception as failure:
        raise from_store(failure, place) from failure


def _listed(name: str, status: os.stat_result) -> Listed:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return Listed(os.fsencode(name).decode("utf-8", "backslashreplace"), _etag(status), status.st_size, True)
    return Listed(name, _etag(status), status.st_size)


def _etag(status: os.stat_result) -> str:
    """What changes whenever a file is written anew."""
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
