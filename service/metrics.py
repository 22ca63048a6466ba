"""What the server counts, for Prometheus."""

from __future__ import annotations

from typing import Protocol

from concepts.engine import Memory
from concepts.repository import BankVersion
from service.priority import PRIORITIES, Priority
from whence.v1 import explanation_pb2

_LATENCY_BUCKETS_MS = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 3e4]
_BATCH_BUCKETS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
_STAGES = ("decode", "queue", "trunk", "head", "codes", "explain", "encode", "total")


class Recorder(Protocol):
    """Whoever keeps count."""

    def request(self, rpc: str, code: str) -> None:
        """Count one call, or one message of a stream, with the name of its gRPC code."""

    def stages(self, timings: explanation_pb2.Timings, priority: Priority) -> None:
        """Note how long each stage of one answer took."""

    def batch(self, size: int) -> None:
        """Note that so many images are computed together."""

    def queue(self, length: int) -> None:
        """Note that so many images wait."""

    def loaded(self, version: BankVersion, memory: Memory) -> None:
        """Note what a bank and its model hold."""


class RayRecorder:
    """Counts through Ray, which serves ``/metrics`` on every node; for use inside a replica.

    Ray puts ``ray_`` before the names.
    """

    def __init__(self) -> None:
        from ray.serve import metrics

        self._requests = metrics.Counter(
            "whence_requests_total",
            description="Calls and stream messages by RPC and gRPC code.",
            tag_keys=("rpc", "code"),  # type: ignore[arg-type]  # Ray's annotation allows a single key only
        )
        self._latency = metrics.Histogram(
            "whence_stage_latency_ms",
            description="Time spent in each stage of an explanation, in milliseconds, by priority.",
            boundaries=_LATENCY_BUCKETS_MS,
            tag_keys=("stage", "priority"),  # type: ignore[arg-type]
        )
        self._batch = metrics.Histogram(
            "whence_batch_size", description="Images computed together.", boundaries=_BATCH_BUCKETS
        )
        self._queue = metrics.Gauge("whence_queue_length", description="Images waiting to be computed.")
        self._memory = metrics.Gauge(
            "whence_memory_bytes",
            description="Tensors of what is loaded: weights by model, trunks by model and layer, banks by reference.",
            tag_keys=("what", "name"),  # type: ignore[arg-type]
        )
        self._stage_tags = {
            priority: [(f"{stage}_ms", {"stage": stage, "priority": priority}) for stage in _STAGES]
            for priority in PRIORITIES
        }

    def request(self, rpc: str, code: str) -> None:
        """See `Recorder`."""
        self._requests.inc(tags={"rpc": rpc, "code": code})

    def stages(self, timings: explanation_pb2.Timings, priority: Priority) -> None:
        """See `Recorder`."""
        for field, tags in self._stage_tags[priority]:
            self._latency.observe(getattr(timings, field), tags=tags)

    def batch(self, size: int) -> None:
        """See `Recorder`."""
        self._batch.observe(size)

    def queue(self, length: int) -> None:
        """See `Recorder`."""
        self._queue.set(length)

    def loaded(self, version: BankVersion, memory: Memory) -> None:
        """See `Recorder`."""
        self._memory.set(memory.model, tags={"what": "model", "name": version.model})
        self._memory.set(memory.trunk, tags={"what": "trunk", "name": f"{version.model}/{version.layer}"})
        self._memory.set(memory.bank, tags={"what": "bank", "name": version.reference})
