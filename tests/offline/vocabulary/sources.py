"""Captions with embeddings that no CLIP made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from concepts.clip import Clip
from offline.vocabulary import Vocabulary
from offline.vocabulary.captions import Captions
from offline.vocabulary.files import Plan, drafting


@dataclass
class Drawn:
    """So many captions, each with an embedding drawn by itself."""

    lines: int
    width: int
    digest: str = "drawn"

    def read(self) -> Iterator[bytes]:
        return (f"caption number {line}\n".encode() for line in range(self.lines))

    def embed(self, captions: Captions, done: Callable[[int], None]) -> NDArray[np.float16]:
        rows = np.random.default_rng(int(captions.lines[0])).standard_normal((len(captions.texts), self.width))
        done(int(captions.lines[-1]) + 1)
        return unit(rows).astype(np.float16)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def written(path: Path, texts: list[str], embeddings: NDArray[np.float16], clip: Clip, shard: int) -> Vocabulary:
    """Write a vocabulary of given embeddings as if a CLIP had made them."""
    with drafting(path, Plan(clip.digest, embeddings.shape[1], "given", shard)) as draft:
        shards = range(0, len(texts), shard)
        for number, first in enumerate(shards):
            draft.write(number, texts[first : first + shard], embeddings[first : first + shard])
        draft.finish(clip.name, len(shards), {})
    return Vocabulary.open(path)


def contents(path: Path) -> dict[str, str]:
    """Return the sha256 of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}
