"""Reading a vocabulary: captions by index, and the nearest ones."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concepts.errors import CorruptData, InvalidInput, NotFound
from offline.vocabulary import search
from offline.vocabulary.files import PLAN, SCHEMA, VOCABULARY, captions_file, embeddings_file, offsets_file
from offline.vocabulary.search import Nearest

if TYPE_CHECKING:  # importing it takes seconds
    from concepts.clip import Clip


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A finished vocabulary; opened with ``open_vocabulary``, or ``open`` where no CLIP is needed.

    Sizes of files are checked when it is opened, the sha256 of each before it is read for the first time.
    """

    path: Path
    clip: Mapping[str, str]
    """``name`` and ``digest`` of the CLIP that its embeddings are from."""
    width: int
    """D."""
    shards: tuple[int, ...]
    """Captions of each."""
    dropped: Mapping[str, int]
    """How many lines gave no caption, and why."""
    digest: str
    """sha256 of its ``vocabulary.json``."""
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """Bytes and sha256 of each file."""
    _sound: set[str] = field(default_factory=set, repr=False)
    """Files whose sha256 was found right."""

    @classmethod
    def open(cls, path: Path) -> Vocabulary:
        """Open a vocabulary, of whatever CLIP.

        Raises
        ------
        NotFound
            If there is none, or it is not finished.
        CorruptData
            If a file is not as long as it was, or the manifest cannot be read.
        """
        if not (path / VOCABULARY).is_file():
            raise NotFound(
                "the vocabulary is not finished: the command that began it goes on"
                if (path / PLAN).is_file()
                else "there is no vocabulary in that folder: make one by `whence-bank vocabulary build`"
            )
        content = (path / VOCABULARY).read_bytes()
        try:
            value = json.loads(content)
            if value["schema"] != SCHEMA:
                raise CorruptData(
                    f"the vocabulary has schema {value['schema']!r}; this version reads schema {SCHEMA}: build it anew"
                )
            vocabulary = cls(
                path=path,
                clip={name: str(value["clip"][name]) for name in ("name", "digest")},
                width=int(value["width"]),
                shards=tuple(int(shard["count"]) for shard in value["shards"]),
                dropped=dict(value["dropped"]),
                digest=hashlib.sha256(content).hexdigest(),
                files={name: facts for shard in value["shards"] for name, facts in shard["files"].items()},
            )
            sizes = {name: int(facts["bytes"]) for name, facts in vocabulary.files.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptData(f"{VOCABULARY} cannot be read: build the vocabulary anew", file=VOCABULARY) from error
        for name, size in sizes.items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise _changed(name)
        return vocabulary

    def __len__(self) -> int:
        return sum(self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(int(facts["bytes"]) for facts in self.files.values())

    def record(self) -> dict[str, Any]:
        """Return what a bank says of it: the number of captions, and the digest."""
        return {"captions": len(self), "digest": self.digest}

    def nearest(
        self,
        queries: Tensor,
        k: int,
        *,
        device: torch.device | str = "cpu",
        block_captions: int = search.BLOCK_CAPTIONS,
    ) -> Nearest:
        """Return the captions with the largest cosines, exactly; of equal ones the first.

        Parameters
        ----------
        queries
            Embeddings by the CLIP of the vocabulary, float32 ``[Q, D]`` of norm 1.
        k
            How many for each; all there are, if there are fewer.
        device
            Where to compute; the result is the same.
        block_captions
            How many are compared at a time; the result is the same.

        Raises
        ------
        InvalidInput
            If the queries are of another width or not of norm 1, or ``k`` is not positive.
        CorruptData
            If a shard is not what was written.
        """
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise InvalidInput(f"queries of shape {list(queries.shape)} do not fit embeddings of width {self.width}")
        blocks = self._blocks(block_captions)
        return search.nearest(blocks, queries, min(k, len(self)), torch.device(device))

    def texts(self, indices: Sequence[int]) -> list[str]:
        """Return captions by index.

        Raises
        ------
        InvalidInput
            If there is none of an index.
        CorruptData
            If a shard is not what was written.
        """
        asked = sorted({int(index) for index in indices})
        if asked and not 0 <= asked[0] <= asked[-1] < len(self):
            raise InvalidInput(f"there are captions 0 to {len(self) - 1}, none of {asked[0]} or {asked[-1]}")
        ends = list(accumulate(self.shards))
        found: dict[int, str] = {}
        for number, some in groupby(asked, lambda index: bisect_right(ends, index)):
            found |= self._texts(number, ends[number] - self.shards[number], some)
        return [found[int(index)] for index in indices]

    def verify(self) -> None:
        """Check every byte; ``CorruptData`` if a file is not what was written."""
        self._sound.clear()
        for name in self.files:
            self._check(name)

    def _texts(self, number: int, begin: int, indices: Iterable[int]) -> dict[int, str]:
        """Return captions of one shard, whose first has the index ``begin``."""
        offsets, found = self._mapped(offsets_file(number)), {}
        with self._check(captions_file(number)).open("rb") as file:
            for index in indices:
                first, end = offsets[index - begin : index - begin + 2].tolist()
                file.seek(first)
                found[index] = file.read(end - first - 1).decode()
        return found

    def _blocks(self, size: int) -> Iterator[NDArray[np.float16]]:
        """Yield all embeddings in order; a shard is mapped while it is read, no longer."""
        for number in range(len(self.shards)):
            rows = self._mapped(embeddings_file(number))
            for first in range(0, len(rows), size):
                yield rows[first : first + size]

    def _mapped(self, name: str) -> NDArray[Any]:
        # Copy-on-write: torch takes no arrays that are read-only.
        array: NDArray[Any] = np.load(self._check(name), mmap_mode="c", allow_pickle=False)
        return array

    def _check(self, name: str) -> Path:
        """Return where a file is, known to be what was written."""
        path = self.path / name
        if name not in self._sound:
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError as error:
                raise _changed(name) from error
            if digest != self.files[name]["sha256"]:
                raise _changed(name)
            self._sound.add(name)
        return path


def open_vocabulary(path: Path, clip: Clip) -> Vocabulary:
    """Open a vocabulary for a CLIP.

    Raises
    ------
    NotFound
        If there is none, or it is not finished.
    InvalidInput
        If it was built with another CLIP.
    CorruptData
        If a file is not as long as it was, or the manifest cannot be read.
    """
    vocabulary = Vocabulary.open(path)
    if (vocabulary.clip["digest"], vocabulary.width) != (clip.digest, clip.width):
        raise InvalidInput(
            f"the vocabulary was built with CLIP {vocabulary.clip['name']!r} of digest {vocabulary.clip['digest']} and "
            f"width {vocabulary.width}, this is {clip.name!r} of digest {clip.digest} and width {clip.width}: give "
            "that CLIP, or build the vocabulary with this one"
        )
    return vocabulary


def _changed(name: str) -> CorruptData:
    return CorruptData(f"{name} of the vocabulary is not what was written: build it anew", file=name)
