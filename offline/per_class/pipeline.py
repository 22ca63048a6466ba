"""From images to a published bank with concepts of each class, class by class."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from concepts.bank import Bank, Concept
from concepts.errors import NotTrainable
from concepts.repository import Repository
from concepts.storage import LocalStorage
from offline import exemplars, importance, passes
from offline.encoders import open_encoder
from offline.exclusive import alone_in
from offline.images import fingerprint, shuffled
from offline.per_class.config import PerClassConfig
from offline.per_class.evaluation import ClassConcepts, Evaluation, codec_of, evaluate
from offline.per_class.lesson import Lesson, Lessons
from offline.progress import Reporter
from offline.refusals import negative_activations
from offline.task import Task, open_task
from offline.trainers import Outcome

_MEMBERS = "members.json"


class Method(Protocol):
    """A way to learn the concepts of a class."""

    @property
    def name(self) -> str:
        """What banks record it as."""
        ...

    @property
    def resolved(self) -> Mapping[str, Any]:
        """Settings that were left to it, as it chose them."""
        ...

    def learn(self, target: int, members: Sequence[str]) -> Lesson:
        """Learn the concepts of a class from images that the model predicts as it.

        Raises
        ------
        NotTrainable
            If there are none to be learned; the reason is told to the user, and the other classes go on.
        """
        ...


Config = TypeVar("Config", bound=PerClassConfig)
Chosen = TypeVar("Chosen", bound=Method)


def train_classes(
    repository: Repository,
    config: Config,
    report: Reporter,
    method_of: Callable[[Task[Config]], Chosen],
    finish: Callable[[Task[Config], dict[int, Lesson]], dict[int, Lesson]] | None = None,
    extend: Callable[[Chosen, Mapping[int, Lesson], Bank], tuple[Bank, Mapping[str, bytes]]] | None = None,
) -> Outcome:
    """Learn and publish one bank with the concepts of all requested classes.

    A class that cannot be learned is left out with a reason; the others go on. A training that was stopped goes on by
    the same call, and learns no class twice.

    Parameters
    ----------
    repository, config, report
        As of every trainer.
    method_of
        Makes the method ready for a task; what it refuses is refused before any work.
    finish
        Adds to the lessons, ranked, what needs all of them at once, such as exemplars from images of other classes.
    extend
        Adds to the bank, evaluated, what is learned from its concepts, such as their parts; and pictures of that.

    Raises
    ------
    NotTrainable
        If the layer's activations can be negative, or no class could be learned; nothing is published then.
    AlreadyExists
        If another process trains the bank.
    UnknownModel, UnknownLayer, InvalidCut, UnknownClass, InvalidInput
        If the configuration does not fit the model, the repository or this machine.
    """
    task = open_task(repository, config, report)
    if not task.cut.non_negative:
        raise negative_activations(task.model, config.layer)
    method = method_of(task)
    wanted = task.classes()
    encoder = None if config.encoder is None else open_encoder(config.encoder, repository, task.model.device)
    workspace = repository.workspace(config.model, config.layer, config.name)
    with alone_in(workspace, "another training of this bank is running: wait for it, or give this one another --name"):
        lessons, skipped = _learn_all(task, method, wanted, workspace / _identity(task, method))
        lessons = lessons if finish is None else finish(task, lessons)
        classes = {
            target: ClassConcepts(lesson.dictionary, lesson.measured().total_sobol, lesson.metrics)
            for target, lesson in lessons.items()
        }
        evaluation = evaluate(task, classes, encoder)
        bank, pictures = _bank(task, method, lessons, evaluation)
        if extend is not None:
            bank, more = extend(method, lessons, bank)
            pictures |= more
        report("publishing", 0, 1)
        bank = repository.publish(bank, pictures)
        report("publishing", 1, 1)
        shutil.rmtree(workspace, ignore_errors=True)
    return Outcome((bank,), skipped, task.skipped_images)


def _identity(task: Task[PerClassConfig], method: Method) -> str:
    """Return the name of the folder for unfinished work: another one for all that would be learned otherwise."""
    root = task.training.root
    decides = {
        "method": method.name,
        "configuration": {**task.config.record(), **method.resolved, "classes": ()},
        "weights": task.model.spec.weights_digest,
        "folder": str(root.resolve()) if isinstance(root, Path) else root.url,
        "images": task.training.keys,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _learn_all(
    task: Task[PerClassConfig], method: Method, wanted: Sequence[int], folder: Path
) -> tuple[dict[int, Lesson], dict[str, str]]:
    """Return what was learned of each class, and why of others nothing was, by name."""
    names = task.model.spec.class_names
    members = _members(task, wanted, folder)
    kept = Lessons(folder)
    lessons, skipped = {}, {}
    for step, target in enumerate(wanted):
        task.report("learning classes", step, len(wanted), names[target])
        try:
            lesson = kept.find(target)
            if lesson is None:
                lesson = _learn(task, method, target, members[target])
                kept.keep(target, lesson)
            lessons[target] = lesson
        except NotTrainable as error:
            skipped[names[target]] = error.message
    task.report("learning classes", len(wanted), len(wanted))
    if not lessons:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise NotTrainable(f"no class could be learned, so nothing was published ({reasons})")
    return lessons, skipped


def _members(task: Task[PerClassConfig], wanted: Sequence[int], folder: Path) -> dict[int, list[str]]:
    """Find training images that the model predicts as each class, in an order that only the seed decides."""
    files = LocalStorage(folder)
    if files.exists(_MEMBERS):
        kept = json.loads(files.read(_MEMBERS))
        found = {int(target): keys for target, keys in kept["members"].items()}
        if set(wanted) <= set(found):
            task.skipped_images.update(kept["skipped"])
            return found
    left = dict.fromkeys(wanted, task.config.images_per_class)
    members: dict[int, list[str]] = {target: [] for target in wanted}
    keys, done = shuffled(task.training.keys, task.config.seed), 0
    for batch in task.stream(task.training, keys):
        for key, target in zip(batch.keys, passes.predictions(task.model, batch), strict=True):
            if left.get(target, 0) > 0:
                left[target] -= 1
                members[target].append(key)
        done += len(batch.keys)
        task.report("predicting", min(done, len(keys) - 1), len(keys))
        if not any(left.values()):
            break
    task.report("predicting", len(keys), len(keys))
    files.write(_MEMBERS, json.dumps({"members": members, "skipped": task.skipped_images}).encode())
    return members


def _learn(task: Task[PerClassConfig], method: Method, target: int, members: Sequence[str]) -> Lesson:
    """Learn one class, and rank its concepts by importance."""
    config = task.config
    if not members:
        raise NotTrainable("the model predicts none of the training images as it: add images that it takes for it")
    if len(members) < config.min_images:
        raise NotTrainable(
            f"only {len(members)} training images are predicted as it, of {config.min_images} needed: add images, or "
            "lower --min-images"
        )
    lesson = method.learn(target, members)
    concepts = {target: ClassConcepts(lesson.dictionary, lesson.dictionary.new_empty(0))}
    codec, keys = codec_of(concepts, task.model.device), lesson.keys[: config.importance_images]
    explained = passes.explain(task.model, task.cut, codec, task.stream(task.training, keys), {target: len(keys)})
    sizes = {target: len(lesson.dictionary)}
    found = importance.measure(task.cut, codec, explained, sizes, config.designs)
    if target not in found:
        raise NotTrainable("none of its images gives finite activations: check the model and its preprocessing")
    return lesson.ranked(found[target])


def _bank(
    task: Task[PerClassConfig], method: Method, lessons: Mapping[int, Lesson], evaluation: Evaluation
) -> tuple[Bank, dict[str, bytes]]:
    """Return all classes' concepts as one bank, and the pictures that it names."""
    config, spec = task.config, task.model.spec
    records: list[Concept] = []
    pictures: dict[str, bytes] = {}
    for step, (target, lesson) in enumerate(lessons.items()):
        task.report("drawing exemplars", step, len(lessons))
        drawn = exemplars.draw(task.training, lesson.excerpts, first=len(records))
        pictures |= drawn.pictures
        found = lesson.measured()
        seen = evaluation.statistics.get(target, [{}] * len(lesson.dictionary))
        numbers = zip(found.total_sobol.tolist(), found.contribution.tolist(), seen, drawn.exemplars, strict=True)
        for index, contribution, more, shown in numbers:
            statistics = {"importance": index, "contribution": contribution, **more}
            records.append(Concept(len(records), class_index=target, statistics=statistics, exemplars=shown))
    task.report("drawing exemplars", len(lessons), len(lessons))
    digests = {key: digest for lesson in lessons.values() for key, digest in lesson.digests.items()}
    bank = Bank(
        kind="nmf",
        model=config.model,
        layer=config.layer,
        name=config.name,
        weights_digest=spec.weights_digest,
        channels=task.cut.layout.channels,
        concepts=tuple(records),
        tensors={"dictionary": torch.cat([lesson.dictionary for lesson in lessons.values()])},
        metrics=evaluation.metrics,
        configuration={"method": method.name, **config.record(), **method.resolved, "device": task.model.device.type},
        data_fingerprint=fingerprint(digests),
        preprocessing=spec.preprocessing.to_json(),
    )
    return bank, pictures
