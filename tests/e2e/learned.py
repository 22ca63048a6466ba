"""Banks of dictionaries that the command learns of ResNet-20 in a few seconds, from images of three classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from concepts.repository import Repository
from offline.cli import app
from tests.offline.worlds import MODEL, cifar, repository, some_images

CLASSES = ("airplane", "cat", "ship")
PARTS = ("--parts-layer", "layer2", "--parts", "2", "--parts-crops", "40")
"""Options of CRAFT's parts."""

_QUICK = ("--random-starts", "0", "--stability-folds", "0")
TRAININGS = {
    "craft": ("--concepts", "5", *_QUICK),
    "face": ("--concepts", "3", "--fit-crops", "40", *_QUICK),
    "prototypes": ("--concepts", "4", "--noise-samples", "0", *_QUICK),
    "nmf": ("--ranks", "12", "--positions", "16", "--exemplar-images", "45"),
}
"""Options of each trainer."""


def bank_command(*arguments: object) -> Result:
    """Run ``whence-bank`` in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def training(trainer: str, place: Path, root: Path, *more: object, classes: tuple[str, ...] = CLASSES) -> list[str]:
    """Return the command line of a quick training at ``layer3``; later options win."""
    common = ("--model", MODEL, "--layer", "layer3", "--images", place / "train", "--held-out", place / "test")
    small = ("--held-out-per-class", 10, "--exemplars", 2, "--truth-images", 1, "--repository", root)
    chosen = ("--classes", ",".join(classes))
    return [str(word) for word in ("train", trainer, *common, *small, *chosen, *TRAININGS[trainer], *more)]


def make_place(place: Path) -> Path:
    """Write training and held-out images of three classes."""
    some_images(place / "train", "train", dict.fromkeys(CLASSES, 40))
    some_images(place / "test", "test", dict.fromkeys(CLASSES, 15))
    return place


def learn_banks(place: Path) -> Repository:
    """Return a repository with ResNet-20 and a bank by each trainer."""
    files = repository(place / "repository")
    for trainer in TRAININGS:
        done = bank_command(*training(trainer, place, files.root, *(PARTS if trainer == "craft" else ())))
        assert done.exit_code == 0, done.output
    return files


def copy_bank(files: Repository, reference: str, model: str) -> None:
    """Publish a bank for another model of the same weights."""
    version = files.resolve(reference)
    bank = files.load(version)
    pictures = {e.file: files.picture(version, e) for concept in bank.all_concepts for e in concept.exemplars}
    own = replace(bank, model=model, parts=None)
    if bank.parts is not None:
        parts = bank.parts
        own = own.with_parts(parts.kind, parts.layer, parts.channels, parts.concepts, parts.tensors)
    files.publish(own, pictures)


def add_exported(files: Repository) -> None:
    """Add ResNet-20 with an ONNX file, and again with one that lacks ``layer2``, each with the CRAFT bank."""
    spec = files.model_spec(MODEL)
    mean, std = (",".join(map(str, values)) for values in (spec.preprocessing.mean, spec.preprocessing.std))
    done = bank_command(
        *("model", "add", "exported", "--architecture", spec.architecture, "--size", 32, "--mean", mean, "--std", std),
        *("--weights", cifar() / "resnet20.safetensors", "--classes", ",".join(spec.class_names), "--onnx"),
        *("--repository", files.root),
    )
    assert done.exit_code == 0, done.output
    exported = files.load_model("exported")
    assert exported.onnx is not None
    assert exported.spec.exported is not None
    values = {layer: value for layer, value in exported.spec.exported.values.items() if layer != "layer2"}
    bare = replace(exported.spec, name="bare", weights_digest="", exported=None)
    weights = load_file(cifar() / "resnet20.safetensors")
    files.publish_model(bare, weights, exported=(exported.onnx(), values))
    for model in ("exported", "bare"):
        copy_bank(files, f"{MODEL}/layer3/craft", model)
