"""Where a training stands, in one file that is either whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from concepts.errors import CorruptData, InvalidInput

_FILE = "checkpoint.safetensors"
_SCHEMA = 1


class Checkpoint(NamedTuple):
    """What was saved."""

    tensors: dict[str, Tensor]
    """On the CPU."""
    facts: dict[str, Any]
    """Plain numbers and text beside them."""


class Checkpoints:
    """The newest checkpoint of one training in a folder.

    Parameters
    ----------
    folder
        Of this training alone; made when the first checkpoint is saved.
    identity
        All that decides the training, as JSON: settings, reading and data. A checkpoint of another is refused.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._path = folder / _FILE
        self._identity = json.loads(json.dumps({"schema": _SCHEMA, **identity}))

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the checkpoint; a crash at any instant leaves the old one or the new one.

        Raises
        ------
        InvalidInput
            If it cannot be written, as to a full disk; the old one stays.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        described = {"identity": json.dumps(self._identity), "facts": json.dumps(facts)}
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            safetensors.torch.save_file(contents, draft, described)
        except SafetensorError as error:
            draft.unlink(missing_ok=True)
            raise InvalidInput(
                "the checkpoint cannot be written: make room on its disk, and the same command goes on"
            ) from error
        for path in (draft, self._path.parent):
            _flush(path)
            if path == draft:
                draft.replace(self._path)

    def load(self) -> Checkpoint | None:
        """Return the checkpoint, or None where there is none.

        Raises
        ------
        InvalidInput
            If it was saved by a training with other settings or on other data.
        CorruptData
            If it is not what was saved.
        """
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                described = file.metadata() or {}
                identity, facts = json.loads(described["identity"]), json.loads(described["facts"])
            difference = _difference(identity, self._identity)
            if difference:
                raise InvalidInput(
                    f"the checkpoint is of another training: {difference}. Ask for the same, "
                    "or name another folder for checkpoints"
                )
            return Checkpoint(safetensors.torch.load_file(self._path), facts)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CorruptData("the checkpoint is damaged: delete it and train from the start") from error


def _flush(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(then: Any, now: Any, name: str = "") -> str:
    """Return the first difference between two JSON values in words, or nothing."""
    if isinstance(then, dict) and isinstance(now, dict):
        pairs = [(key, then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys())]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = [(str(index), *both) for index, both in enumerate(zip(then, now, strict=True))]
    elif isinstance(then, list) and isinstance(now, list):
        return f"{name} had {len(then)} entries and now has {len(now)}"
    else:
        return "" if then == now else f"{name} was {then} and is now {now}"
    found = (_difference(before, after, f"{name} {key}".strip()) for key, before, after in pairs)
    return next((difference for difference in found if difference), "")
