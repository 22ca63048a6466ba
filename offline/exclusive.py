"""Work that only one process may do at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from concepts.errors import AlreadyExists


@contextmanager
def alone_in(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder, made where there is none, until the end; a killed process lets go of it, too.

    Raises
    ------
    AlreadyExists
        If another process holds it, in the words of ``refusal``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyExists(refusal) from error
        yield
    finally:
        os.close(descriptor)
