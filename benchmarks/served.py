"""The service that is measured: ResNet-50 behind ``whence-serve``, and the pictures that are sent to it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

import whence
from benchmarks import resnet50
from concepts.engine import Engine
from concepts.runtimes import Precision
from concepts.runtimes.torch import TorchTrunk
from demo.serving import Server, serving

PRECISION: Precision = "bfloat16"
BATCH_LIMIT = 16


@contextmanager
def service() -> Iterator[tuple[Server, Engine]]:
    """Serve ResNet-50; yield the server and the same engine in this process."""
    with resnet50.repository() as (root, repository):
        model = repository.load_model("resnet50")
        cut = model.cut(resnet50.LAYER)
        bank = repository.load(repository.resolve(resnet50.REFERENCE))
        engine = Engine(model, bank, cut, TorchTrunk(cut, PRECISION))
        environment = {"WHENCE_SERVE_PRECISION": PRECISION, "WHENCE_SERVE_BATCH_LIMIT": str(BATCH_LIMIT)}
        with serving(root, environment=environment) as server:
            yield server, engine


def jpeg(seed: int, width: int = 320, height: int = 240) -> bytes:
    """Return a smooth random picture, encoded."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def explain(client: whence.Client, image: object) -> whence.Explanation:
    """Ask what speed is measured with."""
    return client.explain(image, bank=resnet50.REFERENCE, top_k=10, maps=("activation", "contribution"))  # type: ignore[arg-type]
