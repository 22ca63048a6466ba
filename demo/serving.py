"""Starting ``whence-serve`` as users do, and stopping it again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STOP_S = 60


class ServerFailed(RuntimeError):
    """The server ended before it was ready."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str
    """``host:port`` of its gRPC service."""
    metrics_url: str
    process: subprocess.Popen[str]


@contextmanager
def serving(
    repository: Path,
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Server]:
    """Start ``whence-serve`` on free ports, yield it once it is ready, and stop it.

    Parameters
    ----------
    repository
        What to serve.
    config
        Settings file.
    environment
        Variables beside those of this process, e.g. ``{"WHENCE_SERVE_BATCH_LIMIT": "8"}``.
    log
        Where its messages go; by default to this process's own.

    Raises
    ------
    ServerFailed
        If it ends before it is ready.
    """
    port, metrics_port = free_ports(2)
    command = [str(Path(sys.executable).parent / "whence-serve"), "--repository", str(repository)]
    command += ["--port", str(port), "--metrics-port", str(metrics_port)]
    command += ["--config", str(config)] if config else []
    messages = log.open("w") if log else None
    process = subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=subprocess.PIPE, stderr=messages, text=True, env={**os.environ, **(environment or {})}
    )
    try:
        _await_ready(process)
        yield Server(f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics", process)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
        if messages:
            messages.close()


def free_ports(count: int) -> list[int]:
    """Return different ports that nothing listens on now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _await_ready(process: subprocess.Popen[str]) -> None:
    for line in process.stdout or ():
        if line.startswith("ready"):
            return
    raise ServerFailed(f"whence-serve ended with exit code {process.wait(_STOP_S)} before it was ready")
