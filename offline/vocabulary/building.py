"""Writing a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from concepts.errors import InvalidInput, NumericalFailure
from offline.progress import Reporter, silent
from offline.vocabulary.captions import Selection
from offline.vocabulary.files import Draft, Plan, drafting
from offline.vocabulary.texts import Source
from offline.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:  # importing it takes seconds
    from concepts.clip import Clip

SHARD_CAPTIONS = 65536
"""A shard; what is held in memory at a time."""

_STAGE = "embedding captions"


def build(
    source: Source, clip: Clip, path: Path, *, shard_captions: int = SHARD_CAPTIONS, report: Reporter = silent
) -> Vocabulary:
    """Write a vocabulary, or go on where an earlier call was stopped.

    Work that was ended at any instant goes on by the same call, and the files become the same to the last byte, as far
    as the device computes the same again. Memory is that of one shard, and 12 bytes a line.

    Parameters
    ----------
    source
        The captions, with their embeddings or a way to them.
    clip
        What embeds them.
    path
        Folder of the vocabulary; made where there is none.
    shard_captions
        Captions a shard.
    report
        Hears of progress, in lines.

    Raises
    ------
    AlreadyExists
        If the folder holds something else, or a vocabulary of other captions, another CLIP or other shards.
    InvalidInput
        If no caption is left, or embeddings that were there are not this CLIP's.
    NumericalFailure
        If the CLIP's own are NaN or infinite.
    """
    if shard_captions < 1:
        raise InvalidInput(f"shards of {shard_captions} captions cannot be: give at least 1")
    plan = Plan(clip.digest, clip.width, source.digest, shard_captions)
    with drafting(path, plan) as draft:
        if not draft.complete:
            _write(draft, source, clip, shard_captions, report)
    report(_STAGE, source.lines, source.lines)
    return Vocabulary.open(path)


def _write(draft: Draft, source: Source, clip: Clip, shard_captions: int, report: Reporter) -> None:
    """Write what is missing."""
    selection, shards = Selection(source.read(), source.lines), 0

    def tell(done: int) -> None:
        report(_STAGE, min(done, source.lines - 1), source.lines)

    for number, captions in enumerate(selection.shards(shard_captions)):
        shards = number + 1
        if not draft.whole(number):
            embeddings = source.embed(captions, tell)
            if not np.isfinite(embeddings).all():
                raise NumericalFailure(f"CLIP {clip.name!r} makes NaN or infinity of captions: give another one")
            draft.write(number, captions.texts, embeddings)
        tell(int(captions.lines[-1]) + 1)
    if not shards:
        reasons = ", ".join(f"{count} {reason}" for reason, count in selection.dropped.items() if count)
        raise InvalidInput(f"none of {source.lines} lines is a caption ({reasons}): give text in UTF-8")
    draft.finish(clip.name, shards, selection.dropped)
