"""Training class by class: what was learned survives a stop, and classes that cannot be learned say why."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from concepts.errors import AlreadyExists, NotTrainable
from concepts.preprocessing import Box
from offline.exclusive import alone_in
from offline.exemplars import Excerpt
from offline.importance import Importance
from offline.per_class.lesson import Lesson, Lessons
from offline.progress import silent
from offline.trainers import craft, face
from offline.trainers.craft import CraftConfig, train
from tests.offline.worlds import MODEL, repository, some_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    some_images(root / "train", "train", {"ship": 40, "truck": 40})
    some_images(root / "test", "test", {"ship": 10, "truck": 10})
    (root / "train" / "ship" / "broken.jpg").write_bytes(b"no picture")
    return root


def config(images, **changes) -> CraftConfig:
    base = {
        "model": MODEL,
        "layer": "layer3",
        "images": images / "train",
        "held_out": images / "test",
        "classes": ("ship", "truck"),
        "concepts": 4,
        "random_starts": 0,
        "stability_folds": 0,
        "exemplars": 2,
        "device": "cpu",
    }
    return CraftConfig(**(base | changes))


class Stopped(Exception):
    """Somebody pulled the plug."""


def stop_at(wanted: int):
    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "learning classes" and done == wanted:
            raise Stopped

    return report


def workplaces(files) -> list:
    return list((files.root / "work").rglob("*.safetensors"))


def test_a_training_that_was_stopped_goes_on_and_comes_to_the_same(images, tmp_path):
    whole = train(repository(tmp_path / "whole"), config(images), silent)
    files = repository(tmp_path / "stopped")
    with pytest.raises(Stopped):
        train(files, config(images), stop_at(1))
    assert files.banks() == []
    assert [path.name for path in workplaces(files)] == ["00008.safetensors"]
    resumed = train(files, config(images), silent)
    assert resumed.bank.digest == whole.bank.digest
    assert resumed.skipped_images == whole.skipped_images
    assert set(resumed.skipped_images) == {"ship/broken.jpg"}
    assert workplaces(files) == []  # nothing is left when it is published


def test_what_was_learned_is_not_learned_again(images, tmp_path):
    files = repository(tmp_path)
    with pytest.raises(Stopped):
        train(files, config(images), stop_at(1))
    (path,) = workplaces(files)
    lessons = Lessons(path.parent)
    lesson = lessons.find(8)
    lessons.keep(8, replace(lesson, metrics={**lesson.metrics, "iterations": -7.0}))
    metrics = train(files, config(images), silent).bank.metrics["classes"]
    assert metrics["ship"]["iterations"] == -7.0
    assert metrics["truck"]["iterations"] > 0


def test_a_lesson_of_other_settings_is_not_taken(images, tmp_path):
    files = repository(tmp_path)
    with pytest.raises(Stopped):
        train(files, config(images), stop_at(1))
    other = train(files, config(images, concepts=3), silent)
    assert len(other.bank.concepts) == 6


def test_a_lesson_of_another_folder_with_files_of_the_same_names_is_not_taken(images, tmp_path):
    mirrored = tmp_path / "mirrored" / "train"
    shutil.copytree(images / "train", mirrored)
    for path in (mirrored / "ship").glob("0*.jpg"):
        ImageOps.mirror(Image.open(path)).save(path)
    files = repository(tmp_path / "stopped")
    with pytest.raises(Stopped):
        train(files, config(images), stop_at(1))
    other = config(images).model_copy(update={"images": mirrored})
    whole = train(repository(tmp_path / "fresh"), other, silent)
    assert train(files, other, silent).bank.digest == whole.bank.digest


def test_a_damaged_lesson_is_learned_again(images, tmp_path):
    whole = train(repository(tmp_path / "whole"), config(images), silent)
    files = repository(tmp_path / "stopped")
    with pytest.raises(Stopped):
        train(files, config(images), stop_at(1))
    (path,) = workplaces(files)
    path.write_bytes(path.read_bytes()[:100])
    assert train(files, config(images), silent).bank.digest == whole.bank.digest


def test_a_seed_that_no_generator_takes_is_refused(images):
    with pytest.raises(ValidationError, match="less than or equal to 4294967295"):
        config(images, seed=2**32)


def test_two_trainings_of_one_bank_do_not_run_at_once(images, tmp_path):
    files = repository(tmp_path)
    with alone_in(files.workspace(MODEL, "layer3", "craft"), "busy"), pytest.raises(AlreadyExists, match="running"):
        train(files, config(images), silent)


def test_classes_that_cannot_be_learned_say_why(images, tmp_path):
    outcome = train(repository(tmp_path), config(images, classes=("ship", "frog", "cat"), min_images=5), silent)
    assert {concept.class_index for concept in outcome.bank.concepts} == {8}
    assert set(outcome.skipped_classes) == {"frog", "cat"}
    for reason in outcome.skipped_classes.values():
        assert "predict" in reason
        assert "add images" in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concepts": 65}, "ask for 1 to 64"),
        ({"concepts": 13, "images_per_class": 3, "min_images": 1}, "13 concepts do not fit 12 vectors"),
    ],
)
def test_more_concepts_than_fit_are_refused(images, tmp_path, changes, words):
    files = repository(tmp_path)
    with pytest.raises(NotTrainable, match=words):
        train(files, config(images, **changes), silent)
    assert files.banks() == []


@pytest.mark.parametrize("method", [craft, face])
def test_a_class_of_one_image_is_learned_though_its_stability_cannot_be_measured(images, tmp_path, method):
    few = config(images, classes=("ship",), concepts=3, images_per_class=1, min_images=1, stability_folds=2)
    known = few.model_dump(exclude={"name", *(set(CraftConfig.model_fields) - set(method.TRAINER.config.model_fields))})
    outcome = method.train(repository(tmp_path), method.TRAINER.config(**known), silent)
    metrics = outcome.bank.metrics["classes"]["ship"]
    assert metrics["training_images"] == 1
    assert "stability" not in metrics


def test_a_lesson_comes_back_as_it_was_kept(tmp_path):
    g = torch.Generator().manual_seed(0)
    numbers = torch.rand(3, generator=g, dtype=torch.float64)
    lesson = Lesson(
        dictionary=torch.rand(3, 7, generator=g),
        excerpts=[[Excerpt("a/ü.jpg", Box(0.1, 1 / 3, 2.0, 3.5), 0.1 + 0.2)], [], []],
        keys=["a/ü.jpg", "b"],
        digests={"a/ü.jpg": "00", "b": "11"},
        metrics={"training_mse": 1 / 3},
        importance=Importance(numbers, -numbers, 5),
    )
    lessons = Lessons(tmp_path)
    lessons.keep(3, lesson)
    found = lessons.find(3)
    assert lessons.find(4) is None
    assert torch.equal(found.dictionary, lesson.dictionary)
    assert torch.equal(found.measured().total_sobol, numbers)
    assert torch.equal(found.measured().contribution, -numbers)
    assert (found.excerpts, found.keys, found.digests, found.metrics) == (
        lesson.excerpts,
        lesson.keys,
        lesson.digests,
        lesson.metrics,
    )
    json.dumps(found.metrics)
