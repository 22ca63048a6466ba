"""The files of a vocabulary that is being written: each whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concepts.errors import AlreadyExists
from concepts.storage import LocalStorage
from offline.exclusive import alone_in

VOCABULARY, PLAN = "vocabulary.json", "plan.json"
SCHEMA = 1


def embeddings_file(number: int) -> str:
    """Return the name of a shard's embeddings."""
    return f"{number:06d}.embeddings.npy"


def captions_file(number: int) -> str:
    """Return the name of a shard's captions."""
    return f"{number:06d}.captions.txt"


def offsets_file(number: int) -> str:
    """Return the name of the file that says where a shard's captions begin."""
    return f"{number:06d}.offsets.npy"


def _record_file(number: int) -> str:
    return f"{number:06d}.json"


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a vocabulary."""

    clip: str
    """Its digest."""
    width: int
    source: str
    """sha256 of captions, and of embeddings that were there."""
    shard_captions: int
    schema: int = SCHEMA

    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """Say in what a stored plan differs from this one, or None."""
        words = {"clip": "the CLIP", "source": "the captions", "shard_captions": "captions a shard"}
        for name in (field.name for field in fields(self)):
            mine, other = getattr(self, name), stored.get(name)
            if mine != other:
                return f"{words.get(name, name)} {other}, not {mine}"
        return None


class Draft:
    """A vocabulary that is being written, by one process at a time; see ``drafting``."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path, self._plan, self._files = path, plan, LocalStorage(path)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self._files.exists(VOCABULARY)

    def check(self) -> None:
        """Raise ``AlreadyExists`` if the folder holds a vocabulary of another plan, or other files."""
        for draft in self._path.glob(".*.tmp"):
            draft.unlink()
        if self._files.exists(PLAN):
            try:
                difference = self._plan.difference(json.loads(self._files.read(PLAN)))
            except (ValueError, AttributeError):
                difference = "what cannot be read"
            if difference is not None:
                raise AlreadyExists(
                    f"the vocabulary in that folder was begun with {difference}: name another folder by --out, or "
                    "remove that one"
                )
        elif any(self._path.iterdir()):
            raise AlreadyExists("the folder for the vocabulary holds other files: name an empty one, or a new one")

    def whole(self, number: int) -> bool:
        """Whether a shard is there, with all of its bytes."""
        try:
            record = json.loads(self._files.read(_record_file(number)))
            return all((self._path / name).stat().st_size == facts["bytes"] for name, facts in record["files"].items())
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def write(self, number: int, texts: Sequence[str], embeddings: NDArray[Any]) -> None:
        """Write a shard, the first one after the plan."""
        if not self._files.exists(PLAN):
            self._files.write(PLAN, _json(asdict(self._plan)))
        lines = [f"{text}\n".encode() for text in texts]
        offsets = np.fromiter(accumulate(map(len, lines), initial=0), np.uint64, len(lines) + 1)
        contents = {
            embeddings_file(number): _npy(embeddings.astype(np.float16, copy=False)),
            captions_file(number): b"".join(lines),
            offsets_file(number): _npy(offsets),
        }
        for name, content in contents.items():
            self._files.write(name, content)
        files = {name: _facts(content) for name, content in contents.items()}
        self._files.write(_record_file(number), _json({"count": len(texts), "files": files}))

    def finish(self, clip_name: str, shards: int, dropped: Mapping[str, int]) -> None:
        """Write what it holds."""
        records = [json.loads(self._files.read(_record_file(number))) for number in range(shards)]
        found = {
            "schema": SCHEMA,
            "clip": {"name": clip_name, "digest": self._plan.clip},
            "width": self._plan.width,
            "count": sum(record["count"] for record in records),
            "dropped": dict(dropped),
            "source": self._plan.source,
            "shards": records,
        }
        self._files.write(VOCABULARY, _json(found))


@contextmanager
def drafting(path: Path, plan: Plan) -> Iterator[Draft]:
    """Open a folder to write a vocabulary into it, or to go on with one; left empty, it is removed.

    Raises
    ------
    AlreadyExists
        If another process writes into it, or it holds anything else.
    """
    with alone_in(path, "another process is writing this vocabulary: wait for it, or end it"):
        draft = Draft(path, plan)
        try:
            draft.check()
            yield draft
        finally:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _facts(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
