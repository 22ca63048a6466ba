"""Embeddings that are there already."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from concepts.errors import InvalidInput
from offline.vocabulary import Ready, Texts, build
from tests.offline.vocabulary.sources import contents

TEXTS = [f"a {colour} {thing} of {n}" for n in range(20) for colour in ("red", "green") for thing in ("dog", "cup")]
CUTS = [0, 7, *range(14, 80, 6), 80]
"""Where the files end: thirteen, so that 10 comes after 9, not after 1."""


def laion(folder, clip, *, dtype=np.float16, place="text_emb", scale=1.0, texts=TEXTS, captions=None):
    """Write embeddings as LAION publishes them."""
    rows = clip.embed_texts(texts).numpy() * scale
    (folder / place).mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, (first, last) in enumerate(pairwise(CUTS)):
        np.save(folder / place / f"text_emb_{number}.npy", rows[first:last].astype(dtype))
        table = {"caption": (captions or texts)[first:last], "url": ["http://x"] * (last - first)}
        parquet.write_table(pa.table(table), folder / f"metadata/metadata_{number}.parquet")
    return folder


@pytest.mark.parametrize("place", ["text_emb", "img/text_emb"])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float16, 1.0), (np.float32, 12.5), (">f4", 1e-20), (np.float64, 1e30)]
)
def test_embeddings_become_what_the_clip_makes_itself(place, dtype, scale, clip, tmp_path):
    folder = laion(tmp_path / "laion", clip, dtype=dtype, place=place, scale=scale)
    (tmp_path / "captions.txt").write_text("\n".join(TEXTS))
    ours = build(Texts(tmp_path / "captions.txt", clip), clip, tmp_path / "ours", shard_captions=33)
    theirs = build(Ready(folder, clip), clip, tmp_path / "theirs", shard_captions=33)
    assert theirs.texts(range(80)) == ours.texts(range(80)) == TEXTS
    assert theirs.shards == ours.shards == (33, 33, 14)
    queries = clip.embed_texts(TEXTS)
    found = theirs.nearest(queries, 1)
    assert found.captions[:, 0].tolist() == list(range(80))
    assert float((found.cosines - 1).abs().max()) < 2e-3


def test_the_first_of_equal_captions_stays(clip, tmp_path):
    texts = [*TEXTS[:40], *TEXTS[:20], *TEXTS[60:]]
    captions: list[str | None] = list(texts)
    captions[5], captions[6] = None, "  "
    folder = laion(tmp_path / "laion", clip, texts=texts, captions=captions)
    found = build(Ready(folder, clip), clip, tmp_path / "v")
    kept = [*TEXTS[:5], *TEXTS[7:40], *TEXTS[5:7], *TEXTS[60:]]
    assert found.texts(range(len(found))) == kept
    assert found.dropped == {"empty": 2, "not_utf8": 0, "too_long": 0, "duplicates": 18}
    assert found.nearest(clip.embed_texts(kept), 1).captions[:, 0].tolist() == list(range(60))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_string()])
def test_captions_that_are_no_text_are_dropped(kind, clip, tmp_path):
    folder = laion(tmp_path / "laion", clip)
    captions = [text.encode() for text in TEXTS[:7]]
    if kind == pa.binary():
        captions[2] = b"\xff\xfe"
    parquet.write_table(
        pa.table({"caption": pa.array(captions, pa.binary()).cast(kind)}), folder / "metadata/metadata_0.parquet"
    )
    found = build(Ready(folder, clip), clip, tmp_path / "v")
    assert found.dropped["not_utf8"] == (kind == pa.binary())


@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_captions_may_lie_beside_the_embeddings(suffix, clip, tmp_path):
    rows = clip.embed_texts(TEXTS[:9]).numpy()
    for name, some in (("b", slice(0, 4)), ("a", slice(4, 9))):
        np.save(tmp_path / f"{name}.npy", rows[some])
        if suffix == "txt":
            (tmp_path / f"{name}.txt").write_text("\n".join(TEXTS[some]))
        else:
            parquet.write_table(pa.table({"caption": TEXTS[some]}), tmp_path / f"{name}.parquet")
    found = build(Ready(tmp_path, clip), clip, tmp_path / "v")
    assert found.texts(range(9)) == [*TEXTS[4:9], *TEXTS[:4]]
    assert contents(tmp_path / "v")["vocabulary.json"] == found.digest


def test_embeddings_of_another_clip_are_refused(clip, other_clip, tmp_path):
    folder = laion(tmp_path / "laion", other_clip)
    with pytest.raises(
        InvalidInput, match=r"not those of CLIP 'random'.* of 16 captions .*give the CLIP that made them"
    ):
        build(Ready(folder, clip), clip, tmp_path / "v")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("strange", [2, 3])
def test_captions_in_another_order_are_refused(strange, clip, tmp_path):
    """Two of sixteen may differ; those of the second shard are looked at, too."""
    sample = np.unique(np.linspace(0, 39, 16).astype(int))[:strange] + 40
    captions = list(TEXTS)
    for place in sample:
        captions[place] = f"something else {place}"
    folder = laion(tmp_path / "laion", clip, captions=captions)
    if strange == 2:
        build(Ready(folder, clip), clip, tmp_path / "v", shard_captions=40)
    else:
        with pytest.raises(InvalidInput, match="'something else 40'"):
            build(Ready(folder, clip), clip, tmp_path / "v", shard_captions=40)


def _row(value):
    def change(folder: Path) -> None:
        rows = np.load(folder / "text_emb/text_emb_3.npy")
        rows[2] = value
        np.save(folder / "text_emb/text_emb_3.npy", rows)

    return change


def _npy(array):
    return lambda folder: np.save(folder / "text_emb/text_emb_3.npy", array, allow_pickle=True)


def _cut(name):
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-7])

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_row(np.nan), r"row 2 of text_emb_3\.npy is NaN, infinite or zero"),
        (_row(np.inf), r"row 2 of text_emb_3\.npy is NaN, infinite or zero"),
        (_row(0), r"row 2 of text_emb_3\.npy is NaN, infinite or zero"),
        (_npy(np.ones((6, 15))), r"text_emb_3\.npy holds embeddings of width 15, those of the CLIP have 16"),
        (_npy(np.ones((5, 16))), r"metadata_3\.parquet holds 6 captions, text_emb_3\.npy 5 embeddings"),
        (_npy(np.ones(6)), r"text_emb_3\.npy is no matrix of floating-point numbers"),
        (_npy(np.ones((6, 16), int)), r"text_emb_3\.npy is no matrix of floating-point numbers"),
        (_npy(np.full((6, 16), None)), r"text_emb_3\.npy cannot be read as \.npy"),
        (_cut("text_emb/text_emb_3.npy"), r"text_emb_3\.npy cannot be read as \.npy"),
        (lambda folder: (folder / "text_emb/text_emb_3.npy").write_bytes(b""), "cannot be read as"),
        (_cut("metadata/metadata_3.parquet"), r"metadata_3\.parquet is no parquet file with a column 'caption'"),
        (lambda folder: (folder / "metadata/metadata_3.parquet").unlink(), "13 files of embeddings and 12 of captions"),
        (
            lambda folder: parquet.write_table(pa.table({"text": TEXTS[:6]}), folder / "metadata/metadata_3.parquet"),
            "no parquet file with a column 'caption'",
        ),
        (
            lambda folder: parquet.write_table(pa.table({"caption": [1] * 6}), folder / "metadata/metadata_3.parquet"),
            r"column 'caption' of metadata_3\.parquet holds no text",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(change, words, clip, tmp_path):
    folder = laion(tmp_path / "laion", clip)
    change(folder)
    with pytest.raises(InvalidInput, match=words):
        build(Ready(folder, clip), clip, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_a_folder_without_embeddings_is_refused(clip, tmp_path):
    with pytest.raises(InvalidInput, match="holds no embeddings"):
        Ready(tmp_path, clip)
    with pytest.raises(InvalidInput, match="there is no folder"):
        Ready(tmp_path / "nowhere", clip)
    np.save(tmp_path / "a.npy", np.ones((3, 16)))
    with pytest.raises(InvalidInput, match="1 files of embeddings and 0 of captions"):
        Ready(tmp_path, clip)
