"""Planes between all pairs of classes, and prototypes of what lies on one side (Herdt et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from concepts.bank import Bank, Concept
from concepts.contrast.engine import ContrastEngine
from concepts.contrast.planes import Planes
from concepts.errors import InvalidInput, NotTrainable
from concepts.repository import Repository
from offline import exemplars
from offline.contrast import contributions, held_out, insertion, prototypes, trials
from offline.contrast.config import ContrastConfig
from offline.contrast.held_out import Sides
from offline.contrast.pairs import by_target, confused
from offline.contrast.prototypes import Prototypes
from offline.contrast.solving import solve
from offline.contrast.statistics import Statistics, gather
from offline.contrast.trials import STEPS, Curves, Trials
from offline.images import fingerprint
from offline.progress import Reporter
from offline.task import Task, open_task
from offline.trainers import Outcome, Trainer

LEARNED, SIGNED, NO_PAIRS = "nmf", "none: activations at this layer can be negative", "none: asked for no pairs"
"""What a bank's configuration says of its prototypes."""


def train(repository: Repository, config: ContrastConfig, report: Reporter) -> Outcome:
    """Learn, measure and publish the planes between all classes that there are images of, with prototypes of some.

    Raises
    ------
    NotTrainable
        If the layer has no positions, or no plane can be learned; nothing is published then.
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the images or this machine.
    """
    task = open_task(repository, config, report)
    wanted = task.classes()
    _check(task, wanted)
    found = gather(task, wanted)
    planes = solve(found, config.min_images, config.shrinkage).to(task.model.device)
    sides = held_out.measure(task, planes, found.unit, set(found.digests.values()))
    pairs = by_target(confused(found.runners_up, planes.weights.exists, config.pairs))
    tested = trials.run(task, planes, found.unit, pairs, sides.members)
    signed = found.signed or not task.cut.non_negative
    learned = [] if signed else [one for one in prototypes.learn(task, planes, pairs, found.keys) if len(one.energy)]
    spec = task.model.spec
    excerpts = [excerpts for one in learned for excerpts in one.excerpts]
    drawn = exemplars.draw(task.training, excerpts)
    places = insertion.places(task.training, excerpts, spec.preprocessing)
    pool = insertion.Pool(task.model, task.held_out, sides.members, config.batch_size, task.skipped_images)
    bank = Bank(
        kind="contrast",
        model=config.model,
        layer=config.layer,
        name=config.name,
        weights_digest=spec.weights_digest,
        channels=task.cut.layout.channels,
        concepts=_concepts(learned, drawn),
        tensors=_tensors(found, planes, sides, tested, learned, places),
        configuration={
            "method": "contrast",
            **config.record(),
            "patch_size": config.side(spec.preprocessing, task.cut.layout.grid),
            "prototypes": SIGNED if signed else LEARNED if pairs else NO_PAIRS,
            "device": task.model.device.type,
        },
        data_fingerprint=fingerprint(found.digests),
        preprocessing=spec.preprocessing.to_json(),
    )
    contributed = contributions.measure(task, ContrastEngine(task.model, bank, task.cut), sides.members)
    concepts = tuple(replace(one, statistics=contributed.get(one.id, {})) for one in bank.concepts)
    concepts = insertion.tested(pool, concepts, places, drawn.pictures, config.insertion_images, config.seed, report)
    report("publishing", 0, 1)
    bank = replace(bank, concepts=concepts, metrics=_metrics(planes, sides, tested, concepts))
    bank = repository.publish(bank, drawn.pictures)
    report("publishing", 1, 1)
    return Outcome((bank,), _skipped(task, wanted, found, planes), task.skipped_images)


def _check(task: Task[ContrastConfig], wanted: Sequence[int]) -> None:
    """Refuse what no images could mend."""
    if len(wanted) < 2:
        raise InvalidInput("planes lie between two classes: name at least two --classes of a model, or none for all")
    if task.cut.layout.order == "bc":
        raise NotTrainable(
            f"layer {task.cut.layer!r} has no positions, and planes are between places in images: choose another layer "
            "of `whence-bank layers`",
            layer=task.cut.layer,
        )


def _concepts(learned: Sequence[Prototypes], drawn: exemplars.Drawn) -> tuple[Concept, ...]:
    """Return all prototypes, pair by pair."""
    owners = [(one.target, one.other) for one in learned for _ in one.energy]
    return tuple(
        Concept(index, class_index=target, other_index=other, exemplars=drawn.exemplars[index])
        for index, (target, other) in enumerate(owners)
    )


def _tensors(
    found: Statistics, planes: Planes, sides: Sides, tested: Trials, learned: Sequence[Prototypes], places: Tensor
) -> dict[str, Tensor]:
    """Return what banks of this kind hold."""
    tensors = {
        "directions": planes.directions,
        "products": planes.products,
        "centre": planes.centre,
        "images": found.images * planes.known.cpu(),
        "unit": torch.tensor(found.unit),
        "accuracy": sides.accuracy,
        "margin": sides.margin,
        "swap_rate": tested.swap_rate,
        "swap_shift": tested.swap_shift,
    }
    if not learned:
        return tensors
    return tensors | {"dictionary": torch.cat([one.dictionary for one in learned]), insertion.PLACES: places}


def _metrics(planes: Planes, sides: Sides, tested: Trials, concepts: Sequence[Concept]) -> dict[str, Any]:
    """Return means over pairs and over prototypes, the curves of the masking test, and how many pairs these are of."""
    tables = {
        "plane_accuracy": sides.accuracy,
        "plane_margin": sides.margin,
        "swap_rate": tested.swap_rate,
        "swap_shift": tested.swap_shift,
    }
    measured = {name: table[table.isfinite()].double() for name, table in tables.items()}
    mean = {name: float(values.mean()) for name, values in measured.items() if len(values)}
    if len(measured["plane_accuracy"]):
        mean["plane_accuracy_min"] = float(measured["plane_accuracy"].min())
    if tested.image_accuracy is not None:
        mean["image_accuracy"] = tested.image_accuracy
    metrics: dict[str, Any] = {
        "mean": mean,
        "pairs": {
            "planes": int(planes.weights.exists.sum()) // 2,
            "measured": len(measured["plane_accuracy"]) // 2,
            "tested": len(measured["swap_rate"]),
            "prototypes": len({(concept.class_index, concept.other_index) for concept in concepts}),
        },
        "held_out_fingerprint": fingerprint(sides.digests),
    }
    for name in insertion.SHARES:
        values = [concept.statistics[name] for concept in concepts if name in concept.statistics]
        mean |= {name: sum(values) / len(values)} if values else {}
    if tested.curves is not None:
        metrics["masking"] = {"removed": [step / STEPS for step in range(STEPS + 1)], **_lists(tested.curves)}
        mean |= {f"masking_{name}": _area(curve) for name, curve in _lists(tested.curves).items()}
    return metrics


def _lists(curves: Curves) -> dict[str, list[float]]:
    return {name: list(values) for name, values in asdict(curves).items()}


def _area(curve: Sequence[float]) -> float:
    """Return the area under a curve over the share of positions that are gone, by the trapezoid rule; at most 1."""
    return float(torch.trapezoid(torch.tensor(curve, dtype=torch.float64)) / STEPS)


def _skipped(task: Task[ContrastConfig], wanted: Sequence[int], found: Statistics, planes: Planes) -> Mapping[str, str]:
    """Return why classes that were wanted have no planes, by name."""
    reasons = {}
    for target in wanted:
        predicted, images = int(found.predicted[target]), len(found.keys.get(target, ()))
        if not predicted:
            reasons[target] = "the model predicts none of the training images as it: add images that it takes for it"
        elif not images:
            reasons[target] = "at this layer nothing speaks for it in the images predicted as it: choose another layer"
        elif not bool(planes.known[target]):
            reasons[target] = (
                f"only {images} training images are predicted as it, of {task.config.min_images} needed: add images, "
                "or lower --min-images"
            )
    return {task.model.spec.class_names[target]: reason for target, reason in reasons.items()}


TRAINER = Trainer("contrast", "Learn planes between classes: why one class and not another.", ContrastConfig, train)
