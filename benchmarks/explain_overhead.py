"""What explaining costs beside predicting by the same trunk and head: ResNet-50, batch 8, 25 NMF concepts, maps."""

from __future__ import annotations

import torch

from benchmarks import measure, resnet50
from concepts.engine import Engine
from concepts.runtimes import Runtime

BATCH = 8
RUNTIMES = (Runtime(), Runtime("onnx"), Runtime(precision="bfloat16"))
TARGET = 0.9


def main() -> None:
    """Measure images per second of ``explain`` beside its own trunk and head."""
    with resnet50.repository(exported=True) as (_, repository):
        engines = resnet50.engines(repository, RUNTIMES)
    measure.publish("explain_overhead", rows(engines, BATCH, "explain_overhead"))


def rows(engines: dict[str, Engine], batch: int, title: str) -> list[measure.Row]:
    """Measure each engine beside its own trunk and head."""
    views, requests = resnet50.views(batch), [resnet50.request()] * batch

    def forward(engine: Engine) -> None:
        with torch.no_grad():
            engine.cut.head(engine.trunk(engine.model.inputs(views))).cpu()

    work = {f"explain {name}": lambda e=engine: e.explain(views, requests) for name, engine in engines.items()}
    work |= {f"forward {name}": lambda e=engine: forward(e) for name, engine in engines.items()}
    seconds = measure.interleaved(work)
    return [
        measure.row(
            f"{title}: NMF of {resnet50.CONCEPTS}, {name}",
            batch / seconds[f"explain {name}"],
            "images/s",
            baseline="the same trunk and head, forward only",
            baseline_value=batch / seconds[f"forward {name}"],
            target=TARGET,
        )
        for name in engines
    ]


if __name__ == "__main__":
    main()
