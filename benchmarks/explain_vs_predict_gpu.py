"""Explaining against plainly predicting, on a GPU: ResNet-50 at 224², batch 64, NMF and SAE, top 10 with maps."""

from __future__ import annotations

import sys

import torch

from benchmarks import explain_overhead, explain_vs_predict_cpu, measure, resnet50
from concepts import devices
from concepts.runtimes import Runtime

BATCH = 64
TARGETS = {resnet50.NMF: 3.0, resnet50.SAE: 3.0}
OVERHEAD_TARGETS = {resnet50.NMF: 0.9, resnet50.SAE: 0.8}
REPEATS = 21
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
    rows = explain_vs_predict_cpu.rows(engines, model, BATCH, "explain_vs_predict_gpu", TARGETS, REPEATS)
    rows += explain_overhead.rows(engines, BATCH, "explain_overhead on a GPU", OVERHEAD_TARGETS)
    measure.publish("explain_vs_predict_gpu", rows)


if __name__ == "__main__":
    main()
