"""Explaining against plainly predicting, on the CPU: ResNet-50 at 224², batch 8, 25 NMF concepts, top 10 with maps."""

from __future__ import annotations

import torch

from benchmarks import measure, resnet50
from concepts.engine import Engine, Precision

BATCH = 8


def main() -> None:
    """Measure images per second of ``explain`` beside eager float32 ``model(x)`` in the same process."""
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    with resnet50.repository() as (_, repository):
        model = repository.load_model("resnet50")
        bank = repository.load(repository.resolve(resnet50.REFERENCE))
        engines = {precision: Engine(model, bank, precision=precision) for precision in precisions}
        plain = repository.load_model("resnet50").module.to(memory_format=torch.contiguous_format)
    views = resnet50.views(BATCH)
    requests = [resnet50.request()] * BATCH
    x = model.inputs(views).contiguous()

    def predict() -> None:
        with torch.inference_mode():
            plain(x)

    work = {f"explain {p}": lambda engine=engine: engine.explain(views, requests) for p, engine in engines.items()}
    seconds = measure.interleaved({"predict": predict, **work})
    measure.publish(
        "explain_vs_predict_cpu",
        [
            measure.row(
                f"explain_vs_predict_cpu: NMF of {resnet50.CONCEPTS}, {precision}",
                BATCH / seconds[f"explain {precision}"],
                "images/s",
                baseline="eager float32 model(x)",
                baseline_value=BATCH / seconds["predict"],
                target=2.0,
            )
            for precision in precisions
        ],
    )


if __name__ == "__main__":
    main()
