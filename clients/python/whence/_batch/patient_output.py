"""An output whose store may be away for a while."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from whence._batch.output import Output
from whence._batch.patience import Patience
from whence._errors import Unavailable

T = TypeVar("T")


class PatientOutput:
    """An output that tries again what its store does not answer.

    Any operation may be done twice: a file is put again under the same name, and ``create`` knows its own content.

    Parameters
    ----------
    patience_s
        How long to wait for the store, in seconds.
    """

    def __init__(self, output: Output, patience_s: float) -> None:
        self.place = output.place
        self._output, self._patience = output, Patience(patience_s)

    @property
    def waiting(self) -> str:
        """Why nothing is written; empty while all is well."""
        return self._patience.reason

    async def create(self, name: str, content: bytes) -> bool:
        return await self._patiently(lambda: self._output.create(name, content))

    async def put(self, name: str, file: Path) -> None:
        await self._patiently(lambda: self._output.put(name, file))

    async def get(self, name: str) -> bytes:
        return await self._patiently(lambda: self._output.get(name))

    async def fetch(self, name: str, file: Path) -> None:
        await self._patiently(lambda: self._output.fetch(name, file))

    async def names(self, folder: str) -> AsyncIterator[str]:
        for name in await self._patiently(lambda: self._listed(folder)):
            yield name

    async def delete(self, names: Sequence[str]) -> None:
        await self._patiently(lambda: self._output.delete(names))

    async def _listed(self, folder: str) -> list[str]:
        return [name async for name in self._output.names(folder)]

    async def _patiently(self, operation: Callable[[], Awaitable[T]]) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                result = await operation()
            except Unavailable as error:
                await self._patience.pause(error, attempt)
            else:
                self._patience.succeeded()
                return result
