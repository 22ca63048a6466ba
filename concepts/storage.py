"""Files under a root: the few operations that a repository needs, each atomic."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


class LocalStorage:
    """A folder of this machine.

    Keys are relative paths with ``/``. A write is seen whole or not at all, and survives a crash of the machine.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)

    def read(self, key: str) -> bytes:
        """Return a file's content; ``FileNotFoundError`` where there is none."""
        path = self._root / key
        if path.is_dir():
            raise FileNotFoundError(key)
        return path.read_bytes()

    def write(self, key: str, content: bytes) -> None:
        """Write or replace a file."""
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def modified(self, key: str) -> float:
        """Return when a file was written, in seconds since the epoch."""
        return (self._root / key).stat().st_mtime

    def folders(self, key: str) -> list[str]:
        """Return the names of the folders in a folder, sorted; none where it does not exist."""
        path = self._root / key
        if not path.is_dir():
            return []
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return (self._root / key).is_file()
