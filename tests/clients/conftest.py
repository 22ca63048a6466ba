"""What the SDK's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import whence
from whence.testing import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fake service."""
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[whence.Client]:
    """A client of the fake service."""
    with whence.Client(server.address, timeout_s=20) as connected:
        yield connected


@pytest.fixture
def image() -> NDArray[np.uint8]:
    """A small image without symmetry."""
    return np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
