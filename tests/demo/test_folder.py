"""The world as files: what is read back is what was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from concepts.errors import AlreadyExists, CorruptData
from demo.attributes import CLASS_NAMES
from demo.folder import read_truth, write_folder
from demo.world import World

N = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("world"), "heldout", N, World(1), start=7)


def test_what_is_read_is_what_was_drawn(folder: Path) -> None:
    drawn, truth = World(1).sample(N, "heldout", start=7), read_truth(folder)
    np.testing.assert_array_equal(truth.masks, drawn.masks)
    np.testing.assert_array_equal(truth.attributes, drawn.attributes)
    np.testing.assert_array_equal(truth.labels, drawn.labels)
    assert truth.captions == drawn.captions
    for file, image in zip(truth.files, drawn.images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / file)), image)


def test_image_folder_numbers_the_classes_alike(folder: Path) -> None:
    truth = read_truth(folder)
    read = ImageFolder(str(folder), allow_empty=True)
    assert tuple(read.classes) == CLASS_NAMES
    labels = {str(Path(path).relative_to(folder)): label for path, label in read.samples}
    assert labels == dict(zip(truth.files, truth.labels.tolist(), strict=True))


def test_an_existing_folder_is_left_alone(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(AlreadyExists, match="remove it"):
        write_folder(folder.parent, "heldout", N)
    assert sorted(folder.rglob("*")) == before


def test_parts_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("truth.json", "truth.safetensors", "captions.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    truth = json.loads((tmp_path / "truth.json").read_text())
    truth["files"].pop()
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(CorruptData, match="different numbers"):
        read_truth(tmp_path)
