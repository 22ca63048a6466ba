"""Explaining against plainly predicting, on the CPU: ResNet-50 at 224², batch 8, NMF and SAE, top 10 with maps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks import measure, resnet50
from concepts.engine import Engine
from concepts.model import Model
from concepts.runtimes import Runtime

BATCH = 8
TARGETS = {resnet50.NMF: 2.0, resnet50.SAE: 1.5}
RUNTIMES = (Runtime(), Runtime("onnx"), Runtime(precision="bfloat16"), Runtime(precision="bfloat16", compile=True))


def main() -> None:
    """Measure images per second of ``explain`` by runtime beside eager float32 ``model(x)`` in the same process."""
    with resnet50.repository(exported=True) as (_, repository):
        engines = resnet50.engines(repository, RUNTIMES)
        model = repository.load_model("resnet50")
    measure.publish("explain_vs_predict_cpu", rows(engines, model, BATCH, "explain_vs_predict_cpu", TARGETS))


def rows(
    engines: Mapping[tuple[str, str], Engine],
    model: Model,
    batch: int,
    title: str,
    targets: Mapping[str, float],
    repeats: int = 7,
) -> list[measure.Row]:
    """Measure each engine beside eager float32 ``model(x)``, as PyTorch lays a network out by default."""
    views, requests = resnet50.views(batch), [resnet50.request()] * batch
    plain = model.module.to(memory_format=torch.contiguous_format)
    x = model.inputs(views).contiguous()

    def predict() -> None:
        with torch.inference_mode():
            plain(x).cpu()

    work = {names: partial(engine.explain, views, requests) for names, engine in engines.items()}
    seconds = measure.interleaved({("predict", ""): predict, **work}, repeats)
    return [
        measure.row(
            f"{title}: {bank}, {runtime}",
            batch / seconds[bank, runtime],
            "images/s",
            baseline="eager float32 model(x)",
            baseline_value=batch / seconds["predict", ""],
            target=targets[bank],
        )
        for bank, runtime in engines
    ]


if __name__ == "__main__":
    main()
