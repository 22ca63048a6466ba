"""Images in a bucket: the same as in a folder, and one plain line where the bucket does not give them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest

from concepts.errors import InvalidInput
from concepts.preprocessing import Preprocessing
from offline.config import TrainingConfig
from offline.images import ImageFolder, Stream, open_folder
from offline.locations import Bucket, location
from offline.truth import read_truth
from tests.offline.buckets import BUCKET, s3, tell, upload
from tests.offline.worlds import some_images

VIEW = Preprocessing(32, 32)
ODD = "dog & #1 ü %20/a b+c?d.png"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3(monkeypatch) as address:
        yield address


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = some_images(tmp_path / "images", "test", {"cat": 4, "ship": 4})
    (folder / ODD).parent.mkdir()
    next((folder / "cat").iterdir()).rename(folder / ODD)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden/x.png").write_bytes(b"x")
    return folder


def config(**fields: object) -> TrainingConfig:
    return TrainingConfig(**({"model": "m", "layer": "l", "images": "x", "name": "n"} | fields))


def test_a_bucket_is_read_as_a_folder_is(server, images):
    local, remote = open_folder(images), open_folder(upload(images, "a/deep place"))
    assert remote.keys == local.keys
    assert len(remote.keys) == 8
    assert ODD in remote.keys
    assert [remote.label(key) for key in remote.keys] == [local.label(key) for key in local.keys]
    assert np.array_equal(remote.open(local.keys[0]), local.open(local.keys[0]))
    mine, theirs = (next(iter(Stream(folder, folder.keys, VIEW, 8))) for folder in (local, remote))
    assert mine.digests == theirs.digests
    assert np.array_equal(mine.views, theirs.views)
    assert read_truth(remote.root) is None


def test_a_whole_bucket_and_a_trailing_slash(server, images):
    upload(images, "p")
    assert open_folder(f"s3://{BUCKET}").keys == tuple(f"p/{key}" for key in open_folder(images).keys)
    assert open_folder(f"s3://{BUCKET}/p/").keys == open_folder(images).keys


def test_an_object_that_is_gone_is_skipped(server, images):
    folder = open_folder(upload(images, "p"))
    boto3.client("s3", region_name="us-east-1").delete_object(Bucket=BUCKET, Key=f"p/{folder.keys[1]}")
    stream = Stream(folder, folder.keys, VIEW, 4)
    assert sum(len(batch.keys) for batch in stream) == len(folder.keys) - 1
    assert "cannot be read" in stream.skipped[folder.keys[1]]


def test_a_bucket_that_falls_silent_ends_the_work_and_skips_nothing(server, images, monkeypatch):
    folder = open_folder(upload(images, "p"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    silent = ImageFolder(Bucket(f"s3://{BUCKET}/p"), folder.keys)
    with pytest.raises(InvalidInput, match=r"bucket 'pictures' cannot be read \(network connection\)"):
        list(Stream(silent, silent.keys, VIEW, 4))


def test_what_is_not_there_is_said_in_one_line(server):
    with pytest.raises(InvalidInput, match=r"bucket 'none' cannot be read \(no such bucket\): look at the URL"):
        open_folder("s3://none/p")
    with pytest.raises(InvalidInput, match="there is no folder s3://pictures/p"):
        open_folder(f"s3://{BUCKET}/p")


def test_a_bucket_without_images_is_refused(server, images, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a")
    with pytest.raises(InvalidInput, match="s3://pictures/texts holds no images"):
        open_folder(upload(tmp_path / "texts", "texts"))


def test_who_may_not_read_is_told_so(server, images):
    url = upload(images, "p")
    tell(server, "reset-auth", b"0")
    try:
        with pytest.raises(InvalidInput, match=r"cannot be read \(invalid access key id\): .*credentials"):
            open_folder(url)
    finally:
        tell(server, "reset-auth", b"inf")


def test_places_are_told_apart():
    assert location("/a/b") == Path("/a/b")
    assert location("file:///a/b%20c") == Path("/a/b c")
    assert location("gs://b/p") == Bucket("gs://b/p")
    assert location(Path("a")) == Path("a")
    for url, words in {
        "https://host/images": "not read from https://",
        "s3:///p": "s3://bucket/prefix",
        "s3://key:secret@bucket/p": "credentials belong into the environment",
    }.items():
        with pytest.raises(InvalidInput, match=words) as caught:
            location(url)
        assert "secret" not in str(caught.value)


def test_configurations_take_both_and_record_the_name_alone():
    record = config(images="s3://pictures/some/birds/", held_out="/home/me/cats").record()
    assert (record["images"], record["held_out"]) == ("birds", "cats")
    assert config(images="s3://pictures/birds").images == Bucket("s3://pictures/birds")
    assert config(held_out="s3://pictures/birds").held_out == Bucket("s3://pictures/birds")
    assert config(images="birds").images == Path("birds")
    assert config(held_out="0.25").held_out == 0.25
