"""``whence-bank train contrast`` on real images: what is published, what is left out, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import ContrastRequest
from concepts.errors import InvalidInput, NotTrainable
from concepts.explanation import ExplainOptions
from concepts.kinds.contrast import tables
from concepts.repository import Repository
from offline.contrast.statistics import gather
from offline.images import fingerprint, open_folder, shuffled
from offline.progress import silent
from offline.trainers.contrast import train
from tests.offline.contrast import worlds
from tests.offline.test_cli import refused, run
from tests.offline.worlds import MODEL, cifar, repository, some_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return worlds.place(tmp_path_factory.mktemp("contrast"))


@pytest.fixture(scope="module")
def cifar_bank(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    files = repository(root / "repository")
    changes = {"layer": "layer3", "classes": (), "test_images": 4, "exemplars": 1, "held_out_per_class": 100}
    return files, train(
        files, worlds.config(root, images=cifar() / "train", held_out=cifar() / "test", **changes), silent
    )


def trained(place, **changes):
    files = Repository(place / "repository")
    return train(files, worlds.config(place, **({"test_images": 3, "exemplars": 1} | changes)), silent)


def test_planes_hold_on_images_that_they_were_not_learned_from(cifar_bank):
    bank = cifar_bank[1].bank
    mean = bank.metrics["mean"]
    assert mean["plane_accuracy"] >= 0.99
    assert mean["plane_accuracy_min"] >= 0.95
    assert mean["image_accuracy"] >= 0.95
    assert mean["swap_rate"] == 1.0
    assert 0.3 < mean["swap_shift"] < 0.5
    assert mean["masking_target"] < 0.6 * mean["masking_target_random"]
    assert mean["masking_other"] > 3 * mean["masking_other_random"]
    assert bank.metrics["pairs"] == {"planes": 45, "measured": 45, "tested": 90, "prototypes": 90}
    assert bank.tensors["images"].tolist() == [60] * 10
    assert len(bank.concepts) == 270
    assert bank.configuration["patch_size"] == 8
    assert cifar_bank[1].skipped_classes == {}


def test_tables_and_metrics_say_the_same(cifar_bank):
    bank = cifar_bank[1].bank
    held = tables(bank)
    for name, metric in {"accuracy": "plane_accuracy", "margin": "plane_margin"}.items():
        table = held.reports[name]
        assert torch.equal(table.nan_to_num(-1), table.T.nan_to_num(-1))
        assert float(table.double().nanmean()) == pytest.approx(bank.metrics["mean"][metric])
    assert bool(torch.isnan(held.reports["accuracy"].diagonal()).all())
    assert set(held.pairs) == {(i, j) for i in range(10) for j in range(10) if i != j}
    assert len(bank.metrics["masking"]["removed"]) == len(bank.metrics["masking"]["other_random"]) == 11
    assert json.loads(json.dumps(bank.metrics, allow_nan=False)) == bank.metrics


def test_the_engine_answers_with_the_bank(cifar_bank):
    files, outcome = cifar_bank
    bank = files.load(files.resolve(outcome.bank.reference))
    engine = ContrastEngine(files.load_model(MODEL), bank)
    folder = open_folder(cifar() / "test")
    views = np.stack([np.asarray(folder.open(key)) for key in folder.keys[:3]])
    options = ExplainOptions(top_k=3, maps=("activation",))
    for answer in engine.contrast(views, [ContrastRequest(options=options)] * 3):
        i, j = answer.target.index, answer.other.index
        assert answer.plane.accuracy == pytest.approx(float(bank.tensors["accuracy"][i, j]))
        assert answer.flip_shift is not None
        assert [(bank.concepts[c.id].class_index, bank.concepts[c.id].other_index) for c in answer.concepts] == [
            (i, j)
        ] * 3
        assert answer.concepts[0].activation > 0


def test_contributions_of_prototypes_are_of_held_out_images(cifar_bank):
    """Found again by predicting all held-out images, and contrasting the first of the class one at a time."""
    files, outcome = cifar_bank
    bank = outcome.bank
    engine = ContrastEngine(model := files.load_model(MODEL), bank)
    folder = open_folder(cifar() / "test")
    predicted = [
        (int(model.module(model.inputs(view)).argmax(1)), view)
        for key in shuffled(folder.keys, bank.configuration["seed"])[:200]
        for view in [np.asarray(folder.open(key))[None]]
    ]
    options = ExplainOptions(top_k=3)
    for target, other in ((3, 5), (8, 0)):
        views = [view for index, view in predicted if index == target][:4]
        answers = [engine.contrast(view, [ContrastRequest(target, other, options)])[0] for view in views]
        for concept in (c for c in bank.concepts if (c.class_index, c.other_index) == (target, other)):
            values = [score.contribution for answer in answers for score in answer.concepts if score.id == concept.id]
            assert len(values) == 4
            assert concept.statistics["contribution"] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-4)
            assert concept.statistics["importance"] == pytest.approx(np.mean(np.abs(values)), rel=1e-3, abs=1e-4)


def test_same_seed_same_bank(place, tmp_path):
    first = trained(place)
    assert trained(place).bank.digest == first.bank.digest
    assert trained(place, seed=1).bank.digest != first.bank.digest
    assert first.bank.configuration["seed"] == 0


def test_fingerprints_are_of_the_images_that_were_used(place):
    bank = trained(place).bank
    assert bank.data_fingerprint != bank.metrics["held_out_fingerprint"] != fingerprint({})
    other = trained(place, held_out_per_class=1).bank
    assert other.data_fingerprint == bank.data_fingerprint
    assert other.metrics["held_out_fingerprint"] != bank.metrics["held_out_fingerprint"]


def test_classes_without_images_are_skipped_with_their_reason(place):
    outcome = trained(place, classes=(*worlds.CLASSES, "cat", "dog"))
    assert "of 5 needed" in outcome.skipped_classes["cat"]
    assert "predicts none" in outcome.skipped_classes["dog"]
    assert set(outcome.skipped_images) == {"ship/broken.jpg"}
    images = outcome.bank.tensors["images"]
    assert images.nonzero().squeeze(1).tolist() == [6, 8, 9]
    assert {c.class_index for c in outcome.bank.concepts} | {c.other_index for c in outcome.bank.concepts} == {6, 8, 9}


def test_one_image_a_class_is_enough_if_asked_for(place):
    outcome = trained(place, images_per_class=1, min_images=1)
    assert sorted(outcome.bank.tensors["images"].tolist()) == [0] * 7 + [1] * 3
    assert outcome.bank.metrics["pairs"]["planes"] == 3


def test_two_classes_are_enough(place):
    bank = trained(place, classes=("ship", "truck")).bank
    assert bank.metrics["pairs"] == {"planes": 1, "measured": 1, "tested": 2, "prototypes": 2}
    assert bank.metrics["mean"]["plane_accuracy"] == bank.metrics["mean"]["plane_accuracy_min"]


def test_pairs_are_those_that_are_confused_most(place):
    bank = trained(place, pairs=2).bank
    assert bank.metrics["pairs"] == {"planes": 3, "measured": 3, "tested": 2, "prototypes": 2}
    assert len(tables(bank).pairs) == 2
    assert int(torch.isfinite(bank.tensors["swap_rate"]).sum()) == 2


def test_planes_alone_can_be_asked_for(place):
    bank = trained(place, pairs=0).bank
    assert bank.concepts == ()
    assert bank.configuration["prototypes"] == "none: asked for no pairs"
    assert "swap_rate" not in bank.metrics["mean"]
    assert "masking" not in bank.metrics


def test_signed_layers_have_planes_without_prototypes(place):
    bank = trained(place, model="bcos", layer="layer3").bank
    assert bank.concepts == ()
    assert "dictionary" not in bank.tensors
    assert "can be negative" in bank.configuration["prototypes"]
    assert bank.metrics["pairs"]["tested"] == 6
    assert bank.metrics["mean"]["plane_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"layer": "flatten"}, NotTrainable, "has no positions"),
        ({"classes": ("ship",)}, InvalidInput, "at least two"),
        ({"classes": ("dog", "deer")}, NotTrainable, "0 of 10 classes have the 5 training images"),
        ({"layer": "pool", "images_per_class": 5, "shrinkage": 0.0}, NotTrainable, "raise --shrinkage"),
        ({"layer": "pool", "images_per_class": 1, "min_images": 1}, NotTrainable, "all alike"),
    ],
)
def test_what_cannot_be_learned_is_refused(place, tmp_path, changes, error, words):
    files = repository(tmp_path)
    with pytest.raises(error, match=words):
        train(files, worlds.config(place, **changes), silent)
    assert files.banks() == []


def test_images_that_were_learned_from_are_not_held_out(place):
    once = trained(place, images_per_class=6)
    same = trained(place, images_per_class=6, held_out=place / "train")
    assert same.bank.data_fingerprint == once.bank.data_fingerprint
    left_out = [key for key, reason in same.skipped_images.items() if "cannot be held out" in reason]
    assert len(left_out) == 18
    with pytest.raises(InvalidInput, match="not a training image"):
        trained(place, held_out=place / "train")


def test_fewer_images_than_a_class_needs_cannot_be_asked_for(place):
    with pytest.raises(ValidationError, match="images_per_class 4 must be at least min_images 5"):
        worlds.config(place, images_per_class=4)


def test_commands_take_such_banks_or_say_why_not(place):
    at = ("--repository", place / "repository")
    command = ("train", "contrast", "--model", MODEL, "--layer", "layer2", "--images", place / "train", *at)
    command += ("--held-out", place / "test", "--test-images", 2, "--device", "cpu")
    code, out, _ = run(*command, "--classes", "frog,ship,truck,cat", "--pairs", 2)
    assert code == 0
    assert "right side" in out
    assert "cat has no planes" in out
    bank = f"{MODEL}/layer2/contrast"
    shown = run("show", bank, *at)[1]
    for words in ("mean plane_accuracy", "pairs planes", "against", "importance"):
        assert words in shown
    assert bank in run("list", *at)[1]
    assert "all as published" in run("verify", bank, *at)[1]
    assert "ask Contrast" in refused("evaluate", bank, "--images", place / "test", *at)

    code, out, _ = run(*command, "--classes", "frog,ship,truck", "--name", "round", "--shrinkage", 1, "--pairs", 0)
    assert code == 0
    assert "asked for no pairs" in out
    code, out, _ = run("compare", bank, f"{MODEL}/layer2/round", *at)
    assert code == 0
    assert "right side" in out
    assert run("train", "channels", *command[2:10], "--held-out", place / "test", "--exemplars", 0)[0] == 0
    assert "no metric in common" in refused("compare", bank, f"{MODEL}/layer2/channels", *at)


def test_more_images_than_asked_for_are_left_alone(place, tmp_path):
    some_images(tmp_path / "train", "train", {"ship": 30, "truck": 30})
    few = worlds.task(place, images=tmp_path / "train", classes=("ship", "truck"), images_per_class=6, batch_size=4)
    assert gather(few, few.classes()).images.tolist() == [0] * 8 + [6, 6]
