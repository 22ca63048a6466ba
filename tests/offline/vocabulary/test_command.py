"""``whence-bank vocabulary`` as a user types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.offline.test_cli import refused, run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes(b"a red dog\n\na green cup\n a red  dog\n\xff\n[bold]a blue house\n")
    return path


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (40, 60), colour).save(path)
    return paths


def test_a_vocabulary_is_built_shown_and_searched(text, pictures, clip, clip_folder):
    code, out, _ = run("vocabulary", "build", text, "--clip", clip_folder, "--shard-captions", 2, "--device", "cpu")
    assert code == 0
    for name, value in {
        "captions": "3", "CLIP": "random", "digest of the CLIP": clip.digest, "width": "16", "shards": "2",
        "dropped: empty": "1", "dropped: not UTF-8": "1", "dropped: too long": "0", "dropped: duplicates": "1",
    }.items():  # fmt: skip
        assert re.search(rf"{name} +│ +{value} +│", out)
    folder = text.with_name("captions.vocabulary")
    assert run("vocabulary", "show", folder) == (0, out, "")
    assert run("vocabulary", "build", text, "--clip", clip_folder, "--shard-captions", 2)[:2] == (0, out)

    code, out, _ = run("vocabulary", "nearest", folder, *pictures, "--clip", clip_folder, "--top", 2)
    assert code == 0
    found = re.findall(r"│ (one|two)\.png +│ +(-?\d\.\d{3}) +│ (.+?) +│", out)
    texts = ["a red dog", "a green cup", "[bold]a blue house"]
    cosines = clip.embed_pictures([Image.open(path) for path in pictures]) @ clip.embed_texts(texts).T
    for name, row in zip(("one", "two"), cosines.tolist(), strict=True):
        wanted = sorted(zip(row, texts, strict=True), reverse=True)[:2]
        mine = [(float(cosine), caption) for picture, cosine, caption in found if picture == name]
        assert [caption for _, caption in mine] == [caption for _, caption in wanted]
        assert np.allclose([cosine for cosine, _ in mine], [cosine for cosine, _ in wanted], atol=2e-3)
    assert run("vocabulary", "nearest", folder, pictures[0], "--clip", clip_folder)[1].count("one.png") == 3


def test_embeddings_are_imported(clip, clip_folder, tmp_path):
    texts = ["a red dog", "a green cup", "a blue house"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("\n".join(texts))
    np.save(tmp_path / "in/a.npy", clip.embed_texts(texts).numpy())
    code, out, _ = run("vocabulary", "import", tmp_path / "in", "--clip", clip_folder, "--out", tmp_path / "v")
    assert code == 0
    assert re.search(r"captions +│ +3 +│", out)
    assert run("vocabulary", "show", tmp_path / "v")[1] == out


def test_mistakes_are_answered_by_one_line(text, pictures, clip_folder, tmp_path):
    at = ("--clip", clip_folder)
    run("vocabulary", "build", text, *at)
    folder = text.with_name("captions.vocabulary")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for arguments, words in (
        (("build", tmp_path / "none.txt", *at), "there is no file"),
        (("build", tmp_path / "empty.txt", *at), "is empty"),
        (("build", text, "--clip", tmp_path / "none"), "there is no CLIP"),
        (("build", text, *at, "--shard-captions", 5), "captions a shard 65536, not 5"),
        (("build", text, *at, "--device", "tpu9"), "there is no device"),
        (("import", tmp_path, *at, "--out", tmp_path / "v"), "holds no embeddings"),
        (("show", tmp_path), "there is no vocabulary"),
        (("nearest", tmp_path, pictures[0], *at), "there is no vocabulary"),
        (("nearest", folder, tmp_path / "none.png", *at), "none.png: No such file"),
        (("nearest", folder, tmp_path / "bad.png", *at), "bad.png: The image is not a picture"),
    ):
        assert words in refused("vocabulary", *arguments)


def test_the_command_starts_without_a_clip():
    code = "import sys, offline.cli; print('open_clip' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert result.stdout == "False\n"
