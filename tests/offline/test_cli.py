"""The ``whence-bank`` command as a user types it."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from concepts.repository import Repository
from demo.cifar import CLASS_NAMES
from offline.cli import app
from offline.options import option_of
from offline.trainers import trainers
from tests.offline.worlds import MODEL, cifar, repository, some_images

REFERENCE = f"{MODEL}/layer3/craft"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: object) -> str:
    """Run what must fail by one plain line, and return it."""
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    some_images(root / "images", "train", {"ship": 40, "truck": 40})
    repository(root / "repository")
    return root


def train(place, *more: object) -> tuple[int, str, str]:
    return run(
        "train", "craft", "--model", MODEL, "--layer", "layer3", "--images", place / "images",
        "--repository", place / "repository", "--concepts", 4, "--stability-folds", 0, "--exemplars", 1, *more,
    )  # fmt: skip


def test_life_of_a_bank(place):
    files = Repository(place / "repository")
    code, out, _ = train(place, "--classes", "ship,truck")
    assert code == 0
    assert re.search(r"ship +│ +\d+ +│ +\d+", out)
    first = files.resolve(REFERENCE).digest
    code, _, _ = train(place, "--classes", "ship", "--classes", "truck", "--seed", 1)
    assert code == 0
    second = files.resolve(REFERENCE).digest
    assert second != first

    at = ("--repository", place / "repository")
    assert second[:12] in run("list", *at)[1]
    shown = run("show", REFERENCE, *at)[1]
    assert "configuration: seed" in shown
    assert "mean top1_agreement" in shown
    assert "all as published" in run("verify", REFERENCE, *at)[1]
    assert run("rollback", REFERENCE, first, *at)[0] == 0
    assert files.resolve(REFERENCE).digest == first

    tensors = next((place / "repository").rglob(f"{first}/tensors.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    assert "tensors.safetensors has digest" in refused("verify", REFERENCE, *at)


def test_models_are_added_listed_and_cut(tmp_path):
    at = ("--repository", tmp_path / "r")
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(CLASS_NAMES) + "\n")
    weights = tmp_path / "resnet20.pth"
    from safetensors.torch import load_file

    state = load_file(cifar() / "resnet20.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, weights)
    code, out, _ = run(
        "model", "add", MODEL, "--architecture", "demo.cifar:resnet20", "--weights", weights, "--classes", names,
        "--size", 32, "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", *at,
    )  # fmt: skip
    assert code == 0
    assert "10 classes" in out
    assert Repository(tmp_path / "r").model_spec(MODEL).class_names == CLASS_NAMES
    assert MODEL in run("models", *at)[1]
    layers = run("layers", MODEL, *at)[1]
    assert re.search(r"layer3 +│ +64×8×8 +│ +8×8 +│ +│ +[\d,]+ +│ +650 +│ yes +│ affine", layers)
    assert re.search(r"bn1 +│ +16×32×32 +│ +32×32 +│ +│ +[\d,]+ +│ +[\d,]+ +│ no", layers)
    assert "layer1.0.bn1" not in layers  # bypassed by the shortcut


class _Code:
    """Something that no weights file should hold."""


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"not a file", "weights"), (None, "there is no weights file"), (_Code(), "holds more than tensors")],
)
def test_weights_that_cannot_be_read_are_refused(tmp_path, content, words):
    weights = tmp_path / "w.pth"
    if isinstance(content, bytes):
        weights.write_bytes(content)
    elif content is not None:
        torch.save(content, weights)
    line = refused(
        "model", "add", "m", "--architecture", "torchvision:resnet18", "--weights", weights, "--classes", "a,b",
        "--size", 32, "--resize", 0, "--repository", tmp_path,
    )  # fmt: skip
    assert words in line


def test_mistakes_are_answered_by_one_line(place, tmp_path):
    assert "no model" in refused(
        "train", "craft", "--model", "x", "--layer", "y", "--images", place, "--repository", tmp_path
    )
    assert "there is no folder" in train(place, "--images", place / "nowhere")[2]
    assert "no class 'zebra'" in train(place, "--classes", "zebra")[2]
    assert "--concepts" in train(place, "--concepts", 0)[2]
    assert "no layer" in train(place, "--layer", "layer9")[2]
    assert "no device" in train(place, "--device", "abacus")[2]
    assert "bank reference" in refused("show", "x", "--repository", tmp_path)
    assert "no bank" in refused("verify", REFERENCE, "--repository", tmp_path)


def test_a_repository_elsewhere_is_refused_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "must be a folder" in refused("list", "--repository", "s3://bucket/banks")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bank_does_not_hide_the_others(place):
    repository = Repository(place / "repository")
    (version, *_) = repository.banks()
    other = place / "repository" / "banks" / version.model / version.layer / "damaged"
    other.mkdir()
    (other / "CURRENT").write_text("0" * 64 + "\n")
    try:
        code, out, err = run("list", "--repository", place / "repository")
    finally:
        (other / "CURRENT").unlink()
        other.rmdir()
    assert code == 0
    assert version.reference in out
    assert "damaged: " in err


def test_every_field_of_every_trainer_is_an_option_with_help():
    assert [trainer.name for trainer in trainers()] == ["channels", "craft", "sae"]
    for trainer in trainers():
        help_text = CliRunner().invoke(app, ["train", trainer.name, "--help"], env={"COLUMNS": "200"}).stdout
        for name, field in trainer.config.model_fields.items():
            assert field.description, name
            assert f"--{name.replace('_', '-')}" in help_text, name
            option = option_of(name, field)
            if not field.is_required():
                # What a user gets by saying nothing is what the configuration's default is.
                given = {name: option.read(option.default)}
                required = {n: "x" for n, f in trainer.config.model_fields.items() if f.is_required()}
                assert getattr(trainer.config(**required, **given), name) == field.default
