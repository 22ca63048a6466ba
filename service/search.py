"""Finds concepts by words, in all banks that can be searched."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from concepts.bank import Bank
from concepts.errors import CorruptData, NumericalFailure, UnsupportedOption, WhenceError
from concepts.repository import BankVersion
from service import matching
from service.catalogue import Catalogue
from service.cores import use_cores
from service.matching import Hit
from service.memo import Memo

Value = TypeVar("Value")

SearchBy = Literal["meaning", "label"]

_log = logging.getLogger(__name__)

_TEXTS = 256
"""Embeddings of texts that are kept."""


@dataclass(frozen=True)
class Query:
    """What is looked for."""

    text: str
    by: SearchBy = "meaning"
    limit: int = 10
    """How many concepts to find."""


class Unsearched(NamedTuple):
    """A bank that could not be searched."""

    reference: str
    reason: str


class Found(NamedTuple):
    """What came of a search."""

    hits: list[Hit]
    """Best first."""
    unsearched: list[Unsearched]


class Searcher:
    """Searches banks; belongs to one event loop.

    Texts are embedded and compared in a thread of their own, on one core: explanations keep the rest.

    Parameters
    ----------
    catalogue
        Looks up banks and CLIPs.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._thread = ThreadPoolExecutor(1, "search", initializer=use_cores, initargs=(1,))
        self._texts: Memo[tuple[str, str], Tensor] = Memo(self._embed, limit=_TEXTS)

    async def search(self, query: Query, versions: Sequence[BankVersion]) -> Found:
        """Search versions of banks; what keeps one from being searched is said of it, not raised."""
        banks: list[Bank] = []
        unsearched: list[Unsearched] = []
        for version in versions:
            try:
                banks.append(_searchable(await self._catalogue.named(version), query.by))
            except WhenceError as error:
                unsearched.append(Unsearched(version.reference, _reason(error)))
        if query.by == "label":
            hits = await self._in_thread(partial(_by_label, banks, query))
        else:
            hits = await self._by_meaning(banks, query, unsearched)
        return Found(hits, sorted(unsearched))

    def close(self) -> None:
        """Stop searching."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _by_meaning(self, banks: Sequence[Bank], query: Query, unsearched: list[Unsearched]) -> list[Hit]:
        """Search banks with the CLIP that each was named with; note those whose CLIP cannot be used."""
        of_clip: defaultdict[str, list[Bank]] = defaultdict(list)
        for bank in banks:
            of_clip[_clip_of(bank)].append(bank)
        rankings = []
        for digest, named in sorted(of_clip.items()):
            try:
                text = await self._texts.get((digest, query.text))
            except WhenceError as error:
                unsearched += [Unsearched(bank.reference, error.message) for bank in named]
                continue
            fitting = [bank for bank in named if _fits(bank, text)]
            unsearched += [Unsearched(bank.reference, _UNLIKE) for bank in named if not _fits(bank, text)]
            rankings.append(await self._in_thread(partial(_ranking, fitting, text, query.limit)))
        return matching.in_turn(rankings)[: query.limit]

    async def _embed(self, key: tuple[str, str]) -> Tensor:
        """Return the embedding of a text, ``[D]``, to the CLIP of a digest."""
        digest, text = key
        if not await self._catalogue.has_clip(digest):
            raise CorruptData(f"The CLIP that it was named with is not in the repository: {_NAME_ANEW}")
        try:
            clip = await self._catalogue.clip(digest)
            embedding = (await self._in_thread(partial(clip.embed_texts, [text])))[0]
            if not embedding.isfinite().all():
                raise NumericalFailure(f"CLIP {digest[:12]} answers with NaN or infinity")
        except Exception as error:
            _log.exception("CLIP %s cannot be used", digest)
            why = f" ({error.message})" if isinstance(error, WhenceError) else ""
            raise CorruptData(
                f"The CLIP that it was named with is damaged{why}: remove it from the repository and {_NAME_ANEW}"
            ) from error
        return embedding

    async def _in_thread(self, work: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


_NAME_ANEW = "name the concepts anew with `whence-bank label`."
_UNLIKE = f"It is damaged: its embeddings have another width than those of its CLIP; {_NAME_ANEW}"


def _searchable(bank: Bank, by: SearchBy) -> Bank:
    """Return the bank if its concepts have what is searched; raise UnsupportedOption where not."""
    if by == "label":
        there = any(concept.label or concept.naming for concept in bank.all_concepts)
    else:
        there = bank.embeddings is not None and bool(bank.labelling)
    if there:
        return bank
    raise UnsupportedOption("Its concepts have no names yet: give them some with `whence-bank label`.")


def _fits(bank: Bank, text: Tensor) -> bool:
    """Whether a text's embedding can be compared with those of a bank."""
    return bank.embeddings is not None and bank.embeddings.shape[1] == len(text)


def _clip_of(bank: Bank) -> str:
    """Return the digest of the CLIP that a bank was named with."""
    digest: str = bank.labelling["clip"]["digest"]
    return digest


def _reason(error: WhenceError) -> str:
    if isinstance(error, CorruptData):
        return f"It is damaged ({error.message}): publish it anew or roll back."
    return error.message


def _by_label(banks: Sequence[Bank], query: Query) -> list[Hit]:
    hits = [hit for bank in banks for hit in matching.by_label(bank, query.text)]
    return matching.ranked(hits)[: query.limit]


def _ranking(banks: Sequence[Bank], text: Tensor, most: int) -> list[Hit]:
    return matching.ranked(hit for bank in banks for hit in matching.by_meaning(bank, text, most))[:most]
