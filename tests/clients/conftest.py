"""What the SDK's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import whence
from tests.clients.blocking import Connect, blocking_clients
from whence.testing import FakeServer


@pytest.fixture(autouse=True)
def _no_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What whoever runs the tests has set for the command is not theirs."""
    for name in os.environ:
        if name.startswith("WHENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fake service."""
    with FakeServer() as fake:
        yield fake


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes a client; a test that uses it runs with either kind."""
    if request.param == "Client":
        yield whence.Client
    else:
        with blocking_clients() as make:
            yield make


@pytest.fixture
def client(server: FakeServer, connect: Connect) -> Iterator[whence.Client]:
    """A client of the fake service, of either kind."""
    with connect(server.address, timeout_s=20) as connected:
        yield connected


@pytest.fixture
def image() -> NDArray[np.uint8]:
    """A small image without symmetry."""
    return np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
