"""Explaining against plainly predicting, on the CPU: ResNet-50 at 224², batch 8, 25 NMF concepts, top 10 with maps."""

from __future__ import annotations

import torch

from benchmarks import measure, resnet50
from concepts.engine import Engine
from concepts.model import Model
from concepts.runtimes import Runtime

BATCH = 8
RUNTIMES = (Runtime(), Runtime("onnx"), Runtime(precision="bfloat16"), Runtime(precision="bfloat16", compile=True))


def main() -> None:
    """Measure images per second of ``explain`` by runtime beside eager float32 ``model(x)`` in the same process."""
    with resnet50.repository(exported=True) as (_, repository):
        engines = resnet50.engines(repository, RUNTIMES)
        model = repository.load_model("resnet50")
    measure.publish("explain_vs_predict_cpu", rows(engines, model, BATCH, "explain_vs_predict_cpu", target=2.0))


def rows(
    engines: dict[str, Engine], model: Model, batch: int, title: str, *, target: float, repeats: int = 7
) -> list[measure.Row]:
    """Measure each engine beside eager float32 ``model(x)``, as PyTorch lays a network out by default."""
    views, requests = resnet50.views(batch), [resnet50.request()] * batch
    plain = model.module.to(memory_format=torch.contiguous_format)
    x = model.inputs(views).contiguous()

    def predict() -> None:
        with torch.inference_mode():
            plain(x).cpu()

    work = {name: lambda engine=engine: engine.explain(views, requests) for name, engine in engines.items()}
    seconds = measure.interleaved({"predict": predict, **work}, repeats)
    return [
        measure.row(
            f"{title}: NMF of {resnet50.CONCEPTS}, {name}",
            batch / seconds[name],
            "images/s",
            baseline="eager float32 model(x)",
            baseline_value=batch / seconds["predict"],
            target=target,
        )
        for name in engines
    ]


if __name__ == "__main__":
    main()
