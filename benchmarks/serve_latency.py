"""What serving adds to one explanation at concurrency 1, against a no-op call through the same ingress."""

from __future__ import annotations

import statistics
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import whence
from benchmarks import measure, resnet50, served

CALLS = 60
WARM_UP = 5


def main() -> None:
    """Measure the median of ``Explain`` less the engine's stages, and of the health service's ``Check``, in turn."""
    images: dict[str, object] = {"JPEG of 320×240": served.jpeg(0), "raw pixels of 224×224": resnet50.views(1)[0]}
    times: dict[str, list[float]] = {name: [] for name in ("no-op", *images)}
    whole: dict[str, list[float]] = {name: [] for name in images}
    with (
        served.service() as (server, _),
        whence.Client(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for call in range(-WARM_UP, CALLS):
            start = time.perf_counter()
            health.Check(health_pb2.HealthCheckRequest(), metadata=(("application", "whence"),))
            spent = {"no-op": time.perf_counter() - start}
            for name, image in images.items():
                start = time.perf_counter()
                t = served.explain(client, image).timings
                elapsed = time.perf_counter() - start
                spent[name] = elapsed - 1e-3 * (t.trunk_ms + t.head_ms + t.codes_ms + t.explain_ms)
                if call >= 0:
                    whole[name].append(elapsed)
            if call >= 0:
                for name, seconds in spent.items():
                    times[name].append(seconds)
    no_op = 1e3 * statistics.median(times["no-op"])
    measure.publish(
        "serve_latency",
        [
            measure.row(
                f"serve_latency: {name}, p50 less the engine's stages",
                1e3 * statistics.median(times[name]),
                "ms",
                higher_is_better=False,
                baseline="no-op call (health Check) through the same ingress, p50",
                baseline_value=no_op,
                target=0.5,
            )
            for name in images
        ],
        explain_p50_ms={name: round(1e3 * statistics.median(seconds), 2) for name, seconds in whole.items()},
    )


if __name__ == "__main__":
    main()
