"""Measuring published banks anew, by function and by command: what training stored comes out again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from concepts.bank import Bank, Concept
from concepts.errors import InvalidInput, UnknownClass, UnsupportedOption
from concepts.kinds.nmf import NmfCodec
from concepts.repository import Repository
from offline.evaluate import EvaluationSettings, evaluate_bank
from offline.free import FreeConfig, measure_free
from offline.progress import silent
from offline.task import open_task
from offline.trainers.craft import CraftConfig
from offline.trainers.craft import train as train_craft
from offline.trainers.sae import SaeConfig
from offline.trainers.sae import train as train_sae
from tests.offline.test_cli import refused, run
from tests.offline.worlds import MODEL, repository, some_images

ENCODER = f"{MODEL}/layer2"
CRAFT, SAE, FREE, FRACTION = (f"{MODEL}/layer3/{name}" for name in ("craft", "sae", "free", "fraction"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a bank of each kind that reconstructs, and images to measure them on."""
    root = tmp_path_factory.mktemp("evaluate")
    some_images(root / "train", "train", {"ship": 24, "truck": 24})
    some_images(root / "test", "test", {"ship": 18, "truck": 18})
    files = repository(root / "repository")
    base: dict[str, Any] = {
        "model": MODEL, "layer": "layer3", "images": root / "train", "held_out": root / "test", "exemplars": 1,
        "classes": ("ship", "truck"), "held_out_per_class": 15, "encoder": ENCODER, "encoder_images": 20, "seed": 3,
        "device": "cpu",
    }  # fmt: skip
    craft = train_craft(files, CraftConfig(**base, concepts=4, random_starts=0, stability_folds=2), silent).bank
    sae = {"sizes": ("128/4",), "epochs": 2, "positions": 8}
    train_sae(files, SaeConfig(**base, **sae, stability_seeds=1), silent)
    train_sae(files, SaeConfig(**(base | {"held_out": 0.3}), **sae, name="fraction"), silent)
    publish_free_nmf(files, FreeConfig(**base, name="free"), craft)
    return root


def publish_free_nmf(files: Repository, config: FreeConfig, like: Bank) -> None:
    """Publish the concepts of a bank as ones that belong to no class, measured as trainers do."""
    from offline.encoders import open_encoder

    task = open_task(files, config, silent)
    dictionary = like.tensors["dictionary"]
    codec = NmfCodec(dictionary, [None] * len(dictionary))
    encoder = open_encoder(ENCODER, files, task.model.device)
    measured = measure_free(task, encoder, codec, dictionary)
    files.publish(
        Bank(
            kind="nmf", model=MODEL, layer="layer3", name="free", weights_digest=like.weights_digest, channels=64,
            concepts=tuple(Concept(k, statistics=row) for k, row in enumerate(measured.statistics)),
            tensors={"dictionary": dictionary}, metrics=measured.metrics, configuration=config.record(),
        )
    )  # fmt: skip


@pytest.fixture
def files(place: Path) -> Repository:
    return Repository(place / "repository")


def settings(place: Path, folder: str = "test", **changes: Any) -> EvaluationSettings:
    return EvaluationSettings(**({"images": place / folder, "device": "cpu"} | changes))


def flat(metrics: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        found |= flat(value, f"{path}{name}/") if isinstance(value, Mapping) else {path + name: value}
    return found


TRAINING = {"stability", "stability_starts", "iterations", "projected_gradient"}


def of_training(path: str) -> bool:
    """Say whether only the training can tell a metric."""
    return path.startswith("training/") or (name := path.rpartition("/")[2]) in TRAINING or name.startswith("training_")


@pytest.mark.parametrize(
    ("reference", "folder", "more"),
    [(CRAFT, "test", {}), (SAE, "test", {}), (FREE, "test", {}), (FRACTION, "train", {"held_out_alone": True})],
)
def test_on_the_images_held_out_in_training_the_stored_numbers_come_out(place, files, reference, folder, more):
    bank = files.load(files.resolve(reference))
    found = evaluate_bank(files, reference, settings(place, folder, encoder=ENCODER, **more), silent)
    stored = {path: value for path, value in flat(bank.metrics).items() if not of_training(path)}
    assert flat(found.metrics) == stored
    assert {"mean/consistency", "mean/accuracy", "mean/deletion_aopc_25"} <= stored.keys()
    assert any(map(of_training, flat(bank.metrics))) is (reference != FREE)
    for concept, row in zip(bank.concepts, found.statistics, strict=True):
        assert row.items() <= concept.statistics.items()
        assert {"prevalence", "active_share"} <= row.keys()
    assert found.unseen == ()
    json.dumps(found.to_json(), allow_nan=False)


def test_other_settings_measure_otherwise(place, files):
    once = evaluate_bank(files, SAE, settings(place), silent).metrics
    assert "consistency" not in once["mean"]
    few = evaluate_bank(files, SAE, settings(place, held_out_per_class=3), silent).metrics
    assert once["mean"]["images"] > few["mean"]["images"] == 6
    ships = evaluate_bank(files, CRAFT, settings(place, classes=("ship",)), silent)
    assert set(ships.metrics["classes"]) == {"ship"}
    assert ships.unseen == ()
    other = evaluate_bank(files, SAE, settings(place, held_out_per_class=3, seed=4), silent).metrics
    assert other["held_out_fingerprint"] != few["held_out_fingerprint"]


def test_without_folders_of_classes_nothing_is_said_of_truth(place, files, tmp_path):
    for number, path in enumerate(sorted((place / "test").rglob("*.jpg"))):
        shutil.copy(path, tmp_path / f"{number}.jpg")
    for reference in (CRAFT, SAE):
        found = evaluate_bank(files, reference, settings(tmp_path, "."), silent)
        assert not {"accuracy", "accuracy_reconstructed"} & found.metrics["mean"].keys()
        assert not any("reliability" in row for row in found.statistics)
        assert found.metrics["mean"]["top1_agreement"] > 0.5


def test_classes_of_the_bank_that_are_not_seen_are_named(place, files, tmp_path):
    some_images(tmp_path / "ships", "train", {"ship": 12})
    found = evaluate_bank(files, CRAFT, settings(tmp_path, "ships"), silent)
    assert found.unseen == ("truck",)
    assert set(found.metrics["classes"]) == {"ship"}
    assert found.metrics["mean"]["kl"] == found.metrics["classes"]["ship"]["kl"]
    assert [bool(row) for row in found.statistics] == [
        concept.class_index == 8 for concept in files.load(files.resolve(CRAFT)).concepts
    ]
    code, out, err = run("evaluate", CRAFT, "--images", tmp_path / "ships", "--repository", place / "repository")
    assert code == 0
    assert "no image is predicted as truck" in err
    assert "truck" not in out


def test_what_cannot_be_measured_is_refused(place, files, tmp_path, monkeypatch):
    some_images(tmp_path / "frogs", "train", {"frog": 8})
    for reference in (CRAFT, SAE):
        with pytest.raises(InvalidInput, match="predicted as a class"):
            evaluate_bank(files, reference, settings(tmp_path, "frogs"), silent)
    with pytest.raises(UnknownClass):
        evaluate_bank(files, CRAFT, settings(place, classes=("zebra",)), silent)
    with pytest.raises(InvalidInput, match="without --held-out-alone"):
        evaluate_bank(files, CRAFT, settings(place, held_out_alone=True), silent)
    monkeypatch.setattr(NmfCodec, "reconstructs", False)
    with pytest.raises(UnsupportedOption, match="do not add up"):
        evaluate_bank(files, CRAFT, settings(place), silent)


def test_a_bank_that_ranks_nothing_is_refused(place, files):
    bank = files.load(files.resolve(CRAFT))
    plain = tuple(Concept(concept.id, class_index=concept.class_index) for concept in bank.concepts)
    files.publish(Bank(**{**vars(bank), "name": "unranked", "concepts": plain, "files": {}, "digest": ""}))
    with pytest.raises(UnsupportedOption, match="how important"):
        evaluate_bank(files, f"{MODEL}/layer3/unranked", settings(place), silent)


def test_the_command_prints_a_table_or_one_json_object(place, files):
    at = ("--images", place / "test", "--repository", place / "repository", "--device", "cpu")
    code, out, _ = run("evaluate", CRAFT, *at)
    assert code == 0
    assert re.search(r"deletion_aopc_25 +│ 0\.\d{3}", out)
    assert re.search(r"ship +│ +\d+ +│ +0\.\d{3}", out)
    assert "stability" not in out  # not measured here
    code, out, _ = run("evaluate", SAE, "--json", "--batch-size", 7, *at)
    assert code == 0
    found = json.loads(out)
    bank = files.load(files.resolve(SAE))
    assert (found["bank"], found["digest"]) == (SAE, bank.digest)
    assert found["metrics"]["mean"]["kl"] == pytest.approx(bank.metrics["mean"]["kl"], rel=1e-3)
    assert len(found["concepts"]) == 128


def test_mistakes_are_answered_by_one_line(place, tmp_path):
    shutil.copytree(place / "repository", tmp_path / "r")
    at, images = ("--repository", tmp_path / "r"), ("--images", place / "test")
    (tmp_path / "empty").mkdir()
    for command in ("evaluate", "compare"):
        assert "no bank" in refused(command, f"{MODEL}/layer3/x", *images, *at)
        assert "bank reference" in refused(command, "x", *images, *at)
        assert "holds no images" in refused(command, SAE, "--images", tmp_path / "empty", *at)
        assert "there is no folder" in refused(command, SAE, "--images", tmp_path / "nowhere", *at)
        assert "no model 'x'" in refused(command, SAE, *images, *at, "--encoder", "x/layer3")
        assert "must be MODEL/LAYER" in refused(command, SAE, *images, *at, "--encoder", "x")
        assert "no device" in refused(command, SAE, *images, *at, "--device", "abacus")
        assert "--batch-size" in refused(command, SAE, *images, *at, "--batch-size", 0)
    files = Repository(tmp_path / "r")
    version = files.resolve(SAE)
    tensors = next((tmp_path / "r").rglob(f"{version.digest}/tensors.safetensors"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for command in ("evaluate", "compare"):
        assert "tensors.safetensors has digest" in refused(command, SAE, *images, *at)
    model = files.load_model(MODEL)
    weights = {name: tensor + 0.01 * torch.ones_like(tensor) for name, tensor in model.module.state_dict().items()}
    files.publish_model(model.spec, weights, replace=True)
    for command in ("evaluate", "compare"):
        assert "was trained on weights" in refused(command, CRAFT, *images, *at)


def test_what_the_documentation_shows_runs(place, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = text[text.index("## Judging banks") :]
    commands = re.findall(r"^whence-bank (.*)$", section, re.MULTILINE)
    assert len(commands) >= 3
    monkeypatch.chdir(place)
    monkeypatch.setenv("WHENCE_REPOSITORY", "repository")
    for command in commands:
        code, _, err = run(*command.split())
        assert code == 0, err


def test_the_documentation_says_what_every_metric_is(place, files):
    section = (Path(__file__).parents[2] / "docs" / "training.md").read_text().partition("## Judging banks")[2]
    for reference in (CRAFT, SAE):
        for name in files.load(files.resolve(reference)).metrics["mean"]:
            assert f"`{name}`" in section, name
