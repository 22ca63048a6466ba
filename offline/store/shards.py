"""The files of a store: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concepts.errors import AlreadyExists, CorruptData, InvalidInput, NotTrainable
from concepts.storage import LocalStorage
from offline.exclusive import alone_in
from offline.images import fingerprint, lot
from offline.store.plan import Plan, in_words

STORE, PLAN = "store.json", "plan.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Rows:
    """What the images of one shard gave."""

    vectors: NDArray[Any]
    """``[n, C]``, float16 or float32."""
    origins: NDArray[np.int32]
    """``[n, 2]``: the image, by its place in the order of visit, and the position."""
    keys: Sequence[str]
    """The images visited, in order."""
    digests: Mapping[str, str]
    """sha256 of each image that gave vectors, by key."""
    skipped: Mapping[str, str]
    """Why an image gave none, by key."""


def vectors_file(number: int) -> str:
    """Return the name of a shard's vectors."""
    return f"{number:06d}.vectors.npy"


def origins_file(number: int) -> str:
    """Return the name of a shard's origins."""
    return f"{number:06d}.origins.npy"


def record_file(number: int) -> str:
    """Return the name of a shard's record."""
    return f"{number:06d}.json"


class Draft:
    """A store that is being written, by one process at a time; see ``drafting``."""

    def __init__(self, path: Path, plan: Plan, needed: int) -> None:
        self._path, self._plan, self._needed, self._files = path, plan, needed, LocalStorage(path)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self._files.exists(STORE)

    def missing(self) -> Iterator[int]:
        """Yield the shards that are not there, or not whole."""
        return (number for number in range(self._plan.shards) if not self._whole(number))

    def check_room(self) -> None:
        """Raise ``InvalidInput`` if the disk has not room enough for what is missing."""
        free = shutil.disk_usage(self._path).free
        if self._left() > free:
            raise InvalidInput(
                f"the harvest needs {in_words(self._left())} more, the disk of the store has {in_words(free)}: make "
                "room, or set a disk budget"
            )

    def write(self, number: int, rows: Rows) -> None:
        """Write a shard, its rows in an order drawn by the plan's seed.

        Raises
        ------
        InvalidInput
            If the disk is full; what was written of the shard is removed.
        """
        order = np.random.default_rng(lot(str(number), f"rows {self._plan.seed}")).permutation(len(rows.vectors))
        vectors, origins = rows.vectors[order], rows.origins[order]
        record: dict[str, Any] = {
            "rows": len(vectors),
            "sum": vectors.sum(0, dtype=np.float64).tolist(),
            "square_sum": float(np.einsum("nc,nc->", vectors, vectors, dtype=np.float64)),
            "keys": list(rows.keys),
            "digests": dict(rows.digests),
            "skipped": dict(rows.skipped),
            "files": {},
        }
        for name, array in ((vectors_file(number), vectors), (origins_file(number), origins)):
            record["files"][name] = self._write(name, _npy(array))
        self._write(record_file(number), _json(record))

    def finish(self) -> None:
        """Write the totals.

        Raises
        ------
        NotTrainable
            If no image gave any vector.
        """
        rows: list[int] = []
        digests: dict[str, str] = {}
        skipped: dict[str, str] = {}
        files: dict[str, dict[str, Any]] = {}
        total, squares = np.zeros(self._plan.channels), 0.0
        for number in range(self._plan.shards):
            content = self._files.read(record_file(number))
            record = json.loads(content)
            rows.append(record["rows"])
            total += record["sum"]
            squares += record["square_sum"]
            digests |= record["digests"]
            skipped |= record["skipped"]
            files |= {**record["files"], record_file(number): _facts(content)}
        if not sum(rows):
            reasons = "; ".join(f"{key}: {reason}" for key, reason in list(skipped.items())[:3])
            raise NotTrainable(f"none of {len(skipped)} images gave any vector ({reasons})")
        self._write(
            STORE,
            _json(
                {
                    "plan": self._plan.to_json(),
                    "rows": rows,
                    "mean": (total / sum(rows)).tolist(),
                    "mean_square": squares / sum(rows),
                    "images": len(digests),
                    "data_fingerprint": fingerprint(digests),
                    "skipped": skipped,
                    "files": files,
                }
            ),
        )

    def begin(self) -> None:
        """Write the plan, or find that it is the one that is there.

        Raises
        ------
        AlreadyExists
            If the folder holds a store of another plan, or other files.
        """
        for draft in self._path.glob(".*.tmp"):
            draft.unlink()
        if self._files.exists(PLAN):
            difference = read_plan(self._path).difference(self._plan)
            if difference is not None:
                raise AlreadyExists(f"the store was harvested with {difference}: name another folder")
        elif any(self._path.iterdir()):
            raise AlreadyExists("the folder for the store holds other files: name an empty one, or a new one")
        else:
            self._write(PLAN, _json(self._plan.to_json()))

    def _whole(self, number: int) -> bool:
        """Whether a shard is there, with all of its bytes."""
        if not self._files.exists(record_file(number)):
            return False
        try:
            files = json.loads(self._files.read(record_file(number)))["files"]
            return all(size_of(self._path / name) == facts["bytes"] for name, facts in files.items())
        except (ValueError, KeyError):
            return False

    def _left(self) -> int:
        """Return how many bytes are still to be written, at most."""
        return max(0, self._needed - sum(file.stat().st_size for file in self._path.iterdir()))

    def _write(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            self._files.write(name, content)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise InvalidInput(
                f"the disk of the store is full, and the harvest needs {in_words(self._left())} more: make room, and "
                "the same command goes on"
            ) from error
        return _facts(content)


@contextmanager
def drafting(path: Path, plan: Plan, needed: int) -> Iterator[Draft]:
    """Open a folder to write a store into it, or to go on with one.

    Parameters
    ----------
    path
        The folder; made where there is none.
    plan
        What the store is to hold.
    needed
        Bytes that it takes, at most.

    Raises
    ------
    AlreadyExists
        If another process writes into it, or it holds anything else.
    """
    with alone_in(path, "another harvest is writing into this store: wait for it, or end it"):
        draft = Draft(path, plan, needed)
        draft.begin()
        yield draft


def read_plan(path: Path) -> Plan:
    """Return the plan of a store."""
    return Plan.from_json(read_json(path, PLAN))


def read_json(path: Path, name: str) -> Any:
    """Return what a file of a store holds; ``CorruptData`` if it is no JSON."""
    try:
        return json.loads((path / name).read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptData(f"{name} of the store cannot be read: {type(error).__name__}") from error


def size_of(file: Path) -> int:
    """Return the size of a file in bytes; −1 where there is none."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return -1


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _facts(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
