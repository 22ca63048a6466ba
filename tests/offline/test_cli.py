"""The ``whence-bank`` command as a user types it."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from concepts.bank import Bank, Concept
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


def test_banks_without_classes_are_learned_listed_and_shown(place):
    at, folder = ("--repository", place / "repository"), ("--images", place / "images")
    code, out, err = run(
        "train", "sae", "--model", MODEL, "--layer", "layer3", *folder, *at, "--sizes", "64/4,32/2", "--epochs", 2,
        "--positions", 8, "--exemplars", 1, "--encoder", f"{MODEL}/layer2", "--stability-seeds", 1,
    )  # fmt: skip
    assert code == 0, err
    titles, *_ = (line for line in out.splitlines() if "digest" in line)
    for title in ("concepts", "accuracy", "reconstructed", "L0", "dead", "C²", "C² weighted", "stability"):
        assert title in titles
    for name, latents in (("sae-64-4", 64), ("sae-32-2", 32)):
        assert re.search(rf"{MODEL}/layer3/{name} +│ [0-9a-f]{{12}} +│ {latents} ", out)
        assert f"{MODEL}/layer3/{name}" in run("list", *at)[1]
    shown = run("show", f"{MODEL}/layer3/sae-64-4", *at)[1]
    for fact in ("mean consistency_of_contributions", "training variance_explained", "configuration: sizes"):
        assert fact in shown
    code, out, _ = run("train", "channels", "--model", MODEL, "--layer", "layer3", *folder, *at, "--exemplars", 1)
    assert code == 0
    assert re.search(rf"{MODEL}/layer3/channels +│ [0-9a-f]{{12}} +│ 64 ", out)
    line = refused("train", "sae", "--model", MODEL, "--layer", "layer3", *folder, *at, "--sizes", "8/9")
    assert "9 of 8 latents" in line


def test_of_thousands_of_concepts_the_most_important_are_shown(tmp_path):
    files, latents = repository(tmp_path), 3000
    importance = [float((index * 7919) % latents) for index in range(latents)]
    table = torch.nn.functional.normalize(torch.randn(latents, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    bank = Bank(
        kind="sae", model=MODEL, layer="layer3", name="large", channels=64,
        weights_digest=files.model_spec(MODEL).weights_digest,
        concepts=tuple(
            Concept(index, f"[label {index}]", statistics={"importance": value, "active_share": 0.5})
            for index, value in enumerate(importance)
        ),
        tensors={"encoder": table, "decoder": table.clone(), "k": torch.tensor(16)},
    )  # fmt: skip
    files.publish(bank)
    code, out, _ = run("show", f"{MODEL}/layer3/large", "--repository", tmp_path)
    assert code == 0
    assert "the 50 most important of 3,000 concepts" in out
    rows = re.findall(r"│ (\d+) +│ +│ (\[label \d+\]) +│ 0.500 +│ (\d+\.000)", out)
    best = sorted(range(latents), key=lambda index: -importance[index])[:50]
    assert rows == [(str(index), f"[label {index}]", f"{importance[index]:.3f}") for index in best]
    assert len(out.splitlines()) < 100
    assert re.search(
        rf"{MODEL}/layer3/large +│ [0-9a-f]{{12}} +│ sae +│ 3000 +│ +│", run("list", "--repository", tmp_path)[1]
    )


def test_every_field_of_every_trainer_is_an_option_with_help():
    assert {"channels", "craft", "sae"} <= {trainer.name for trainer in trainers()}
    for trainer in trainers():
        help_text = CliRunner().invoke(app, ["train", trainer.name, "--help"], env={"COLUMNS": "200"}).stdout
        for name, field in trainer.config.model_fields.items():
            assert field.description, name
            assert f"--{name.rstrip('_').replace('_', '-')}" in help_text, name
            option = option_of(name, field)
            if not field.is_required():
                # What a user gets by saying nothing is what the configuration's default is.
                given = {name: option.read(option.default)}
                required = {n: "x" for n, f in trainer.config.model_fields.items() if f.is_required()}
                assert getattr(trainer.config(**required, **given), name) == field.default
