"""The ``whence-serve`` command."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from service.health import serving
from service.settings import Settings, SettingsError, load_settings
from service.wire import APPLICATION

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_CHECKS_IN_A_ROW = 5
"""How often the service must answer before it is called ready."""

_ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - a name for it, nothing is bound

_CLOSING_S = 15.0
"""How long Serve may take to stop, in seconds."""

_ORPHAN_ROUNDS = 10
"""Ending a process may hand us its children: look again, so many times."""

_PR_SET_CHILD_SUBREAPER = 36
"""From ``linux/prctl.h``."""

_TRANSPORT_SLACK = 64 * 1024
"""Bytes of a message that are not ours."""


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    repository: Annotated[str | None, typer.Option(help="Root of the repository; comes before the file.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; comes before the file.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of /metrics; comes before the file.")] = None,
) -> None:
    """Serve the concept banks of a repository over gRPC until interrupted."""
    try:
        settings = load_settings(config, repository=repository, port=port, metrics_port=metrics_port)
    except SettingsError as error:
        _stop(f"settings: {error}", 2)
    if not Path(settings.repository).is_dir():
        _stop(f"there is no repository at {settings.repository}: publish a model and a bank first", 2)
    for name, number in (("port", settings.port), ("metrics_port", settings.metrics_port)):
        if not _free(settings.host, number):
            _stop(f"port {number} is in use: stop the other server or choose another `{name}`", 1)
    os.environ.update(environment(settings))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    _adopt_orphans()
    try:
        _run(settings)
    except KeyboardInterrupt:
        typer.echo("stopping", err=True)
    finally:
        _shut_down()
    raise typer.Exit(0)


_REPLICA_PORTS = (20_000, 30_000)
"""Where replicas listen: below the ports that the system gives to callers."""

_BLOCK = 100
"""Ports for the replicas of one server on this machine."""


def environment(settings: Settings) -> dict[str, str]:
    """Return the variables that Ray must see before it starts, on every node of a cluster.

    Ray reads them when its modules are imported, in each of its processes.
    """
    limits = settings.limits
    largest = str(max(2 * limits.request_bytes, limits.reply_bytes) + _TRANSPORT_SLACK)
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Twice our own limit on requests, so that what is a little too large gets our typed answer.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": largest,
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": largest,
        # Our code never blocks its event loop, so it may share Serve's: a call crosses no thread, and streams are read
        # only as fast as they are answered.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(settings.shutdown_s),
    }
    if settings.ray_address == "local":
        # Ray listens on all addresses and runs what it is sent: only our own processes may know the token.
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if settings.ingress_mode == "haproxy":
        variables["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        # Ports that nobody calls, but that would keep a second server from this machine.
        inner = (
            "RAY_SERVE_HAPROXY_METRICS_PORT",
            "RAY_SERVE_HAPROXY_STATS_PORT",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
        )
        variables.update(zip(inner, map(str, _free_ports(len(inner))), strict=True))
    if settings.ray_address == "local":
        # Replicas share ports with whoever asks for the same ones, and callers with them: each server has its own.
        for protocol, first in zip(("GRPC", "HTTP"), _free_blocks(2), strict=True):
            variables[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = str(first)
            variables[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = str(first + _BLOCK)
    return variables


def _run(settings: Settings) -> None:
    """Start everything, say so, and wait."""
    # Only now: Ray reads the environment when it is imported.
    import ray
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from service.app import build, grpc_options

    if settings.ray_address == "local":
        cores = max(len(os.sched_getaffinity(0)), settings.ingress_replicas + settings.engine_replicas)
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            logging_level=logging.WARNING,
            _metrics_export_port=settings.metrics_port,
        )
    else:
        ray.init(address=settings.ray_address, logging_level=logging.WARNING)
    # Ray has put its own in place.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(
        http_options={"host": settings.host, "port": _free_ports(1)[0]},
        grpc_options=grpc_options(settings),
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    ray_serve.run(build(settings), name=APPLICATION, route_prefix="/")
    _await_serving(settings)
    typer.echo(f"ready: gRPC on port {settings.port}, metrics on port {settings.metrics_port}")
    sys.stdout.flush()
    threading.Event().wait()


def _await_serving(settings: Settings) -> None:
    """Wait until the health service answers, through the address that callers use."""
    host = "127.0.0.1" if settings.host == _ALL_INTERFACES else settings.host
    # HAProxy learns of the application by starting anew. In case the one before, which knows none, still takes
    # connections for a moment, ask a few times, each time on a new one.
    row = 0
    while row < _CHECKS_IN_A_ROW:
        row = row + 1 if serving(settings.port, host) else 0
        time.sleep(0.1)


def _shut_down() -> None:
    """Stop Serve, then Ray, whatever of them has started."""
    # A second Ctrl-C must not leave processes behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if "ray" not in sys.modules:
        return
    import ray
    from ray import serve as ray_serve

    if ray.is_initialized():
        # In a thread, not to wait for ever: where the signal went to all our processes, Ray's may be gone already.
        closing = threading.Thread(target=ray_serve.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSING_S)
        ray.shutdown()
    _end_orphans()


def _adopt_orphans() -> None:
    """Make this process the parent of whatever its descendants leave behind."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_orphans() -> None:
    """End processes that outlived Ray, such as HAProxy if its manager was killed."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for _ in range(_ORPHAN_ROUNDS):
        orphans = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        if not orphans:
            return
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _free(host: str, port: int) -> bool:
    """Whether nothing listens on a port."""
    with socket.socket() as probe:
        # Lets a port be taken again right after a server has stopped, but not while one runs.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_blocks(count: int) -> list[int]:
    """Return the first ports of different blocks for replicas, in which nothing listens now."""
    blocks = list(range(*_REPLICA_PORTS, _BLOCK))
    random.SystemRandom().shuffle(blocks)  # servers that start at the same time must not find the same
    free = [first for first in blocks if all(_is_free(port) for port in range(first, first + _BLOCK))]
    return free[:count]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[int]:
    """Return different ports that nothing listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _stop(problem: str, code: int) -> NoReturn:
    typer.echo(f"whence-serve: {problem}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
