"""Where the tests find real images and weights."""

from __future__ import annotations

import os
from pathlib import Path


def real_data() -> Path:
    """Return the folder of real images and weights: ``$WHENCE_TEST_DATA``, or ``shared/data`` beside the repository.

    Raises
    ------
    FileNotFoundError
        Where there is none; tests need it and say so instead of passing without it.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("WHENCE_TEST_DATA", beside))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no test data at {folder}: set WHENCE_TEST_DATA to the folder that holds cifar10/ and photos/"
        )
    return folder
