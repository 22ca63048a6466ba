"""End-to-end throughput of 32 concurrent callers, against the engine in-process on the same images."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

import whence
from benchmarks import measure, resnet50, served

CALLERS = 32
IMAGES = 192
ROUNDS = 5


def main() -> None:
    """Measure images per second, served and in-process in turn; the in-process images are decoded beforehand."""
    pictures = [served.jpeg(seed) for seed in range(IMAGES)]
    with served.service() as (server, engine), whence.Client(server.address, timeout_s=120) as client:
        fit = engine.model.spec.preprocessing.fit
        views = np.stack([fit(Image.open(io.BytesIO(picture)))[0] for picture in pictures])
        sizes: list[int] = []

        def in_process() -> None:
            for start in range(0, IMAGES, served.BATCH_LIMIT):
                batch = views[start : start + served.BATCH_LIMIT]
                engine.explain(batch, [resnet50.request()] * len(batch))

        def through_service() -> None:
            with ThreadPoolExecutor(CALLERS) as callers:
                answers = callers.map(lambda picture: served.explain(client, picture), pictures)
                sizes.extend(answer.timings.batch_size for answer in answers)

        start = time.perf_counter()
        seconds = measure.interleaved({"served": through_service, "in process": in_process}, repeats=ROUNDS)
        took = time.perf_counter() - start
    measure.publish(
        "serve_efficiency",
        [
            measure.row(
                f"serve_efficiency: {CALLERS} callers, ResNet-50, {served.PRECISION}",
                IMAGES / seconds["served"],
                "images/s",
                baseline=f"the engine in-process, batches of {served.BATCH_LIMIT}, decoded beforehand",
                baseline_value=IMAGES / seconds["in process"],
                target=0.9,
            )
        ],
        mean_batch_size=round(float(np.mean(sizes)), 1),
        took_s=round(took, 1),
    )


if __name__ == "__main__":
    main()
