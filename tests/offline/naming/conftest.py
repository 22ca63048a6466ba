"""What these tests share: images of the known-concepts world, a model of it, and its CLIP with a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from concepts.clip import Clip, open_clip_model
from concepts.model import ModelSpec
from concepts.repository import Repository
from demo.captions import captions
from demo.folder import write_folder
from demo.models import MODELS, WEIGHTS
from offline.vocabulary import Texts, Vocabulary, build

CLIP = str(WEIGHTS / "clip")


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clip() -> Clip:
    return open_clip_model(CLIP)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> Path:
    """A folder of images, one of them broken, held-out ones, a repository with a model, and a vocabulary."""
    root = tmp_path_factory.mktemp("naming")
    write_folder(root / "images", "train", 400)
    write_folder(root / "images", "heldout", 150)
    (root / "images" / "train" / "night-ring" / "broken.png").write_bytes(b"no picture")
    cnn = MODELS["cnn"]
    spec = ModelSpec("cnn", cnn.architecture, cnn.preprocessing, cnn.class_names, "", {"num_classes": 15})
    Repository(root / "repository").publish_model(spec, load_file(cnn.weights))
    (root / "captions.txt").write_text("".join(caption + "\n" for caption in captions()[:600]))
    build(Texts(root / "captions.txt", clip), clip, root / "vocabulary")
    return root


@pytest.fixture(scope="session")
def vocabulary(place: Path) -> Vocabulary:
    return Vocabulary.open(place / "vocabulary")
