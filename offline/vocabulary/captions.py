"""From lines to captions: cleaned, and each once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from concepts.errors import InvalidInput

LONGEST = 2**16
"""Bytes of a line; longer ones are no captions."""

_LINES = 16384
"""How many are cleaned at a time."""

_SLOTS = 1.5
"""Of 8 bytes, a line."""


class Captions(NamedTuple):
    """Captions that are kept, in the order of their lines."""

    texts: list[str]
    lines: NDArray[np.int64]
    """Where each was found."""


@dataclass
class Selection:
    """Chooses the captions of lines; iterate over ``shards`` once.

    Parameters
    ----------
    lines
        In UTF-8.
    most
        How many lines there are.
    """

    lines: Iterable[bytes]
    most: int
    dropped: dict[str, int] = field(
        default_factory=lambda: {"empty": 0, "not_utf8": 0, "too_long": 0, "duplicates": 0}, init=False
    )
    """How many lines gave no caption, and why; whole when all shards were taken."""

    def shards(self, size: int) -> Iterator[Captions]:
        """Yield ``size`` captions at a time, the last time fewer."""
        texts: list[str] = []
        lines = np.zeros(0, np.int64)
        for found in self._chosen():
            texts += found.texts
            lines = np.concatenate([lines, found.lines])
            while len(texts) >= size:
                yield Captions(texts[:size], lines[:size])
                texts, lines = texts[size:], lines[size:]
        if texts:
            yield Captions(texts, lines)

    def _chosen(self) -> Iterator[Captions]:
        """Yield what is kept of some lines after others."""
        seen, lines, first = Seen(self.most), iter(self.lines), 0
        while some := list(islice(lines, _LINES)):
            if first + len(some) > self.most:
                raise InvalidInput("the captions changed while they were read: give the command again")
            texts, places = [], []
            for place, line in enumerate(some, first):
                caption, reason = clean(line)
                if reason:
                    self.dropped[reason] += 1
                else:
                    texts.append(caption)
                    places.append(place)
            new = seen.add(_hashes(texts))
            self.dropped["duplicates"] += len(texts) - int(new.sum())
            kept = np.flatnonzero(new)
            yield Captions([texts[i] for i in kept], np.asarray(places, np.int64)[kept])
            first += len(some)


class Seen:
    """Remembers 64-bit hashes in 12 bytes each: an open hash table of fixed size.

    Of 400 million captions, one is taken for another with a chance of 0.4 %.
    """

    def __init__(self, most: int) -> None:
        self._slots = np.zeros(int(_SLOTS * most) + 1, np.uint64)

    def add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which were not there, of equal ones the first."""
        new = np.zeros(len(hashes), np.bool_)
        keys, places = np.unique(np.maximum(hashes, 1), return_index=True)  # 0 is an empty slot
        size = np.uint64(len(self._slots))
        slots = keys % size
        while len(keys):
            empty = self._slots[slots] == 0
            self._slots[slots[empty]] = keys[empty]  # of several for one slot, one gets it
            held = self._slots[slots] == keys
            new[places[empty & held]] = True
            keys, places, slots = keys[~held], places[~held], (slots[~held] + np.uint64(1)) % size
        return new


def clean(line: bytes) -> tuple[str, str]:
    """Return the caption of a line, and why it has none; one of them is empty."""
    if len(line) > LONGEST:
        return "", "too_long"
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return "", "not_utf8"
    if "\0" in text:  # of UTF-16, or of no text at all
        return "", "not_utf8"
    caption = " ".join(text.lstrip("\ufeff").split())
    return caption, "" if caption else "empty"


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; of those that are too long, no more than shows it."""
    while line := file.readline(LONGEST + 1):
        yield line
        while len(line) > LONGEST and not line.endswith(b"\n"):
            line = file.readline(LONGEST + 1)


def _hashes(texts: list[str]) -> NDArray[np.uint64]:
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, np.uint64)
