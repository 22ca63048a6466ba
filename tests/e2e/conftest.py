"""Real servers: ``whence-serve`` in a process of its own, with Ray Serve and HAProxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from demo.serving import free_ports
from tests.e2e.repository import publish_bank, publish_model
from whence.v1.explanation_service_pb2_grpc import ExplanationServiceStub

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
STOP_S = 60.0


@dataclass
class RunningServer:
    """A server that has said that it is ready."""

    process: subprocess.Popen[str]
    repository: Path
    port: int
    metrics_port: int
    log: Path

    @property
    def address(self) -> str:
        """Where callers reach it."""
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def connected(self) -> Iterator[tuple[Any, grpc.Channel]]:
        """Open a channel."""
        with grpc.insecure_channel(self.address) as channel:
            yield ExplanationServiceStub(channel), channel  # type: ignore[no-untyped-call]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of ``whence-serve``."""
    return [sys.executable, "-m", "service.cli", *map(str, arguments)]


def start_server(folder: Path, repository: Path, **settings: Any) -> RunningServer:
    """Start ``whence-serve`` on free ports and wait until it is ready."""
    port, metrics_port = free_ports(2)
    config, log = folder / "serve.yaml", folder / "serve.log"
    values = {
        "repository": str(repository),
        "host": "127.0.0.1",
        "port": port,
        "metrics_port": metrics_port,
        **settings,
    }
    config.write_text(yaml.safe_dump(values))
    with log.open("w") as output:
        process = subprocess.Popen(
            command("--config", config), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
    until = time.monotonic() + START_S
    while "ready: gRPC" not in log.read_text():
        if process.poll() is not None or time.monotonic() > until:
            process.terminate()
            process.wait(STOP_S)
            raise AssertionError(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.1)
    return RunningServer(process, repository, port, metrics_port, log)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one model and one bank."""
    root = tmp_path_factory.mktemp("repository")
    publish_model(root)
    publish_bank(root)
    return root


Start = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers that are stopped after the module; keyword arguments are settings."""
    running: list[RunningServer] = []

    def starter(repository: Path, **settings: Any) -> RunningServer:
        server = start_server(tmp_path_factory.mktemp("server"), repository, **settings)
        running.append(server)
        return server

    yield starter
    for server in running:
        if server.process.poll() is None:
            server.stop()
