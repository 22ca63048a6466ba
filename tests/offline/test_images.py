"""Folders of images: order, split, streaming with bounded memory, files that are no images."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concepts.errors import InvalidInput
from concepts.preprocessing import Preprocessing
from offline.images import Stream, fingerprint, open_folder, shuffled, split

VIEW = Preprocessing(8, 8)


def write(root: Path, *keys: str) -> Path:
    for number, key in enumerate(keys):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), (number % 256, 0, 0)).save(path)
    return root


def test_keys_are_sorted_and_labels_are_folders(tmp_path):
    folder = open_folder(write(tmp_path, "b/2.png", "a/deep/1.PNG", "a/0.jpg", "c.bmp", ".hidden/x.png"))
    (tmp_path / "a/notes.txt").write_text("no image")
    assert folder.keys == ("a/0.jpg", "a/deep/1.PNG", "b/2.png", "c.bmp")
    assert [folder.label(key) for key in folder.keys] == ["a", "a", "b", None]


def test_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="holds no images"):
        open_folder(tmp_path)
    with pytest.raises(InvalidInput, match="there is no folder"):
        open_folder(tmp_path / "nowhere")


def test_split_depends_on_key_and_seed_alone(tmp_path):
    folder = open_folder(write(tmp_path, *(f"{i:03d}.png" for i in range(300))))
    training, held_out = split(folder, 0.25, seed=1)
    assert sorted(training.keys + held_out.keys) == list(folder.keys)
    assert 50 < len(held_out.keys) < 100
    write(tmp_path, *(f"new{i}.png" for i in range(50)))
    later, _ = split(open_folder(tmp_path), 0.25, seed=1)
    assert set(training.keys) <= set(later.keys)
    assert split(folder, 0.25, seed=2)[1].keys != held_out.keys


def test_split_refuses_an_empty_side(tmp_path):
    with pytest.raises(InvalidInput, match="too few"):
        split(open_folder(write(tmp_path, "a.png")), 0.2, seed=0)


def test_order_is_seeded():
    keys = [f"{i}" for i in range(50)]
    assert shuffled(keys, 0) == shuffled(reversed(keys), 0) != shuffled(keys, 1)
    assert sorted(shuffled(keys, 0)) == sorted(keys)


def test_stream_gives_every_view_in_order(tmp_path):
    folder = open_folder(write(tmp_path, *(f"{i:02d}.png" for i in range(25))))
    batches = list(Stream(folder, folder.keys, VIEW, batch_size=10))
    assert [len(batch.keys) for batch in batches] == [10, 10, 5]
    assert [key for batch in batches for key in batch.keys] == list(folder.keys)
    reds = np.concatenate([batch.views[:, 0, 0, 0] for batch in batches])
    assert reds.tolist() == list(range(25))
    assert len({digest for batch in batches for digest in batch.digests}) == 25


def test_files_that_cannot_be_decoded_are_skipped_with_reasons(tmp_path):
    folder = open_folder(write(tmp_path, *(f"{i}.png" for i in range(6))))
    (tmp_path / "1.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "2.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:1500])
    (tmp_path / "4.png").unlink()
    stream = Stream(folder, folder.keys, VIEW, batch_size=2)
    assert [batch.keys for batch in stream] == [["0.png", "3.png"], ["5.png"]]
    assert set(stream.skipped) == {"1.png", "2.png", "4.png"}
    assert "empty" in stream.skipped["1.png"]
    assert "truncated" in stream.skipped["2.png"]


class _Counting(Preprocessing):
    """Counts how many views are alive."""

    __slots__ = ()
    alive = 0
    peak = 0
    lock = threading.Lock()

    def fit(self, image):
        view, box = Preprocessing.fit(self, image)
        view = view.copy()
        with self.lock:
            _Counting.alive += 1
            _Counting.peak = max(_Counting.peak, _Counting.alive)
        weakref.finalize(view, self._gone)
        return view, box

    @classmethod
    def _gone(cls):
        cls.alive -= 1


def test_stream_never_holds_all_images(tmp_path):
    folder = open_folder(write(tmp_path, *(f"{i:03d}.png" for i in range(200))))
    _Counting.alive = _Counting.peak = 0
    seen = sum(len(batch.keys) for batch in Stream(folder, folder.keys, _Counting(8, 8), batch_size=16))
    assert seen == 200
    assert 16 <= _Counting.peak <= 2 * 16 + 8


def test_stream_that_is_left_early_stops_decoding(tmp_path):
    folder = open_folder(write(tmp_path, *(f"{i:03d}.png" for i in range(100))))
    before = threading.active_count()
    for _batch in Stream(folder, folder.keys, VIEW, batch_size=4):
        break
    assert threading.active_count() == before


def test_fingerprint_knows_keys_and_contents():
    base = fingerprint({"a": "1", "b": "2"})
    assert base == fingerprint({"b": "2", "a": "1"})
    assert len({base, fingerprint({"a": "1"}), fingerprint({"a": "2", "b": "1"})}) == 3
