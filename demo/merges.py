"""Byte pairs for the tokeniser of the demo's CLIP: each word of the world's captions is one token.

The usual table of 48,894 merges would make the embedding of tokens larger than all else in so small a model.
"""

from __future__ import annotations

import gzip
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

from demo.captions import captions

BYTES = 256
"""Tokens that are a byte; as many again are a byte that ends a word."""


@cache
def vocabulary() -> tuple[str, ...]:
    """Return the words of all captions, in alphabetical order."""
    return tuple(sorted({word for text in captions() for word in text.replace(",", "").split()}))


def merges(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the pairs to merge, most frequent first, until each word (ASCII) is one token."""
    spelled: list[tuple[str, ...]] = [(*word[:-1], f"{word[-1]}</w>") for word in words]
    found: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        commonest = max(sorted(pairs), key=pairs.__getitem__)
        found.append(commonest)
        spelled = [_merge(word, commonest) for word in spelled]
    return tuple(found)


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join each occurrence of a pair in a word, from the left."""
    joined: list[str] = []
    for part in word:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def vocabulary_size() -> int:
    """Return the number of tokens: bytes, bytes that end a word, merges, start and end of text."""
    return 2 * BYTES + len(merges(vocabulary())) + 2


def write_merges(path: Path) -> None:
    """Write the table as open_clip reads it: gzip, a header, a pair a line, and nothing after the last."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(vocabulary()))]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
