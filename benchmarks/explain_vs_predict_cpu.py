"""Explaining against plainly predicting, on the CPU: ResNet-50 at 224², batch 8, 25 NMF concepts, top 10 with maps."""

from __future__ import annotations

import torch

from benchmarks import measure, resnet50
from concepts.runtimes import Runtime

BATCH = 8
RUNTIMES = (Runtime(), Runtime("onnx"), Runtime(precision="bfloat16"), Runtime(precision="bfloat16", compile=True))


def main() -> None:
    """Measure images per second of ``explain`` by runtime beside eager float32 ``model(x)`` in the same process."""
    with resnet50.repository(exported=True) as (_, repository):
        engines = resnet50.engines(repository, RUNTIMES)
        model = repository.load_model("resnet50")
    views = resnet50.views(BATCH)
    requests = [resnet50.request()] * BATCH
    plain = model.module.to(memory_format=torch.contiguous_format)
    x = model.inputs(views).contiguous()

    def predict() -> None:
        with torch.inference_mode():
            plain(x)

    work = {name: lambda engine=engine: engine.explain(views, requests) for name, engine in engines.items()}
    seconds = measure.interleaved({"predict": predict, **work})
    measure.publish(
        "explain_vs_predict_cpu",
        [
            measure.row(
                f"explain_vs_predict_cpu: NMF of {resnet50.CONCEPTS}, {name}",
                BATCH / seconds[name],
                "images/s",
                baseline="eager float32 model(x)",
                baseline_value=BATCH / seconds["predict"],
                target=2.0,
            )
            for name in engines
        ],
    )


if __name__ == "__main__":
    main()
