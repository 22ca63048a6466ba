"""The world as files: what offline tools read as a probe set with known concepts.

::

    <root>/<split>/<class>/<index>.png    the images, as `torchvision.datasets.ImageFolder` expects them
    <root>/<split>/truth.json             {"attributes": [A names],
                                           "families": {attribute: family},
                                           "classes": [class names, in order of their indices],
                                           "files": [n paths relative to this folder, in the order of the masks],
                                           "labels": [n class indices]}
    <root>/<split>/truth.safetensors      "masks": uint8 [n, A, 64, 8], the pixels that show each attribute, packed
                                          eight to a byte along the rows, the leftmost in the highest bit:
                                          numpy.unpackbits(masks, axis=-1) gives 0 or 1, [n, A, 64, 64];
                                          "attributes": uint8 [n, A], 1 where the image shows the attribute
    <root>/<split>/captions.txt           one caption per line, in the order of "files"
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from concepts.errors import AlreadyExists, CorruptData
from demo.attributes import ATTRIBUTES, CLASS_NAMES, FAMILIES, SPURIOUS
from demo.world import Split, World

_BATCH = 256
FAMILY_OF = {name: family for family, names in FAMILIES.items() for name in names} | {SPURIOUS: "spurious"}
"""The family of each attribute; the sticker is alone in a family of its own."""


@dataclass(frozen=True, eq=False)
class Truth:
    """What a written folder says about its images."""

    files: tuple[str, ...]
    """Paths relative to the split's folder, n of them."""
    labels: NDArray[np.int64]
    """Class indices, [n]."""
    attributes: NDArray[np.bool_]
    """Which attributes each image shows, [n, A]."""
    masks: NDArray[np.bool_]
    """The pixels that show each attribute, [n, A, 64, 64]."""
    captions: tuple[str, ...]


def write_folder(root: Path, split: Split, n: int, world: World | None = None, start: int = 0) -> Path:
    """Write `n` images of a split with their truth, in the format of this module.

    Parameters
    ----------
    root
        Made if it does not exist.
    world
        By default the one the demo's networks were trained on.
    start
        Index of the first image.

    Returns
    -------
    `root` / `split`

    Raises
    ------
    AlreadyExists
        If that folder exists: a mixture of two worlds would be silently wrong.
    """
    folder = root / split
    if folder.exists():
        raise AlreadyExists(f"world: there is already a folder {split!r} where the images should go; remove it first")
    for name in CLASS_NAMES:
        (folder / name).mkdir(parents=True)
    files: list[str] = []
    labels: list[int] = []
    captions: list[str] = []
    shown, masks = [], []
    for batch in (world or World()).batches(n, split, _BATCH, start):
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            files.append(f"{CLASS_NAMES[label]}/{start + len(files):06d}.png")
            Image.fromarray(image).save(folder / files[-1], compress_level=1)
        labels += batch.labels.tolist()
        captions += batch.captions
        shown.append(batch.attributes.astype(np.uint8))
        masks.append(np.packbits(batch.masks, axis=-1))
    save_file({"masks": np.concatenate(masks), "attributes": np.concatenate(shown)}, folder / "truth.safetensors")
    truth = {
        "attributes": list(ATTRIBUTES),
        "families": FAMILY_OF,
        "classes": list(CLASS_NAMES),
        "files": files,
        "labels": labels,
    }
    (folder / "truth.json").write_text(json.dumps(truth) + "\n")
    (folder / "captions.txt").write_text("".join(caption + "\n" for caption in captions))
    return folder


def read_truth(folder: Path) -> Truth:
    """Read the truth of a folder that `write_folder` returned.

    Raises
    ------
    CorruptData
        If the parts do not fit together.
    """
    truth = json.loads((folder / "truth.json").read_text())
    arrays = load_file(folder / "truth.safetensors")
    captions = tuple((folder / "captions.txt").read_text().splitlines())
    n = len(truth["files"])
    if not n == len(truth["labels"]) == len(captions) == len(arrays["masks"]) == len(arrays["attributes"]):
        raise CorruptData("world: truth.json, truth.safetensors and captions.txt tell of different numbers of images")
    return Truth(
        tuple(truth["files"]),
        np.array(truth["labels"], np.int64),
        arrays["attributes"].astype(np.bool_),
        np.unpackbits(arrays["masks"], axis=-1).astype(np.bool_),
        captions,
    )
