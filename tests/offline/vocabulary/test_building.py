"""Writing a vocabulary, and reading it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from concepts.errors import AlreadyExists, CorruptData, InvalidInput, NotFound, NumericalFailure
from offline.vocabulary import Texts, Vocabulary, build, open_vocabulary
from tests.offline.vocabulary.sources import contents, unit, written

LINES = [f"a {colour} {thing} number {n}" for n in range(8) for colour in ("red", "green") for thing in ("dog", "cup")]


@pytest.fixture
def text(tmp_path):
    """Captions with all that is dropped among them."""
    path = tmp_path / "captions.txt"
    content = "\n".join(LINES).encode() + b"\n\n \xff\n" + b" a  red dog number 0\n" + "eine Tür\r\n".encode()
    path.write_bytes(content + b"x" * 70000)
    return path


def test_a_text_becomes_a_vocabulary(text, clip, tmp_path):
    vocabulary = build(Texts(text, clip), clip, tmp_path / "v", shard_captions=10)
    wanted = [*LINES, "eine Tür"]
    assert vocabulary.shards == (10, 10, 10, 3)
    assert len(vocabulary) == 33
    assert vocabulary.texts(range(33)) == wanted
    assert vocabulary.texts([32, 0, 10, 0]) == [wanted[32], wanted[0], wanted[10], wanted[0]]
    assert vocabulary.texts([]) == []
    assert vocabulary.dropped == {"empty": 1, "not_utf8": 1, "too_long": 1, "duplicates": 1}
    assert vocabulary.clip == {"name": clip.name, "digest": clip.digest}
    assert vocabulary.record() == {"captions": 33, "digest": contents(tmp_path / "v")["vocabulary.json"]}
    assert vocabulary.bytes == sum(
        file.stat().st_size for pattern in ("*.npy", "*.txt") for file in (tmp_path / "v").glob(pattern)
    )
    vocabulary.verify()
    embeddings = np.concatenate([np.load(file) for file in sorted((tmp_path / "v").glob("*.embeddings.npy"))])
    assert embeddings.dtype == np.float16
    assert np.abs(embeddings - clip.embed_texts(wanted).numpy()).max() < 1e-3


def test_a_caption_is_nearest_to_itself(text, clip, tmp_path):
    build(Texts(text, clip), clip, tmp_path / "v", shard_captions=10)
    vocabulary = open_vocabulary(tmp_path / "v", clip)
    found = vocabulary.nearest(clip.embed_texts(LINES), 3, block_captions=4)
    assert found.captions[:, 0].tolist() == list(range(32))
    assert torch.allclose(found.cosines[:, 0], torch.ones(32), atol=1e-3)
    assert vocabulary.nearest(clip.embed_texts(LINES[:2]), 100).captions.sort().values.tolist() == [[*range(33)]] * 2


def test_shards_are_searched_as_one(clip, tmp_path):
    random = np.random.default_rng(0)
    rows = unit(random.standard_normal((500, 16))).astype(np.float16)
    queries = torch.from_numpy(unit(random.standard_normal((20, 16)))).float()
    products = queries.double().numpy() @ rows.astype(np.float64).T
    for shard in (1, 90, 500):
        vocabulary = written(tmp_path / str(shard), [str(n) for n in range(500)], rows, clip, shard)
        found = vocabulary.nearest(queries, 6)
        assert found.captions.tolist() == np.argsort(-products, axis=1)[:, :6].tolist()


@pytest.mark.parametrize("shape", [(16,), (3, 15), (1, 3, 16)])
def test_queries_of_another_shape_are_refused(shape, text, clip, tmp_path):
    vocabulary = build(Texts(text, clip), clip, tmp_path / "v")
    with pytest.raises(InvalidInput, match="do not fit embeddings of width 16"):
        vocabulary.nearest(torch.zeros(shape), 1)


@pytest.mark.parametrize("index", [-1, 33])
def test_there_is_no_caption_beyond_the_last(index, text, clip, tmp_path):
    vocabulary = build(Texts(text, clip), clip, tmp_path / "v")
    with pytest.raises(InvalidInput, match="captions 0 to 32"):
        vocabulary.texts([3, index])


def test_a_finished_vocabulary_is_opened(text, clip, tmp_path, monkeypatch):
    build(Texts(text, clip), clip, tmp_path / "v")
    before = contents(tmp_path / "v")
    monkeypatch.setattr(Texts, "embed", None)
    build(Texts(text, clip), clip, tmp_path / "v")
    assert contents(tmp_path / "v") == before


def test_what_is_missing_or_cut_is_written_again(text, clip, tmp_path):
    path = tmp_path / "v"
    build(Texts(text, clip), clip, path, shard_captions=10)
    whole = contents(path)
    for name in ("vocabulary.json", "000001.json", "000003.captions.txt"):
        (path / name).unlink()
    (path / "000000.embeddings.npy").write_bytes(b"short")
    (path / "000002.json").write_bytes(b"{")
    (path / ".000002.json.0.tmp").write_bytes(b"{")
    build(Texts(text, clip), clip, path, shard_captions=10)
    assert contents(path) == whole


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from concepts.clip import open_clip_model
from offline.vocabulary import Texts, build
clip, text, path = open_clip_model(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

def run(folder):
    build(Texts(text, clip), clip, folder, shard_captions=700)

def end_at(instant):
    child = os.fork()
    if not child:
        run(path)
        os._exit(0)
    while not instant():
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (path / "vocabulary.json").exists())

end_at(lambda: any(path.glob(".0*.tmp")))
end_at(lambda: (path / "000002.embeddings.npy").exists())
end_at(lambda: (path / "000004.json").exists())
run(path)
run(path.with_name("whole"))
"""


def test_it_goes_on_after_its_process_is_killed(clip_folder, tmp_path):
    """Kill it when a draft lies there, when embeddings lie there without their record, and right after a record."""
    text, path = tmp_path / "captions.txt", tmp_path / "killed"
    text.write_text("".join(f"caption {n % 7000}\n" for n in range(7500)))
    result = subprocess.run(
        [sys.executable, "-c", _KILLED, clip_folder, text, path],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.stdout.splitlines() == ["9 False"] * 3
    assert contents(path) == contents(tmp_path / "whole")
    assert len(contents(path)) == 42
    vocabulary = Vocabulary.open(path)
    vocabulary.verify()
    assert (len(vocabulary), vocabulary.dropped["duplicates"]) == (7000, 500)


def test_other_arguments_are_refused(text, clip, other_clip, tmp_path):
    path = tmp_path / "v"
    build(Texts(text, clip), clip, path, shard_captions=10)
    before = contents(path)
    (tmp_path / "other.txt").write_text("something else")
    for source, with_clip, size, words in (
        (Texts(text, clip), clip, 11, "captions a shard 10, not 11"),
        (Texts(tmp_path / "other.txt", clip), clip, 10, "the captions .*, not"),
        (Texts(text, other_clip), other_clip, 10, f"the CLIP {clip.digest}, not {other_clip.digest}"),
    ):
        with pytest.raises(AlreadyExists, match=f"{words}.*: name another folder"):
            build(source, with_clip, path, shard_captions=size)
    assert contents(path) == before
    (path / "plan.json").write_bytes(b"[]")
    with pytest.raises(AlreadyExists, match="cannot be read"):
        build(Texts(text, clip), clip, path, shard_captions=10)


def test_a_folder_of_other_things_is_left_alone(text, clip, tmp_path):
    with pytest.raises(AlreadyExists, match="holds other files"):
        build(Texts(text, clip), clip, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["captions.txt"]


def test_two_at_a_time_are_refused(text, clip, tmp_path):
    errors = []

    def report(_stage, done, total):
        if done < total and not errors:
            with pytest.raises(AlreadyExists) as caught:
                build(Texts(text, clip), clip, tmp_path / "v")
            errors.append(caught.value.message)

    build(Texts(text, clip), clip, tmp_path / "v", report=report)
    assert "another process is writing" in errors[0]


def test_progress_is_in_lines_and_ends(text, clip, tmp_path):
    heard = []
    build(Texts(text, clip), clip, tmp_path / "v", shard_captions=7, report=lambda *said: heard.append(said))
    done = [now for _, now, _ in heard]
    assert {total for _, _, total in heard} == {37}
    assert done == sorted(done)
    assert done.count(37) == 1
    assert done[-1] == 37


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file .*one caption a line"),
        (b"", "is empty"),
        (b"\n \n\t", r"none of 3 lines is a caption \(3 empty\)"),
        (b"\xff\n\n", r"none of 2 lines is a caption \(1 empty, 1 not_utf8\)"),
        ("dog\ncat\n".encode("utf-16"), "not_utf8"),
    ],
)
def test_a_text_without_captions_is_refused(content, words, clip, tmp_path):
    if content is not None:
        (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(InvalidInput, match=words):
        build(Texts(tmp_path / "captions.txt", clip), clip, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_shards_hold_something(text, clip, tmp_path):
    with pytest.raises(InvalidInput, match="at least 1"):
        build(Texts(text, clip), clip, tmp_path / "v", shard_captions=0)


class _Broken(nn.Module):
    def encode_text(self, tokens):
        return torch.full((len(tokens), 16), torch.nan)


def test_a_clip_that_answers_nan_is_refused(text, clip, tmp_path):
    broken = replace(clip, module=_Broken())
    with pytest.raises(NumericalFailure, match="NaN"):
        build(Texts(text, broken), broken, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_another_clip_is_refused(text, clip, other_clip, tmp_path):
    build(Texts(text, clip), clip, tmp_path / "v")
    with pytest.raises(InvalidInput) as caught:
        open_vocabulary(tmp_path / "v", other_clip)
    assert clip.digest in caught.value.message
    assert other_clip.digest in caught.value.message
    assert "build the vocabulary with this one" in caught.value.message


def test_what_is_not_there_is_not_opened(text, clip, tmp_path):
    with pytest.raises(NotFound, match="make one by"):
        Vocabulary.open(tmp_path / "nowhere")
    build(Texts(text, clip), clip, tmp_path / "v")
    (tmp_path / "v/vocabulary.json").unlink()
    with pytest.raises(NotFound, match="not finished"):
        Vocabulary.open(tmp_path / "v")


@pytest.mark.parametrize("name", ["000001.embeddings.npy", "000001.captions.txt", "000001.offsets.npy"])
def test_a_file_that_changed_is_named(name, text, clip, tmp_path):
    path = tmp_path / "v"
    vocabulary = build(Texts(text, clip), clip, path, shard_captions=10)
    queries, file = clip.embed_texts(LINES[:1]), path / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    for use in (
        (lambda opened: opened.nearest(queries, 1)) if "embeddings" in name else (lambda opened: opened.texts([15])),
        Vocabulary.verify,
    ):
        for opened in (Vocabulary.open(path), vocabulary):
            with pytest.raises(CorruptData, match=f"{name} .*build it anew"):
                use(opened)
    assert Vocabulary.open(path).texts([3]) == [LINES[3]]
    file.write_bytes(content[:-1])
    with pytest.raises(CorruptData, match=name):
        Vocabulary.open(path)
    file.unlink()
    with pytest.raises(CorruptData, match=name):
        Vocabulary.open(path)
    with pytest.raises(CorruptData, match=name):
        vocabulary.verify()


def test_a_manifest_that_cannot_be_read_is_named(text, clip, tmp_path):
    path = tmp_path / "v"
    build(Texts(text, clip), clip, path)
    value = json.loads((path / "vocabulary.json").read_bytes())
    for content in (b"{", b"[]", b"{}", json.dumps(value | {"shards": 3}).encode()):
        (path / "vocabulary.json").write_bytes(content)
        with pytest.raises(CorruptData, match=r"vocabulary\.json cannot be read"):
            Vocabulary.open(path)
    (path / "vocabulary.json").write_text(json.dumps(value | {"schema": 2}))
    with pytest.raises(CorruptData, match="schema 2; this version reads schema 1"):
        Vocabulary.open(path)


_MEMORY = """
import sys
from pathlib import Path
import torch
from benchmarks.memory import peak_over_baseline
from concepts.clip import open_clip_model
from offline.vocabulary import build
from tests.offline.vocabulary.sources import Drawn
clip, path = open_clip_model(sys.argv[1]), Path(sys.argv[2])

def work(count):
    vocabulary = build(Drawn(count, 16), clip, path / str(count), shard_captions=8192)
    assert len(vocabulary) == count
    vocabulary.nearest(torch.eye(16), 5, block_captions=1024)
    vocabulary.texts(range(0, count, 1000))

work(30_000)
print(peak_over_baseline(lambda: work(300_000)))
"""


def test_memory_does_not_grow_with_the_captions(clip_folder, tmp_path):
    """Beside 12 bytes a line; the embeddings of all would take 10 MB, their captions another 20 MB as strings."""
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY, clip_folder, tmp_path],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(result.stdout) < 12 * 300_000 + 6 * 2**20
