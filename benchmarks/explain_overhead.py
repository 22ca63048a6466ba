"""What explaining costs beside predicting by the same trunk and head: ResNet-50, batch 8, NMF and SAE, maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks import measure, resnet50
from concepts.engine import Engine
from concepts.runtimes import Runtime

BATCH = 8
RUNTIMES = (Runtime(), Runtime("onnx"), Runtime(precision="bfloat16"))
TARGETS = {resnet50.NMF: 0.9, resnet50.SAE: 0.6}


def main() -> None:
    """Measure images per second of ``explain`` beside its own trunk and head."""
    with resnet50.repository(exported=True) as (_, repository):
        engines = resnet50.engines(repository, RUNTIMES)
    measure.publish("explain_overhead", rows(engines, BATCH, "explain_overhead", TARGETS))


def rows(
    engines: Mapping[tuple[str, str], Engine], batch: int, title: str, targets: Mapping[str, float]
) -> list[measure.Row]:
    """Measure each engine beside its own trunk and head."""
    views, requests = resnet50.views(batch), [resnet50.request()] * batch

    def forward(engine: Engine) -> None:
        with torch.no_grad():
            engine.cut.head(engine.trunk(engine.model.inputs(views))).cpu()

    trunks = {runtime: engine for (_, runtime), engine in engines.items()}
    work: dict[tuple[str, str], Callable[[], object]] = {
        ("forward", runtime): partial(forward, engine) for runtime, engine in trunks.items()
    }
    work |= {names: partial(engine.explain, views, requests) for names, engine in engines.items()}
    seconds = measure.interleaved(work)
    return [
        measure.row(
            f"{title}: {bank}, {runtime}",
            batch / seconds[bank, runtime],
            "images/s",
            baseline="the same trunk and head, forward only",
            baseline_value=batch / seconds["forward", runtime],
            target=targets[bank],
        )
        for bank, runtime in engines
    ]


if __name__ == "__main__":
    main()
