"""``whence-bank label`` and ``rename`` as a user types them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from concepts.repository import Repository
from offline.naming.label import LabelConfig
from offline.options import option_of
from offline.progress import silent
from offline.trainers.nmf import NmfConfig, train
from tests.offline.naming.conftest import CLIP
from tests.offline.test_cli import refused, run

REFERENCE = "cnn/stage3/nmf"


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two small banks."""
    root = tmp_path_factory.mktemp("command") / "repository"
    shutil.copytree(place / "repository" / "models", root / "models")
    images = {"images": place / "images" / "train", "held_out": place / "images" / "heldout"}
    few = {"positions": 16, "exemplars": 3, "exemplar_images": 60, "truth_images": 1, "device": "cpu"}
    for rank, name in ((4, "nmf"), (3, "other")):
        train(
            Repository(root), NmfConfig(model="cnn", layer="stage3", name=name, ranks=(rank,), **images, **few), silent
        )
    return root


@pytest.fixture
def at(trained: Path, tmp_path: Path) -> tuple[str, Path]:
    """The option of a repository that a test may change."""
    shutil.copytree(trained, tmp_path / "repository")
    return "--repository", tmp_path / "repository"


def words(place: Path) -> tuple[object, ...]:
    return "--clip", CLIP, "--vocabulary", place / "vocabulary", "--device", "cpu"


def test_banks_are_named_and_served(place: Path, at: tuple[str, Path]) -> None:
    files = Repository(at[1])
    before = files.resolve(REFERENCE).digest
    code, out, err = run(
        "label", REFERENCE, "cnn/stage3/other", *at, *words(place), "--images", place / "images" / "train",
        "--counterfactuals", 3, "--probe-images", 200, "--words", 4,
    )  # fmt: skip
    assert code == 0, err
    bank = files.load(files.resolve(REFERENCE))
    assert bank.digest != before
    assert f"{REFERENCE}@{bank.digest[:12]}: 4 of 4 concepts are named" in out
    assert re.search(r"cnn/stage3/other@[0-9a-f]{12}: 3 of 3 concepts are named", out)
    for concept in bank.concepts:
        shown = f"{concept.label}?" if concept.weak else concept.label
        assert re.search(rf"{concept.id} +│ {re.escape(shown)} +│ [\d.]+ +│ {concept.label}[^│]*│[^│]*│ 3 ", out)
        assert len(concept.words) <= 4
    assert err.count("skipped image night-ring/broken.png") == 2
    assert bank.labelling["settings"]["probe_images"] == 200


def test_renaming_is_told(place: Path, at: tuple[str, Path]) -> None:
    files = Repository(at[1])
    assert run("label", REFERENCE, *at, *words(place), "--counterfactuals", 0)[0] == 0
    machine = files.load(files.resolve(REFERENCE)).concept(2).label
    code, out, err = run("rename", REFERENCE, 2, "a thing", *at)
    version = files.resolve(REFERENCE)
    assert (code, err) == (0, "")
    assert out == f"concept 2 of {REFERENCE}@{version.digest[:12]} is called a thing\n"
    assert files.load(version).concept(2).named_by_person
    assert f"is called {machine}\n" in run("rename", REFERENCE, 2, "--clear", *at)[1]
    code, out, _ = run("rename", "cnn/stage3/other", 0, "--clear", *at)
    assert (code, out.endswith("is called nothing\n")) == (0, True)


def test_mistakes_are_answered_by_one_line(place: Path, at: tuple[str, Path], tmp_path: Path) -> None:
    served = Repository(at[1]).banks()
    label = ("label", REFERENCE, *at)
    assert "--images" in refused(*label, *words(place))
    assert "there is no folder" in refused(*label, *words(place), "--images", tmp_path / "nowhere")
    assert "there is no CLIP 'x'" in refused(*label, "--clip", "x", "--vocabulary", place / "vocabulary")
    assert "no vocabulary" in refused(*label, "--clip", CLIP, "--vocabulary", tmp_path)
    assert "--words" in refused(*label, *words(place), "--words", 0)
    assert "--counterfactual-similarity" in refused(*label, *words(place), "--counterfactual-similarity", 2)
    assert "no device" in refused(*label, *words(place), "--device", "abacus")
    assert "no bank" in refused("label", "cnn/stage3/x", *at, *words(place))
    rename = ("rename", REFERENCE)
    assert "concepts 0 to 3" in refused(*rename, 4, "x", *at)
    assert "--clear" in refused(*rename, 0, *at)
    assert "--clear" in refused(*rename, 0, "x", "--clear", *at)
    assert "--clear" in refused(*rename, 0, " ", *at)
    assert Repository(at[1]).banks() == served


def test_every_setting_is_an_option() -> None:
    from typer.testing import CliRunner

    from offline.cli import app

    text = CliRunner().invoke(app, ["label", "--help"], env={"COLUMNS": "200"}).stdout
    for name, field in LabelConfig.model_fields.items():
        assert field.description, name
        assert f"--{name.replace('_', '-')}" in text
        if not field.is_required():
            assert option_of(name, field).read(option_of(name, field).default) == field.default
