"""Trainings of dictionaries by the command: what is refused or left out, and what a kill leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from concepts.repository import Repository
from tests.e2e.learned import PARTS, TRAININGS, bank_command, make_place, training
from tests.offline.worlds import MODEL, add_bcos, cifar, repository

PER_CLASS = [name for name in TRAININGS if name != "nmf"]
CAT = 3
WAIT_S = 120.0

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("trainings"))


def blind(weights: Weights) -> None:
    """Let a model never predict a cat."""
    weights["linear.bias"][CAT] = -1e6


def dark(weights: Weights) -> None:
    """Let all channels of its first ReLU be zero, and all predictions be cats."""
    weights["bn1.weight"].zero_()
    weights["bn1.bias"].fill_(-1)
    weights["linear.bias"][CAT] = 1e6


def add_broken(files: Repository, breaking: Callable[[Weights], None]) -> None:
    """Add ResNet-20 with weights that were broken on purpose."""
    weights = load_file(cifar() / "resnet20.safetensors")
    breaking(weights)
    spec = replace(files.model_spec(MODEL), name=breaking.__name__, weights_digest="")
    files.publish_model(spec, weights)


@pytest.fixture(scope="module")
def files(place: Path) -> Repository:
    """A repository with sound and broken models, and no bank."""
    files = repository(place / "repository")
    add_bcos(files)
    add_broken(files, blind)
    add_broken(files, dark)
    return files


def train(
    files: Repository, place: Path, trainer: str, *options: object, classes: tuple[str, ...]
) -> tuple[int, str, str]:
    """Run a training; return its exit code, its table on one line, and its error."""
    done = bank_command(*training(trainer, place, files.root, *options, classes=classes))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == (done.exit_code != 0)
    return done.exit_code, " ".join(done.stdout.split()), "".join(errors)


REFUSED = {
    "signed activations": (list(TRAININGS), ("--model", "bcos"), ("ship",), "can be negative.* sae takes any sign"),
    "zero activations": (
        list(TRAININGS),
        ("--model", "dark", "--layer", "relu"),
        ("cat",),
        "all zero|nowhere positive; choose another",
    ),
    "more concepts than channels": (PER_CLASS, ("--concepts", 65), ("ship",), "65 concepts do not fit.* 1 to 64"),
    "a rank above the channels": (["nmf"], ("--ranks", 65), ("ship",), "65 concepts do not fit.* 1 to 64"),
    "more concepts than vectors": (
        ["nmf"],
        ("--ranks", 30, "--image-limit", 10, "--positions", 2),
        ("ship",),
        "30 concepts do not fit 20 vectors",
    ),
    "a class that no folder has": (["nmf"], (), ("ship", "truck"), "no images of class 'truck'; folders .* ship"),
    "a class that the model does not know": (list(TRAININGS), (), ("zebra",), "no class 'zebra'"),
}


@pytest.mark.parametrize(("case", "trainer"), [(case, trainer) for case in REFUSED for trainer in REFUSED[case][0]])
def test_what_cannot_be_learned_is_refused_in_one_line(files: Repository, place: Path, case: str, trainer: str) -> None:
    _, options, classes, words = REFUSED[case]
    code, _, error = train(files, place, trainer, "--name", "refused", *options, classes=classes)
    assert code == 2
    assert re.search(words, error), error
    assert str(place) not in error
    assert all(version.name != "refused" for version in files.banks())


LEFT_OUT = {
    "never predicted": (PER_CLASS, ("--model", "blind"), "cat", "the model predicts none of the training images as it"),
    "few predicted": (PER_CLASS, (), "truck", "training images are predicted as it, of 10 needed"),
    "fewer crops than concepts": (["craft"], ("--concepts", 9, "--min-images", 1), "truck", "9 concepts do not fit 8"),
    "fewer pooled crops": (
        ["face"],
        ("--concepts", 9, "--min-images", 1, "--variant", "pooled"),
        "truck",
        "9 concepts do not fit 8",
    ),
    "fewer images than concepts": (
        ["prototypes"],
        ("--layer", "pool", "--min-images", 1),
        "truck",
        "4 concepts do not fit 2",
    ),
}


@pytest.mark.parametrize(("case", "trainer"), [(case, trainer) for case in LEFT_OUT for trainer in LEFT_OUT[case][0]])
def test_a_class_that_cannot_be_learned_is_left_out_with_its_reason(
    files: Repository, place: Path, case: str, trainer: str
) -> None:
    _, options, missing, words = LEFT_OUT[case]
    code, table, _ = train(files, place, trainer, "--name", "partial", *options, classes=(missing, "ship"))
    assert code == 0
    assert f"{missing} " in table
    assert "skipped: " in table
    assert words in table
    (version,) = [version for version in files.banks() if f"{version.reference} @" in table]
    names = files.model_spec(version.model).class_names
    owners = {names[concept.class_index] for concept in files.load(version).concepts if concept.class_index is not None}
    assert owners == {"ship"}


def begin(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start ``whence-bank`` in a process of its own."""
    command = [sys.executable, "-c", "from offline.cli import app; app()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums are the same to the bit for as many threads
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lessons(root: Path) -> list[Path]:
    """Return the files of classes that are learned already."""
    return sorted((root / "work").rglob("*.safetensors"))


def test_a_training_that_was_killed_goes_on_to_the_same_bank(place: Path, tmp_path: Path) -> None:
    reference = f"{MODEL}/layer3/craft"
    whole, killed = (repository(tmp_path / name) for name in ("whole", "killed"))
    commands = [training("craft", place, files.root, *PARTS) for files in (whole, killed)]
    process = begin(commands[1])
    until = time.monotonic() + WAIT_S
    while not lessons(killed.root):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(WAIT_S) == -signal.SIGKILL
    assert killed.banks() == []
    assert 1 <= len(lessons(killed.root)) < 3
    tampered = Repository(shutil.copytree(killed.root, tmp_path / "tampered"))
    mark(lessons(tampered.root)[0])
    assert [process.wait(WAIT_S) for process in map(begin, commands)] == [0, 0]
    assert killed.resolve(reference).digest == whole.resolve(reference).digest
    assert lessons(killed.root) == []
    # What was learned before is not learned again: it would not have this metric.
    assert bank_command(*training("craft", place, tampered.root, *PARTS)).exit_code == 0
    found = tampered.load(tampered.resolve(reference)).metrics["classes"]
    assert [values.get("marked") for values in found.values()] == [1.0, None, None]


def mark(path: Path) -> None:
    """Add a metric to a lesson."""
    with safe_open(path, framework="pt") as stored:
        lesson = json.loads(stored.metadata()["lesson"])
    lesson["metrics"]["marked"] = 1.0
    save_file(load_file(path), path, {"lesson": json.dumps(lesson)})
