"""What the repository holds, read off the event loop and trusted for a short while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from concepts.bank import Bank, Exemplar
from concepts.errors import CorruptData, InvalidModel, UnknownModel, WhenceError
from concepts.model import ModelSpec
from concepts.repository import BankSummary, BankVersion, Repository
from service.memo import Memo

if TYPE_CHECKING:
    from concepts.clip import Clip

_log = logging.getLogger(__name__)

Value = TypeVar("Value")

_NAMED = 64
"""Banks whose concepts are kept in memory for searches."""
_CLIPS = 2
"""CLIPs kept in memory for searches."""


class Catalogue:
    """Looks up models and banks.

    Parameters
    ----------
    repository
        Where they are.
    refresh_s
        How long what was read is trusted, in seconds: a new version is seen after at most this long.
    """

    def __init__(self, repository: Repository, *, refresh_s: float) -> None:
        self._repository = repository
        self._versions: Memo[str, BankVersion] = Memo(
            lambda reference: _in_thread(lambda: repository.resolve(reference)),
            limit=10_000,
            keep_s=refresh_s,
            keep_failure_s=refresh_s,
        )
        self._specs: Memo[str, ModelSpec] = Memo(
            lambda model: _in_thread(lambda: repository.model_spec(model)),
            limit=1_000,
            keep_s=refresh_s,
            keep_failure_s=refresh_s,
        )
        self._banks: Memo[BankVersion, Bank] = Memo(
            lambda version: _in_thread(lambda: repository.load(version)), limit=8, keep_failure_s=refresh_s
        )
        # A version never changes.
        self._summaries: Memo[BankVersion, BankSummary] = Memo(
            lambda version: _in_thread(lambda: repository.summary(version)), limit=256, keep_failure_s=refresh_s
        )
        self._served: Memo[str, list[BankVersion]] = Memo(
            lambda model: _in_thread(lambda: repository.banks(model or None)),
            limit=1_000,
            keep_s=refresh_s,
            keep_failure_s=refresh_s,
        )
        self._named: Memo[BankVersion, Bank] = Memo(
            lambda version: _in_thread(lambda: repository.named(version)), limit=_NAMED, keep_failure_s=refresh_s
        )
        self._clips: Memo[str, Clip] = Memo(
            lambda digest: _in_thread(lambda: _text_tower(repository, digest)), limit=_CLIPS, keep_failure_s=refresh_s
        )

    async def version(self, reference: str) -> BankVersion:
        """Return the version that ``model/layer/name`` or ``model/layer/name@digest`` means now.

        Raises
        ------
        InvalidInput, UnknownBank
            If the reference is malformed, or there is no such bank or version.
        """
        return await self._versions.get(reference)

    async def spec(self, model: str) -> ModelSpec:
        """Return a model's description.

        Raises
        ------
        UnknownModel, CorruptData
            If there is none, or it cannot be read.
        """
        return await self._specs.get(model)

    async def models(self) -> list[ModelSpec]:
        """Return the descriptions of all models, sorted by name; damaged ones are left out."""
        specs = []
        for name in await _in_thread(self._repository.models):
            try:
                specs.append(await self.spec(name))
            except (CorruptData, InvalidModel, UnknownModel) as error:
                _log.error("not listed: %s", error)
        return specs

    async def banks(self, model: str = "") -> list[BankSummary]:
        """Return the served version of every bank, optionally of one model; damaged ones are left out."""

        def read() -> list[BankSummary]:
            summaries = []
            for version in self._repository.banks(model or None):
                try:
                    summaries.append(self._repository.summary(version))
                except CorruptData as error:
                    _log.error("not listed: %s", error)
            return summaries

        return await _in_thread(read)

    async def summary(self, reference: str) -> BankSummary:
        """Return what can be said of a bank without loading it."""
        return await self._summaries.get(await self.version(reference))

    async def bank(self, version: BankVersion) -> Bank:
        """Return a whole bank, every byte checked."""
        return await self._banks.get(version)

    async def pictures(self, version: BankVersion, exemplars: Iterable[Exemplar]) -> dict[str, bytes]:
        """Return the WebP files of exemplars, by file."""
        return await _in_thread(lambda: self._repository.pictures(version, exemplars))

    async def served(self, model: str = "") -> list[BankVersion]:
        """Return the served version of every bank, optionally of one model; see ``Repository.banks``."""
        return await self._served.get(model)

    async def named(self, version: BankVersion) -> Bank:
        """Return a bank's concepts and embeddings, without the rest of it; see ``Repository.named``."""
        if not version.digest:
            version = await self.version(version.reference)  # says what is wrong
        return await self._named.get(version)

    async def has_clip(self, digest: str) -> bool:
        """Whether the repository has the CLIP of a digest."""
        return await _in_thread(lambda: self._repository.has_clip(digest))

    async def clip(self, digest: str) -> Clip:
        """Return a CLIP that embeds texts alone.

        Raises
        ------
        WhenceError
            If it is damaged.
        """
        return await self._clips.get(digest)


def _text_tower(repository: Repository, digest: str) -> Clip:
    """Load a CLIP on the CPU, and drop the half of it that sees."""
    try:
        clip = repository.load_clip(digest)
    except WhenceError:
        raise
    except Exception as error:  # whatever a strange configuration makes open_clip raise
        raise CorruptData(f"CLIP {digest[:12]} cannot be built") from error
    del clip.module.visual
    return clip


async def _in_thread(read: Callable[[], Value]) -> Value:
    """Read files without holding up the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, read)
