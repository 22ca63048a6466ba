"""Captions of a text file, embedded by the CLIP itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from concepts.errors import InvalidInput
from offline.vocabulary.captions import Captions, read_lines

if TYPE_CHECKING:  # importing it takes seconds
    from concepts.clip import Clip

_TEXTS = 2048
"""How many are embedded between two reports."""


class Source(Protocol):
    """Where captions and their embeddings come from."""

    @property
    def digest(self) -> str:
        """sha256 of all of it."""

    @property
    def lines(self) -> int:
        """How many lines there are: at most as many captions."""

    def read(self) -> Iterator[bytes]:
        """Yield all lines, in UTF-8."""

    def embed(self, captions: Captions, done: Callable[[int], None]) -> NDArray[Any]:
        """Return embeddings, floats ``[n, D]`` of norm 1; tell the lines that are done."""


class Texts:
    """A text file of captions, one a line.

    Raises
    ------
    InvalidInput
        If there is no such file, or it is empty.
    """

    def __init__(self, path: Path, clip: Clip) -> None:
        if not path.is_file():
            raise InvalidInput(f"there is no file {path}: give a text file with one caption a line")
        self._path, self._clip = path, clip
        self.digest, self.lines = facts(path)
        if not self.lines:
            raise InvalidInput(f"{path.name} is empty: give a text file with one caption a line")

    def read(self) -> Iterator[bytes]:
        """Yield the lines."""
        with self._path.open("rb") as file:
            yield from read_lines(file)

    def embed(self, captions: Captions, done: Callable[[int], None]) -> NDArray[Any]:
        """Return what the CLIP makes of captions."""
        found = np.empty((len(captions.texts), self._clip.width), np.float16)
        for first in range(0, len(found), _TEXTS):
            some = slice(first, first + _TEXTS)
            found[some] = self._clip.embed_texts(captions.texts[some]).numpy()
            done(int(captions.lines[some][-1]) + 1)
        return found


class Facts(NamedTuple):
    """What is known of a text file."""

    digest: str
    """sha256."""
    lines: int


def facts(path: Path) -> Facts:
    """Read a text file once."""
    sha256, breaks, chunk = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while read := file.read(2**20):
            chunk = read
            sha256.update(chunk)
            breaks += chunk.count(b"\n")
    return Facts(sha256.hexdigest(), breaks + (not chunk.endswith(b"\n")))
