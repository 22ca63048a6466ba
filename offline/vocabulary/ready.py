"""Captions whose embeddings are there already, in files as LAION publishes them."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concepts.errors import InvalidInput
from offline.vocabulary.captions import Captions, read_lines
from offline.vocabulary.texts import facts

if TYPE_CHECKING:  # importing it takes seconds
    from concepts.clip import Clip

COLUMN = "caption"

_PARTS = re.compile(r"(\d+)|(\D+)")
"""Of a name: numbers, and what is between them."""

_SAMPLE = 16
"""Captions of a shard that are embedded anew."""

_STRANGE = 2
"""How many of them may differ: tokenizers do not agree on all texts."""

_AGREEMENT = 0.98
"""Least cosine between two embeddings of a caption by one CLIP, in half precision."""

_ROWS = 4096
"""How many are normalised at a time."""


class Ready:
    """A folder of embeddings, ``.npy`` of ``[n, D]``, and of as many captions, in the same order.

    Embeddings lie in ``text_emb/`` or ``img/text_emb/``, or in the folder itself; captions in ``metadata/*.parquet``
    beside that, or beside the embeddings in ``.parquet`` or ``.txt`` files. Files of embeddings and of captions are
    paired in the order of their names, in which numbers count as numbers.

    Raises
    ------
    InvalidInput
        If there are no such files, they do not match, or their width is not that of the CLIP.
    """

    def __init__(self, folder: Path, clip: Clip) -> None:
        self._clip = clip
        self._embeddings, self._captions = _pairs(folder)
        counts = [len(_mapped(path, clip.width)) for path in self._embeddings]
        for embeddings, captions, count in zip(self._embeddings, self._captions, counts, strict=True):
            if (texts := _count(captions)) != count:
                raise InvalidInput(
                    f"{captions.name} holds {texts} captions, {embeddings.name} {count} embeddings: give files of the "
                    "same order and length"
                )
        self._ends = list(accumulate(counts))
        self.lines = self._ends[-1]

    @property
    def digest(self) -> str:
        """sha256 of the files, one after another."""
        sha256 = hashlib.sha256()
        for path in (*self._embeddings, *self._captions):
            with path.open("rb") as file:
                sha256.update(hashlib.file_digest(file, "sha256").digest())
        return sha256.hexdigest()

    def read(self) -> Iterator[bytes]:
        """Yield the captions."""
        for path in self._captions:
            yield from _lines(path)

    def embed(self, captions: Captions, done: Callable[[int], None]) -> NDArray[Any]:
        """Return the embeddings of captions, normalised.

        Raises
        ------
        InvalidInput
            If one of them is NaN, infinite or zero, or a sample is not what the CLIP makes of the captions.
        """
        found = np.empty((len(captions.texts), self._clip.width), np.float16)
        for first in range(0, len(found), _ROWS):
            some = captions.lines[first : first + _ROWS]
            found[first : first + len(some)] = self._rows(some)
        sample = np.unique(np.linspace(0, len(found) - 1, _SAMPLE).astype(int))
        self._check([captions.texts[place] for place in sample], found[sample])
        done(int(captions.lines[-1]) + 1)
        return found

    def _rows(self, lines: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the embeddings of ascending lines; norm 1."""
        parts = []
        while len(lines):
            number = bisect_right(self._ends, int(lines[0]))
            begin = self._ends[number - 1] if number else 0
            here = lines[: int(np.searchsorted(lines, self._ends[number]))]
            path = self._embeddings[number]
            rows = _mapped(path, self._clip.width)[here - begin].astype(np.float64)
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            wrong = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
            if len(wrong):
                raise InvalidInput(
                    f"row {here[wrong[0]] - begin} of {path.name} is NaN, infinite or zero: get the file anew, or "
                    "remove the row and its caption"
                )
            parts.append(rows / norms)
            lines = lines[len(here) :]
        return np.concatenate(parts)

    def _check(self, texts: list[str], embeddings: NDArray[np.float16]) -> None:
        """Raise unless the CLIP makes the same of captions."""
        cosines = (self._clip.embed_texts(texts).numpy() * embeddings).sum(1)
        strange = np.flatnonzero(~(cosines > _AGREEMENT))
        if len(strange) > min(_STRANGE, len(texts) // 2):
            raise InvalidInput(
                f"the embeddings are not those of CLIP {self._clip.name!r}, or not in the order of the captions: of "
                f"{len(texts)} captions that were embedded anew, {len(strange)} differ, e.g. "
                f"{texts[strange[0]][:80]!r} with a cosine of {cosines[strange[0]]:.2f}; give the CLIP that made them"
            )


def _pairs(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of embeddings and those of their captions."""
    if not folder.is_dir():
        raise InvalidInput(f"there is no folder {folder}: give one with embeddings in .npy files")
    places = [folder / "text_emb", folder / "img" / "text_emb", folder]
    place = next((found for found in places if any(found.glob("*.npy"))), None)
    if place is None:
        raise InvalidInput(f"{folder.name} holds no embeddings: .npy files in it, in text_emb/ or in img/text_emb/")
    embeddings = _sorted(place, "*.npy")
    for found in (place.parent / "metadata", folder / "metadata", place):
        captions = _sorted(found, "*.parquet") or _sorted(found, "*.txt")
        if captions:
            break
    if len(captions) != len(embeddings):
        raise InvalidInput(
            f"{folder.name} holds {len(embeddings)} files of embeddings and {len(captions)} of captions (.parquet in "
            "metadata/, or .parquet or .txt beside the embeddings): give one for each"
        )
    return embeddings, captions


def _sorted(folder: Path, pattern: str) -> list[Path]:
    """Return files by name; numbers in it count as numbers."""
    return sorted(folder.glob(pattern), key=lambda path: [(int(n or -1), s) for n, s in _PARTS.findall(path.name)])


def _mapped(path: Path, width: int) -> NDArray[Any]:
    """Map a file of embeddings of a width into memory."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InvalidInput(f"{path.name} cannot be read as .npy: give whole files of numbers") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f":
        raise InvalidInput(f"{path.name} is no matrix of floating-point numbers: one row a caption is wanted")
    if rows.shape[1] != width:
        raise InvalidInput(
            f"{path.name} holds embeddings of width {rows.shape[1]}, those of the CLIP have {width}: give the CLIP "
            "that made them"
        )
    return rows


def _count(path: Path) -> int:
    """Return how many captions a file holds."""
    return facts(path).lines if path.suffix == ".txt" else int(_parquet(path).metadata.num_rows)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the captions of a file, as bytes."""
    import pyarrow as pa

    if path.suffix == ".txt":
        with path.open("rb") as file:
            yield from read_lines(file)
        return
    try:
        for batch in _parquet(path).iter_batches(columns=[COLUMN]):
            # As bytes: whether they are UTF-8 is looked at once, for all sources.
            yield from (caption or b"" for caption in batch.column(0).cast(pa.binary()).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{path.name} cannot be read: get the file anew") from error


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        kind = file.schema_arrow.field(COLUMN).type
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InvalidInput(f"{path.name} is no parquet file with a column {COLUMN!r}: give LAION's metadata") from error
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        raise InvalidInput(f"column {COLUMN!r} of {path.name} holds no text")
    return file
