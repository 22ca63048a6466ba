"""FACE banks on real images: what is published and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from concepts.errors import InvalidInput
from offline.cli import app
from offline.progress import silent
from offline.trainers.craft import CraftConfig
from offline.trainers.craft import train as train_craft
from offline.trainers.face import FaceConfig, train
from tests.offline.worlds import MODEL, repository, some_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("face")
    some_images(root / "train", "train", {"ship": 40})
    some_images(root / "test", "test", {"ship": 30})
    return root


def common(place) -> dict:
    return {
        "model": MODEL,
        "layer": "layer3",
        "images": place / "train",
        "held_out": place / "test",
        "classes": ("ship",),
        "concepts": 5,
        "random_starts": 1,
        "stability_folds": 0,
        "exemplars": 2,
        "device": "cpu",
    }


def config(place, **changes) -> FaceConfig:
    return FaceConfig(**(common(place) | {"fit_crops": 60} | changes))


@pytest.fixture(scope="module")
def trained(place):
    files = repository(place / "repository")
    return files, train(files, config(place, stability_folds=2), silent)


def test_what_was_learned_is_stored_and_within_the_budget(trained):
    _, outcome = trained
    metrics = outcome.bank.metrics["classes"]["ship"]
    assert metrics["training_mse"] <= 1.05 * metrics["plain_mse"]
    assert metrics["error_increase"] == pytest.approx(metrics["training_mse"] / metrics["plain_mse"] - 1)
    assert metrics["training_kl"] < metrics["plain_kl"]
    assert metrics["training_crops"] == 60
    assert metrics["lambda"] > 0
    assert 0 < metrics["stability"] <= 1
    configuration = outcome.bank.configuration
    assert (configuration["method"], configuration["variant"]) == ("face", "spatial")
    assert configuration["max_error_increase"] == 0.05


def test_held_out_predictions_are_kept_better_than_by_craft(trained, place):
    files, outcome = trained
    craft = train_craft(files, CraftConfig(**common(place)), silent).bank.metrics["classes"]["ship"]
    assert outcome.bank.metrics["classes"]["ship"]["kl"] < craft["kl"]


def test_a_given_weight_is_used_and_pooled_crops_too(trained, place):
    files, _ = trained
    outcome = train(files, config(place, name="pooled", variant="pooled", lambda_=0.5), silent)
    assert outcome.bank.metrics["classes"]["ship"]["lambda"] == 0.5
    assert outcome.bank.configuration["max_error_increase"] is None
    assert outcome.bank.configuration["variant"] == "pooled"


def test_settings_are_read_as_people_write_them():
    needed = {"model": "m", "layer": "l", "images": "i"}
    assert FaceConfig(**needed, max_error_increase="5%").settings().max_error_increase == 0.05
    assert FaceConfig(**needed, max_error_increase="0.07").settings().max_error_increase == 0.07
    assert FaceConfig(**needed, lambda_="2").settings().weight == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lambda_": -1}, "greater than or equal to 0"),
        ({"lambda_": float("nan")}, "finite"),
        ({"max_error_increase": 0}, "greater than 0"),
        ({"max_error_increase": "-5%"}, "greater than 0"),
        ({"max_error_increase": "five%"}, "valid number"),
        ({"lambda_": 1, "max_error_increase": "5%"}, "exclude each other"),
        ({"focus": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        FaceConfig(model="m", layer="l", images="i", **settings)


def test_the_command_takes_percentages_and_lambda(place):
    arguments = ["train", "face", "--repository", str(place), "--model", "m", "--layer", "l", "--images", str(place)]
    both = CliRunner().invoke(app, [*arguments, "--lambda", "1", "--max-error-increase", "5%"])
    assert both.exit_code == 2
    assert "exclude each other" in both.output
    one = CliRunner().invoke(app, [*arguments, "--max-error-increase", "five"])
    assert one.exit_code == 2
    assert "valid number" in one.output


def test_tokens_without_a_place_are_refused_by_the_spatial_variant(trained, place):
    files, _ = trained
    from concepts.model import ModelSpec
    from concepts.preprocessing import Preprocessing
    from demo.networks import vit

    spec = ModelSpec("vit", "demo.networks:vit", Preprocessing(64, 64), ("a", "b"), "", {"num_classes": 2})
    files.publish_model(spec, vit(2).state_dict())
    asked = {"model": "vit", "layer": "encoder.layers.relu", "classes": (), "variant": "spatial"}
    with pytest.raises(InvalidInput, match="--variant pooled"):
        train(files, config(place, **asked), silent)
