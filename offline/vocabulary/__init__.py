"""A vocabulary: many captions with the embeddings that a CLIP gives them, searched exactly with constant memory.

::

    plan.json               what it is to hold, written first: the same plan goes on, another one is refused
    000000.embeddings.npy   a shard: float16 [n, D], rows of norm 1
    000000.captions.txt     its captions, one a line, UTF-8
    000000.offsets.npy      uint64 [n + 1]: where each caption begins in that file, and its end
    000000.json             size and sha256 of these; written last: then the shard is there
    vocabulary.json         the CLIP, the count, what was dropped, the shards; written when all are there
"""

from __future__ import annotations

from offline.vocabulary.building import SHARD_CAPTIONS, build
from offline.vocabulary.ready import Ready
from offline.vocabulary.search import Nearest
from offline.vocabulary.texts import Texts
from offline.vocabulary.vocabulary import Vocabulary, open_vocabulary

__all__ = ["SHARD_CAPTIONS", "Nearest", "Ready", "Texts", "Vocabulary", "build", "open_vocabulary"]
