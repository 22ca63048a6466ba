"""What the SDK adds to one ``explain``, over a bare stub that sends the same request to the same server."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

import whence
from benchmarks import canned, measure, served
from whence.v1 import explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as pb
from whence.v1.explanation_service_pb2_grpc import ExplanationServiceStub

CALLS = 400
WARM_UP = 40
ALLOWED_MS = 1.0


def main() -> None:
    """Measure medians of calls made in turn: both clients, each after its stub."""
    seconds = asyncio.run(measured(served.jpeg(0)))
    took_ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    rows = [
        measure.row(
            f"sdk_overhead: {client}.explain, p50 less that of a bare stub",
            took_ms[client] - took_ms[stub],
            "ms",
            higher_is_better=False,
            baseline="allowed",
            baseline_value=ALLOWED_MS,
            target=1.0,
        )
        for client, stub in (("Client", "stub"), ("AsyncClient", "asyncio stub"))
    ]
    measure.publish("sdk_overhead", rows, p50_ms={name: round(value, 3) for name, value in took_ms.items()})


async def measured(picture: bytes) -> dict[str, list[float]]:
    """Return the seconds of every call, by what made it."""
    request = pb.ExplainRequest(
        bank=canned.BANK,
        image=image_pb2.Image(encoded=picture),
        options=explanation_pb2.ExplainOptions(
            top_k=10, maps=[explanation_pb2.MAP_KIND_ACTIVATION, explanation_pb2.MAP_KIND_CONTRIBUTION]
        ),
    )
    times: dict[str, list[float]] = {}
    with (
        canned.service() as address,
        grpc.insecure_channel(address) as channel,
        whence.Client(address) as client,
    ):
        stub = ExplanationServiceStub(channel)  # type: ignore[no-untyped-call]
        async with grpc.aio.insecure_channel(address) as asyncio_channel, whence.AsyncClient(address) as asyncio_client:
            asyncio_stub = ExplanationServiceStub(asyncio_channel)  # type: ignore[no-untyped-call]

            async def through(call: Callable[[], object]) -> None:
                call()

            asked: dict[str, Any] = {"bank": canned.BANK, "maps": ("activation", "contribution")}
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "stub": lambda: through(lambda: stub.Explain(request, timeout=30.0)),
                "Client": lambda: through(lambda: client.explain(picture, **asked)),
                "asyncio stub": lambda: asyncio_stub.Explain(request, timeout=30.0),
                "AsyncClient": lambda: asyncio_client.explain(picture, **asked),
            }
            for number in range(-WARM_UP, CALLS):
                for name, call in calls.items():
                    start = time.perf_counter()
                    await call()
                    if number >= 0:
                        times.setdefault(name, []).append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
