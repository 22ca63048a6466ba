"""``whence-bank harvest`` as a user types it."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from offline.cli import app
from offline.store.reading import Store
from offline.store.settings import HarvestSettings
from tests.offline.buckets import s3, upload
from tests.offline.test_cli import refused, run
from tests.offline.worlds import MODEL, repository, some_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("harvest")
    some_images(root / "images", "train", {"ship": 6, "truck": 6})
    (root / "images/ship/bad.png").write_bytes(b"no image")
    repository(root / "repository")
    return root


def arguments(place, store, *more):
    where = ("--repository", place / "repository", "--layer", "layer3", "--store", store)
    return ("harvest", MODEL, *where, "--images", place / "images", *more)


def test_a_layer_is_harvested_and_told(place, tmp_path):
    code, out, err = run(*arguments(place, tmp_path / "s", "--positions", 4))
    assert code == 0
    assert re.search(r"vectors +│ +48 of 64 channels, float16", out)
    assert re.search(r"positions +│ +4 an image, attribution +│", out)
    assert re.search(r"images +│ +12 +│", out)
    assert re.search(r"skipped +│ +1 +│", out)
    assert "skipped image ship/bad.png" in err
    store = Store.open(tmp_path / "s")
    assert f"{store.bytes:,} (" in out
    assert run(*arguments(place, tmp_path / "s", "--positions", 4))[1] == out
    assert "positions 4, not 5" in refused(*arguments(place, tmp_path / "s", "--positions", 5))


def test_settings_are_read_from_text(place, tmp_path):
    code, out, _ = run(
        *arguments(place, tmp_path / "s", "--sampling", "all", "--dtype", "float32", "--classes", "ship"),
        "--disk-budget", "60kB", "--seed", 3, "--batch-size", 2,
    )  # fmt: skip
    assert code == 0
    assert re.search(r"\d+ an image, uniform \(64 would not fit the disk budget\)", out)
    assert Store.open(tmp_path / "s").bytes < 60_000
    help_text = CliRunner().invoke(app, ["harvest", "--help"], env={"COLUMNS": "200"}).stdout
    for name, field in HarvestSettings.model_fields.items():
        assert field.description
        assert f"--{name.replace('_', '-')}" in help_text


def test_a_bucket_is_harvested(place, tmp_path, monkeypatch):
    run(*arguments(place, tmp_path / "local", "--positions", 2))
    with s3(monkeypatch):
        code, _, _ = run(
            *arguments(place, tmp_path / "remote", "--positions", 2), "--images", upload(place / "images", "p")
        )
        assert code == 0
        line = refused(*arguments(place, tmp_path / "none"), "--images", "s3://none/p")
    assert "bucket 'none' cannot be read (no such bucket)" in line
    fingerprints = [Store.open(tmp_path / name).data_fingerprint for name in ("local", "remote")]
    assert fingerprints[0] == fingerprints[1]


def test_mistakes_are_answered_by_one_line(place, tmp_path):
    for more, words in {
        ("--classes", "zebra"): "no images of class 'zebra'",
        ("--disk-budget", "1kB"): "one position an image takes",
        ("--disk-budget", "much"): "--disk-budget",
        ("--positions", 0): "--positions",
        ("--layer", "layer9"): "no layer",
        ("--images", tmp_path / "nowhere"): "there is no folder",
    }.items():
        assert words in refused(*arguments(place, tmp_path / "s", *more))
    assert run(*arguments(place, tmp_path / "s", "--sampling", "some"))[0] == 2
    assert not (tmp_path / "s").exists()
