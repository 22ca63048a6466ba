from __future__ import annotations

from pathlib import Path

import pytest

from concepts.clip import Clip, open_clip_model
from tests.offline.vocabulary.clips import random_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_clip(tmp_path_factory.mktemp("clips") / "random")


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> Clip:
    return open_clip_model(str(clip_folder))


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return open_clip_model(str(random_clip(tmp_path_factory.mktemp("clips") / "other", seed=1)))
