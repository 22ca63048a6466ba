"""What a contrast costs beside an explanation at the same layer: ResNet-50, planes of 1,000 classes, maps, shift curve.

Both answer with maps of both kinds on the layer's grid. ``layer4`` has an affine head; after ``layer3`` a stage of the
network runs for each of some twenty shifts, unless these are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from benchmarks import measure, resnet50
from concepts.bank import Bank, Concept
from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import ContrastRequest
from concepts.cut import Cut
from concepts.engine import Engine
from concepts.explanation import ExplainOptions
from concepts.kinds.contrast import REPORTED
from concepts.model import Model
from concepts.runtimes import Runtime, open_trunk

RUNTIMES = (Runtime(), Runtime(precision="bfloat16"))
BATCHES = (1, 8)
PAIR = (3, 5)
PROTOTYPES = 3
TARGET = 1 / 1.2
"""Of the throughput of explanations: a contrast may cost 1.2 times as much."""


def main() -> None:
    """Measure both, in turn."""
    with resnet50.repository() as (_, repository):
        model = repository.load_model("resnet50")
        rows = [row for layer in (resnet50.LAYER, "layer3") for row in at_layer(model, layer)]
    measure.publish("contrast_overhead", rows)


def at_layer(model: Model, layer: str) -> list[measure.Row]:
    """Measure at one layer, for each runtime and batch."""
    cut, rows = model.cut(layer), []
    nmf, planes = banks(model, cut)
    for runtime in RUNTIMES:
        trunk = open_trunk(runtime, model, cut)
        explains, contrasts = Engine(model, nmf, cut, trunk), ContrastEngine(model, planes, cut, trunk)
        for batch in BATCHES:
            views = resnet50.views(batch)
            work: dict[str, Callable[[], object]] = {
                "explain": partial(explains.explain, views, [resnet50.request()] * batch)
            }
            for name, shift in (("contrast", True), ("contrast without shift", False)):
                asked = ContrastRequest(*PAIR, options=ExplainOptions(maps=("activation", "contribution")), shift=shift)
                work[name] = partial(contrasts.contrast, views, [asked] * batch)
            seconds = measure.interleaved(work)
            rows += [
                measure.row(
                    f"contrast_overhead: {name}, {layer}, batch {batch}, {trunk.description}",
                    1e3 * seconds[name] / batch,
                    "ms/image",
                    higher_is_better=False,
                    baseline=f"explain, {resnet50.NMF}",
                    baseline_value=1e3 * seconds["explain"] / batch,
                    target=TARGET,
                )
                for name in work
                if name != "explain"
            ]
    return rows


def banks(model: Model, cut: Cut) -> tuple[Bank, Bank]:
    """Return a bank of found directions, and one of random planes with prototypes of one pair."""
    generator = torch.Generator().manual_seed(0)
    channels, classes = cut.layout.channels, len(model.spec.class_names)
    rows = cut.positions(cut.trunk(torch.randn(4, 3, 224, 224, generator=generator))).flatten(0, 1)
    chosen = rows[torch.randperm(len(rows), generator=generator)[: resnet50.CONCEPTS]]
    directions = functional.normalize(torch.randn(classes, channels, generator=generator), dim=1)
    tensors = {
        "directions": directions,
        "products": directions @ directions.T,
        "centre": rows.mean(0),
        "images": torch.full((classes,), 60),
        "unit": rows.norm(dim=1).mean(),
        "dictionary": chosen[:PROTOTYPES].clone(),
        **{name: torch.full((classes, classes), torch.nan) for name in REPORTED},
    }
    spec, target, other = model.spec, *PAIR
    shared = (spec.name, cut.layer)
    nmf = Bank(
        "nmf", *shared, "craft", spec.weights_digest, channels,
        tuple(map(Concept, range(len(chosen)))), {"dictionary": chosen.clone()},
    )  # fmt: skip
    prototypes = tuple(Concept(index, class_index=target, other_index=other) for index in range(PROTOTYPES))
    return nmf, Bank("contrast", *shared, "contrast", spec.weights_digest, channels, prototypes, tensors)


if __name__ == "__main__":
    main()
