"""Explaining a whole bucket through the service: throughput, memory, and what an interactive caller notices of it."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import whence
from benchmarks import canned, measure, resnet50, served
from benchmarks.bucket import NAME, bucket
from concepts.engine import Engine
from concepts.explanation import EngineRequest, ExplainOptions

IMAGES = 768
ROUNDS = 2
FEW, MANY = 5_000, 20_000
CALLS = 40
BATCH_S = 0.25
"""Longest batch of background images, as the server's settings have it."""


@dataclass(frozen=True)
class Client:
    """A process of its own that explains a batch."""

    address: str
    bank: str
    environment: Mapping[str, str]

    def start(self, source: str) -> subprocess.Popen[str]:
        """Begin to explain everything at a source."""
        command = [sys.executable, "-m", "benchmarks.batch_client", source, self.address, self.bank]
        return subprocess.Popen(command, env={**self.environment}, stdout=subprocess.PIPE, text=True)

    def run(self, source: str) -> tuple[float, float]:
        """Explain everything at a source; return images per second, and the peak of resident memory in MiB."""
        process = self.start(source)
        printed, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the batch of {source} failed")
        report = json.loads(printed.splitlines()[-1])
        return report["images_per_s"], report["peak_mib"]


def main() -> None:
    """Measure one after another, each against its like in the same run."""
    pictures = [served.jpeg(seed) for seed in range(IMAGES)]
    sizes = {"speed": IMAGES, "few": FEW, "many": MANY}
    with bucket(sizes, pictures) as environment, tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(pictures):
            (Path(folder) / f"{number:06d}.jpg").write_bytes(picture)
        with served.service() as (server, engine):
            client = Client(server.address, resnet50.REFERENCE, environment)
            alone_s, beside_s = interactive(client, folder, pictures)
            rates = throughput(client, {"an S3 bucket": f"s3://{NAME}/speed", "a folder": folder}, engine, pictures)
        with canned.service() as address:
            client = Client(address, canned.BANK, environment)
            _, few_mib = client.run(f"s3://{NAME}/few")
            many_rate, many_mib = client.run(f"s3://{NAME}/many")
    rows = [
        measure.row(
            f"batch_bucket: {IMAGES} images of {source}, ResNet-50, {served.PRECISION}",
            rate,
            "images/s",
            baseline=f"the engine in-process, batches of {served.BATCH_LIMIT}, decoded beforehand",
            baseline_value=rates["in process"],
            target=0.85,
        )
        for source, rate in rates.items()
        if source != "in process"
    ]
    rows += [
        measure.row(
            f"batch_bucket: the client's peak of resident memory, {MANY} images",
            many_mib,
            "MiB",
            higher_is_better=False,
            baseline=f"{FEW} images",
            baseline_value=few_mib,
            target=0.9,
        ),
        measure.row(
            "batch_bucket: p50 of an interactive caller beside a batch",
            1e3 * beside_s,
            "ms",
            higher_is_better=False,
            baseline=f"without one, and a background batch of {BATCH_S:g} s",
            baseline_value=1e3 * (alone_s + BATCH_S),
            target=1.0,
        ),
    ]
    notes = {"interactive_alone_p50_ms": round(1e3 * alone_s, 1), "client_limit_images_per_s": round(many_rate)}
    measure.publish("batch_bucket", rows, **notes)


def throughput(client: Client, sources: Mapping[str, str], engine: Engine, pictures: list[bytes]) -> dict[str, float]:
    """Return means of images per second, by source and in process, measured in turn by what has already worked."""
    fit = engine.model.spec.preprocessing.fit
    views = np.stack([fit(Image.open(io.BytesIO(picture)))[0] for picture in pictures])
    request = EngineRequest(options=ExplainOptions(top_k=10))

    def in_process() -> float:
        start = time.perf_counter()
        for first in range(0, IMAGES, served.BATCH_LIMIT):
            batch = views[first : first + served.BATCH_LIMIT]
            engine.explain(batch, [request] * len(batch))
        return IMAGES / (time.perf_counter() - start)

    engine.explain(views[: served.BATCH_LIMIT], [request] * served.BATCH_LIMIT)
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        measured = {name: client.run(source)[0] for name, source in sources.items()} | {"in process": in_process()}
        for name, rate in measured.items():
            rates.setdefault(name, []).append(rate)
    return {name: statistics.mean(values) for name, values in rates.items()}


def interactive(client: Client, folder: str, pictures: list[bytes]) -> tuple[float, float]:
    """Return the median seconds of calls made one after another: alone, and beside a batch."""
    with whence.Client(client.address) as caller:

        def median_s() -> float:
            times = []
            for picture in pictures[:CALLS]:
                start = time.perf_counter()
                caller.explain(picture, bank=client.bank, maps=())
                times.append(time.perf_counter() - start)
            return statistics.median(times)

        median_s()
        alone_s = median_s()
        batch = client.start(folder)
        try:
            time.sleep(5)  # until it is under way
            beside_s = median_s()
            if batch.poll() is not None:
                raise RuntimeError("the batch was over too soon: take more images")
        finally:
            batch.terminate()
            batch.communicate()
    return alone_s, beside_s


if __name__ == "__main__":
    main()
