"""Explaining against plainly predicting, on a GPU: ResNet-50 at 224², batch 64, 25 NMF concepts, top 10 with maps."""

from __future__ import annotations

import sys

import torch

from benchmarks import explain_overhead, measure, resnet50
from concepts import devices
from concepts.runtimes import Runtime

BATCH = 64
RUNTIMES = (
    Runtime(),
    Runtime(precision="bfloat16"),
    Runtime(precision="float16"),
    Runtime(precision="float16", compile=True),
)


def main() -> None:
    """Measure images per second of ``explain`` by precision beside eager float32 ``model(x)`` in the same process."""
    if not torch.cuda.is_available():
        print("explain_vs_predict_gpu needs a GPU; nothing was measured", file=sys.stderr)
        return
    device = devices.choose("cuda")
    with resnet50.repository() as (_, repository):
        engines = resnet50.engines(repository, RUNTIMES, device)
        model = repository.load_model("resnet50", device)
    views = resnet50.views(BATCH)
    requests = [resnet50.request()] * BATCH
    plain = model.module.to(memory_format=torch.contiguous_format)
    x = model.inputs(views).contiguous()

    def predict() -> None:
        with torch.inference_mode():
            plain(x).cpu()

    work = {name: lambda engine=engine: engine.explain(views, requests) for name, engine in engines.items()}
    seconds = measure.interleaved({"predict": predict, **work}, repeats=21)
    rows = [
        measure.row(
            f"explain_vs_predict_gpu: NMF of {resnet50.CONCEPTS}, {name}",
            BATCH / seconds[name],
            "images/s",
            baseline="eager float32 model(x)",
            baseline_value=BATCH / seconds["predict"],
            target=3.0,
        )
        for name in engines
    ]
    measure.publish(
        "explain_vs_predict_gpu", [*rows, *explain_overhead.rows(engines, BATCH, "explain_overhead on a GPU")]
    )


if __name__ == "__main__":
    main()
