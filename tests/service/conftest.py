"""The service in one process: real repository, real engine, real gRPC server; only Ray is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2_grpc

from concepts.engine import Memory
from concepts.repository import BankVersion, Repository
from service.catalogue import Catalogue
from service.explainer import Explainer, Explains
from service.handlers import Handlers
from service.ingress import Ingress
from service.priority import Priority
from service.settings import Settings
from service.wire import add_explanation_service
from tests.e2e.repository import publish_bank, publish_model
from whence.v1 import explanation_pb2
from whence.v1.explanation_service_pb2_grpc import ExplanationServiceStub


@dataclass
class Counts:
    """A recorder that can be looked at."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    timings: list[explanation_pb2.Timings] = field(default_factory=list)
    priorities: Counter[Priority] = field(default_factory=Counter)
    batches: list[int] = field(default_factory=list)
    queues: list[int] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)

    def request(self, rpc: str, code: str) -> None:
        self.requests[rpc, code] += 1

    def stages(self, timings: explanation_pb2.Timings, priority: Priority) -> None:
        self.timings.append(timings)
        self.priorities[priority] += 1

    def batch(self, size: int) -> None:
        self.batches.append(size)

    def loaded(self, version: BankVersion, memory: Memory) -> None:
        self.memory[version.reference] = memory

    def queue(self, length: int) -> None:
        self.queues.append(length)


@dataclass
class Server:
    """A running server and how to reach it."""

    stub: Any
    channel: grpc.aio.Channel
    counts: Counts
    repository: Repository


@pytest.fixture(scope="session")
def small_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one model and one bank, not to be changed."""
    root = tmp_path_factory.mktemp("repository")
    publish_model(root)
    publish_bank(root)
    return root


Serve = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture
def serve(small_repository: Path) -> Serve:
    """Start a server; keyword arguments are settings, and ``explainer`` replaces the real one."""

    @asynccontextmanager
    async def start(
        root: Path = small_repository, explainer: Explains | None = None, **values: Any
    ) -> AsyncIterator[Server]:
        settings = Settings(repository=str(root), **{"refresh_s": 0.0, **values})
        repository, counts = Repository(root), Counts()
        real = Explainer(
            repository,
            device=torch.device("cpu"),
            threads=1,
            batch_limit=settings.batch_limit,
            queue_limit=settings.limits.queued_images,
            background_batch_s=settings.background_batch_s,
            engines=settings.engines,
            refresh_s=settings.refresh_s,
            observer=counts,
        )
        handlers = Handlers(settings, Catalogue(repository, refresh_s=settings.refresh_s), explainer or real)
        ingress = Ingress(settings, handlers, counts)
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2**26)])
        add_explanation_service(ingress, server)
        health_pb2_grpc.add_HealthServicer_to_server(ingress, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Server(ExplanationServiceStub(channel), channel, counts, repository)  # type: ignore[no-untyped-call]
        await server.stop(0)
        handlers.close()
        await real.close()

    return start
