"""Known concepts of a probe set: which attributes its images show, and where.

A folder of images may hold ``truth.json`` (``attributes``: A names; ``files``: n keys in the order of the tensors) and
``truth.safetensors`` (``attributes``: uint8 ``[n, A]``; ``masks``: uint8 ``[n, A, H, ⌈W/8⌉]``, the pixels of each
attribute, eight to a byte along the rows, the leftmost in the highest bit).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from concepts.errors import CorruptData
from offline.locations import Bucket


@dataclass(frozen=True)
class Truth:
    """What is known about some images; masks stay in their file until asked for."""

    attributes: tuple[str, ...]
    rows: dict[str, int]
    """Row of each image, by key."""
    present: Tensor
    """bool ``[n, A]``."""
    file: Path

    def masks(self, keys: Sequence[str], attribute: int) -> Tensor:
        """Return the pixels that show an attribute, bool ``[len(keys), H, W]``."""
        with safe_open(self.file, framework="np") as tensors:
            stored = tensors.get_slice("masks")
            packed = [stored[self.rows[key], attribute] for key in keys]
        return torch.from_numpy(np.unpackbits(np.stack(packed), axis=-1).astype(bool))


def read_truth(folder: Path | Bucket) -> Truth | None:
    """Read a folder's truth; None where it has none, as in a bucket: masks are read from the middle of a file.

    Raises
    ------
    CorruptData
        If it cannot be read or its parts do not fit together.
    """
    if isinstance(folder, Bucket):
        return None
    file = folder / "truth.safetensors"
    if not (folder / "truth.json").is_file() or not file.is_file():
        return None
    try:
        names = json.loads((folder / "truth.json").read_text())
        attributes, files = tuple(names["attributes"]), names["files"]
        with safe_open(file, framework="np") as tensors:
            present = torch.from_numpy(tensors.get_tensor("attributes").astype(bool))
            shape = tensors.get_slice("masks").get_shape()
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptData(f"truth.json and truth.safetensors of the images cannot be read: {error}") from error
    expected = [len(files), len(attributes)]
    if list(present.shape) != expected or shape[:2] != expected:
        raise CorruptData(f"truth.json names {expected} images and attributes, truth.safetensors holds {shape[:2]}")
    return Truth(attributes, {key: row for row, key in enumerate(files)}, present, file)
