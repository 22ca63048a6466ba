"""CRAFT banks (Fel et al., CVPR 2023, arXiv 2211.10154): concepts of each class by NMF of crops' activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from concepts.bank import Bank, Concept
from concepts.cut import Cut
from concepts.errors import InvalidInput, NotTrainable
from concepts.kinds.nmf import NmfCodec
from concepts.model import Model
from concepts.preprocessing import Box
from concepts.repository import Repository
from offline import evaluation, exemplars, importance, localise, nmf, passes
from offline.config import TrainingConfig
from offline.crops import CropGrid
from offline.images import fingerprint, shuffled
from offline.importance import Importance
from offline.metrics import dictionaries
from offline.progress import Reporter
from offline.task import Task, open_task
from offline.trainers import Outcome, Trainer


class CraftConfig(TrainingConfig):
    """All that decides a CRAFT bank."""

    name: str = Field("craft", description="Name of the bank; model/layer/name is its reference.")
    concepts: int = Field(10, ge=1, description="Concepts a class (the rank of the factorisation).")
    patch_size: int | None = Field(
        None, ge=2, description="Side of a crop, in pixels of the model's view; default: 64, or half the view if less."
    )
    enlarge: bool | None = Field(
        None, description="Enlarge crops to the model's input size; default: only where it takes no other size."
    )
    images_per_class: int = Field(400, ge=1, description="Most training images of a class, in images.")
    min_images: int = Field(10, ge=1, description="Fewest images that a class can be learned from.")
    importance_images: int = Field(50, ge=1, description="Most images of a class to measure importance on.")
    designs: int = Field(32, ge=2, description="Designs of the Sobol estimator, where the head is not affine.")
    exemplars: int = Field(8, ge=0, description="Most exemplars of a concept.")
    random_starts: int = Field(4, ge=0, description="Starts of the factorisation beside the one by singular vectors.")
    tolerance: float = Field(1e-4, gt=0, description="Relative projected gradient at which a factorisation is done.")
    max_iterations: int = Field(2000, ge=1, description="Most alternations of a factorisation.")
    stability_folds: int = Field(5, ge=0, description="Refits to measure stability with; fewer than 2: not measured.")
    truth_images: int = Field(200, ge=1, description="Most held-out images to compare with known attributes.")


@dataclass(frozen=True)
class _Task(Task[CraftConfig]):
    """What all steps of one training share."""

    grid: CropGrid = field(kw_only=True)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Learned:
    """The concepts of one class."""

    dictionary: Tensor
    """float32 ``[K, C]``, rows of unit length."""
    codes: Tensor
    """Of the crops, float32 ``[N, K]``."""
    keys: list[str]
    boxes: list[Box]
    metrics: dict[str, float]
    """Of the factorisation."""

    def ordered(self, order: Tensor) -> _Learned:
        return replace(self, dictionary=self.dictionary[order], codes=self.codes[:, order])


def train(repository: Repository, config: CraftConfig, report: Reporter) -> Outcome:
    """Learn and publish one bank with the concepts of all requested classes.

    A class that cannot be learned is left out with a reason; the others go on.

    Raises
    ------
    NotTrainable
        If the layer's activations can be negative, or no class could be learned; nothing is published then.
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the repository or this machine.
    """
    task, wanted = _prepare(repository, config, report)
    names = task.model.spec.class_names
    members = _predicted(task, wanted)
    learned, skipped = {}, {}
    for step, target in enumerate(wanted):
        report("factorising crops", step, len(wanted))
        try:
            learned[target] = _learn(task, target, members[target])
        except NotTrainable as error:
            skipped[names[target]] = error.message
    report("factorising crops", len(wanted), len(wanted))
    if not learned:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise NotTrainable(f"no class could be learned, so nothing was published ({reasons})")
    found = _importance(task, learned)
    order = {target: found[target].total_sobol.argsort(descending=True, stable=True) for target in learned}
    learned = {target: lesson.ordered(order[target]) for target, lesson in learned.items()}
    found = {
        target: replace(i, total_sobol=i.total_sobol[order[target]], contribution=i.contribution[order[target]])
        for target, i in found.items()
    }
    metrics, statistics = _evaluate(task, learned, found)
    records, pictures = _concepts(task, learned, statistics)
    report("publishing", 0, 1)
    bank = Bank(
        kind="nmf",
        model=config.model,
        layer=config.layer,
        name=config.name,
        weights_digest=task.model.spec.weights_digest,
        channels=task.cut.layout.channels,
        concepts=records,
        tensors={"dictionary": torch.cat([lesson.dictionary for lesson in learned.values()])},
        metrics=metrics,
        configuration={"method": "craft", **task.config.record(), "device": task.model.device.type},
        data_fingerprint=fingerprint(task.digests),
        preprocessing=task.model.spec.preprocessing.to_json(),
    )
    bank = repository.publish(bank, pictures)
    report("publishing", 1, 1)
    return Outcome((bank,), skipped, task.skipped_images)


def _prepare(repository: Repository, config: CraftConfig, report: Reporter) -> tuple[_Task, list[int]]:
    """Open everything that the training needs, and find the wanted classes."""
    task = open_task(repository, config, report)
    if not task.cut.non_negative:
        raise _negative(task.model, config.layer)
    view = task.model.spec.preprocessing
    patch_size = config.patch_size or min(64, min(view.height, view.width) // 2)
    grid = _crop_grid(task.model, task.cut, patch_size, config.enlarge)
    config = config.model_copy(update={"patch_size": patch_size, "enlarge": grid.enlarge})
    wanted = task.classes()
    return _Task(task.model, task.cut, task.training, task.held_out, config, report, grid=grid), wanted


def _crop_grid(model: Model, cut: Cut, patch_size: int, enlarge: bool | None) -> CropGrid:
    """Choose how crops go in: as they are where the model takes them so, enlarged elsewhere.

    CRAFT enlarges them. Then a concept is learned at a scale that the images to explain do not have, and its codes
    reconstruct them badly: on CIFAR-10 (ResNet-20, layer3) the model keeps its prediction on 76 % of held-out images,
    against 99 % with crops as they are.
    """
    view = model.spec.preprocessing
    grid = CropGrid.of(view, patch_size, enlarge=bool(enlarge))
    blank = torch.zeros(1, view.channels, view.height, view.width, device=model.device)
    try:
        cut.trunk(grid.crops(blank))
    except (RuntimeError, AssertionError) as error:  # torchvision's transformers assert their input size
        if enlarge is None:
            return replace(grid, enlarge=True)
        raise InvalidInput(
            f"model {model.spec.name!r} cannot take crops of {patch_size} pixels as they are: leave out --no-enlarge"
        ) from error
    return grid


def _negative(model: Model, layer: str) -> NotTrainable:
    possible = [found.name for found in model.layers() if found.non_negative and found.layout.order != "bc"]
    layers = f"non-negative layers: {', '.join(possible[-5:])}" if possible else "this model has no non-negative layer"
    return NotTrainable(
        f"activations at layer {layer!r} of model {model.spec.name!r} can be negative, which NMF (craft) cannot learn; "
        f"{layers}; a bank of kind sae takes any sign",
        layer=layer,
    )


def _predicted(task: _Task, wanted: Sequence[int]) -> dict[int, list[str]]:
    """Find training images that the model predicts as each class, in an order that only the seed decides."""
    left = dict.fromkeys(wanted, task.config.images_per_class)
    members: dict[int, list[str]] = {target: [] for target in wanted}
    keys, done = shuffled(task.training.keys, task.config.seed), 0
    for batch in task.stream(task.training, keys):
        with torch.no_grad():
            predictions = task.model.module(task.model.inputs(batch.views)).argmax(1).tolist()
        for key, target in zip(batch.keys, predictions, strict=True):
            if left.get(target, 0) > 0:
                left[target] -= 1
                members[target].append(key)
        done += len(batch.keys)
        task.report("predicting", min(done, len(keys) - 1), len(keys))
        if not any(left.values()):
            break
    task.report("predicting", len(keys), len(keys))
    return members


def _learn(task: _Task, target: int, members: Sequence[str]) -> _Learned:
    """Factorise the crops of one class."""
    config = task.config
    if len(members) < config.min_images:
        raise NotTrainable(f"only {len(members)} training images are predicted as it, of {config.min_images} needed")
    rows, keys, boxes = _crop_activations(task, members)
    found = nmf.best_of(
        rows,
        config.concepts,
        random_starts=config.random_starts,
        seed=config.seed,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )
    codes, dictionary = found.codes[0], found.dictionary[0]
    used = dictionary.any(1) & codes.any(0)
    metrics = {
        "training_images": float(len(keys)),
        "training_crops": float(len(rows)),
        "training_mse": 2 * float(found.objective) / rows.numel(),
        "training_relative_error": (2 * float(found.objective)) ** 0.5 / float(rows.norm()),
        "iterations": float(found.iterations),
        "projected_gradient": float(found.residual),
    }
    if config.stability_folds > 1:
        metrics["stability"] = _stability(rows, task.grid.count, config)
    return _Learned(dictionary[used].float().cpu(), codes[:, used].float().cpu(), keys, boxes, metrics)


def _crop_activations(task: _Task, members: Sequence[str]) -> tuple[Tensor, list[str], list[Box]]:
    """Return each crop's mean activation, float64 ``[images · crops, C]``, with the images' keys and views' boxes."""
    cut, rows = task.cut, []
    keys: list[str] = []
    boxes: list[Box] = []
    for batch in task.stream(task.training, members, max(1, task.config.batch_size // task.grid.count)):
        with torch.no_grad():
            a = cut.trunk(task.grid.crops(task.model.inputs(batch.views)))
        if bool((a < 0).any()):
            raise _negative(task.model, cut.layer)
        rows.append(cut.positions(a)[:, cut.layout.tokens :].mean(1).double())
        keys += batch.keys
        boxes += batch.boxes
        task.digests.update(zip(batch.keys, batch.digests, strict=True))
    return torch.cat(rows), keys, boxes


def _stability(rows: Tensor, crops_per_image: int, config: CraftConfig) -> float:
    """Refit without each fold of images in turn, from independent random starts, and compare the dictionaries."""
    folds = config.stability_folds
    image = torch.arange(len(rows), device=rows.device) // crops_per_image
    # A row of zeros weighs nothing: the fold is left out without changing shapes.
    kept = image % folds != torch.arange(folds, device=rows.device).unsqueeze(1)
    refits = nmf.factorise(
        rows * kept.unsqueeze(2),
        config.concepts,
        start="random",
        seed=config.seed + 1,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )
    return dictionaries.stability(list(refits.dictionary))


def _codec(task: _Task, learned: Mapping[int, _Learned]) -> NmfCodec:
    dictionary = torch.cat([lesson.dictionary for lesson in learned.values()])
    owners = [target for target, lesson in learned.items() for _ in range(len(lesson.dictionary))]
    codec = NmfCodec(dictionary, owners)
    codec.to(task.model.device)
    return codec


def _importance(task: _Task, learned: Mapping[int, _Learned]) -> dict[int, Importance]:
    config = task.config
    quota = dict.fromkeys(learned, config.importance_images)
    keys = [key for lesson in learned.values() for key in lesson.keys[: config.importance_images]]
    codec = _codec(task, learned)
    explained = passes.explain(task.model, task.cut, codec, task.stream(task.training, keys), quota)
    sizes = {target: len(lesson.dictionary) for target, lesson in learned.items()}
    task.report("measuring importance", 0, 1)
    found = importance.measure(task.cut, codec, explained, sizes, config.designs)
    task.report("measuring importance", 1, 1)
    return found


def _evaluate(
    task: _Task, learned: Mapping[int, _Learned], found: Mapping[int, Importance]
) -> tuple[dict[str, Any], dict[int, list[dict[str, float]]]]:
    """Return the bank's metrics, and the statistics of each class's concepts."""
    config, names = task.config, task.model.spec.class_names
    task.report("evaluating", 0, 1)
    codec = _codec(task, learned)
    keys = shuffled(task.held_out.keys, config.seed)
    quota = dict.fromkeys(learned, config.held_out_per_class)
    explained = passes.explain(task.model, task.cut, codec, task.stream(task.held_out, keys), quota)
    order = {target: importance.total_sobol for target, importance in found.items()}
    evidence = evaluation.collect(task.cut, codec, explained, order)
    metrics: dict[str, dict[str, float]] = {}
    statistics = {}
    for target, lesson in learned.items():
        seen = evidence.get(target)
        metrics[names[target]] = dict(lesson.metrics)
        statistics[target] = [
            {"importance": float(index), "contribution": float(contribution)}
            for index, contribution in zip(found[target].total_sobol, found[target].contribution, strict=True)
        ]
        if seen is not None:
            labels = task.labels(task.held_out, seen.keys)
            metrics[names[target]] |= evaluation.class_metrics(seen, order[target], lesson.dictionary, labels)
            extra = evaluation.concept_statistics(seen, labels)
            statistics[target] = [a | b for a, b in zip(statistics[target], extra, strict=True)]
    result: dict[str, Any] = {"mean": evaluation.mean_metrics(metrics.values()), "classes": metrics}
    measured = localise.localise_held_out(
        task, codec, sum(len(i.contribution) for i in found.values()), keys, config.truth_images
    )
    result |= {} if measured is None else {"localisation": measured}
    task.report("evaluating", 1, 1)
    return result, statistics


def _concepts(
    task: _Task, learned: Mapping[int, _Learned], statistics: Mapping[int, list[dict[str, float]]]
) -> tuple[tuple[Concept, ...], dict[str, bytes]]:
    """Return the records of all concepts, and the pictures that they name."""
    records: list[Concept] = []
    pictures: dict[str, bytes] = {}
    for step, (target, lesson) in enumerate(learned.items()):
        task.report("drawing exemplars", step, len(learned))
        chosen = [
            [
                exemplars.Excerpt(lesson.keys[c.image], task.grid.box(c.crop, lesson.boxes[c.image]), c.activation)
                for c in best
            ]
            for best in exemplars.choose(lesson.codes, task.grid.count, task.config.exemplars)
        ]
        drawn = exemplars.draw(task.training, chosen, first=len(records))
        pictures |= drawn.pictures
        for shown, numbers in zip(drawn.exemplars, statistics[target], strict=True):
            records.append(Concept(len(records), class_index=target, statistics=numbers, exemplars=shown))
    task.report("drawing exemplars", len(learned), len(learned))
    return tuple(records), pictures


TRAINER = Trainer("craft", "Learn concepts of each class by NMF of crops (CRAFT).", CraftConfig, train)
