"""From lines to captions."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from concepts.errors import InvalidInput
from offline.vocabulary.captions import LONGEST, Seen, Selection, clean, read_lines


@pytest.mark.parametrize(
    ("line", "caption", "reason"),
    [
        (b"a red  dog\n", "a red dog", ""),
        (b"\xef\xbb\xbf a\tred dog \r\n", "a red dog", ""),
        ("ein grüner\u2028Hund\u00a0".encode(), "ein grüner Hund", ""),
        (b" \t\r\n", "", "empty"),
        (b"\xef\xbb\xbf\n", "", "empty"),
        (b"gr\xfcn\n", "", "not_utf8"),
        ("dog".encode("utf-16-be"), "", "not_utf8"),
        (b"\xed\xa0\x80", "", "not_utf8"),
        (b"x" * LONGEST, "x" * LONGEST, ""),
        (b"x" * (LONGEST + 1), "", "too_long"),
    ],
)
def test_lines_are_cleaned(line, caption, reason):
    assert clean(line) == (caption, reason)


@pytest.mark.parametrize("length", [LONGEST - 1, LONGEST, LONGEST + 1, 2 * LONGEST + 1, 2 * LONGEST + 2, 10 * LONGEST])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_too_long_is_one_line(length, end):
    found = list(read_lines(io.BytesIO(b"first\n" + b"x" * length + b"\nlast" + end)))
    assert len(found) == 3
    assert (found[0], found[2]) == (b"first\n", b"last" + end)
    assert max(map(len, found)) <= LONGEST + 1
    assert (clean(found[1])[1] == "too_long") == (length >= LONGEST)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_first_of_equal_hashes_is_new(batch):
    """Against a Python set; few values, so that slots are shared, neighbours are full, and the end wraps around."""
    hashes = np.random.default_rng(0).integers(0, 400, 1000).astype(np.uint64) * np.uint64(301)
    hashes[::50] = np.iinfo(np.uint64).max
    seen, known = Seen(402), set()
    for first in range(0, len(hashes), batch):
        some = hashes[first : first + batch]
        wanted = []
        for value in np.maximum(some, 1).tolist():
            wanted.append(value not in known)
            known.add(value)
        assert seen.add(some).tolist() == wanted


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_captions_are_chosen_as_a_plain_loop_does(size, monkeypatch):
    monkeypatch.setattr("offline.vocabulary.captions._LINES", 50)
    random = np.random.default_rng(1)
    lines = [b" caption %d\n" % number for number in random.integers(0, 300, 500)]
    for place in range(0, 500, 9):
        lines[place] = [b"\n", b"\xff\n", b"x" * (LONGEST + 1), b"caption  1"][place % 4]
    texts, places = [], []
    for place, line in enumerate(lines):
        caption, reason = clean(line)
        if not reason and caption not in texts:
            texts.append(caption)
            places.append(place)
    selection = Selection(iter(lines), len(lines))
    shards = list(selection.shards(size))
    assert [len(shard.texts) for shard in shards[:-1]] == [size] * (len(shards) - 1)
    assert [text for shard in shards for text in shard.texts] == texts
    assert np.concatenate([shard.lines for shard in shards]).tolist() == places
    assert sum(selection.dropped.values()) + len(texts) == len(lines)
    assert selection.dropped["empty"] == 14
    assert selection.dropped["not_utf8"] == 14
    assert selection.dropped["too_long"] == 14


def test_more_lines_than_were_counted_are_refused():
    with pytest.raises(InvalidInput, match="changed while they were read"):
        list(Selection([b"a\n", b"b\n"], 1).shards(1))


_MEMORY = """
import sys
from pathlib import Path
from benchmarks.memory import peak_over_baseline
from offline.vocabulary.building import SHARD_CAPTIONS
from offline.vocabulary.captions import Selection
assert "open_clip" not in sys.modules
def work(count):
    lines = (b"caption number %d" % n for n in range(count))
    assert sum(len(found.texts) for found in Selection(lines, count).shards(8192)) == count
work(40_000)
print(peak_over_baseline(lambda: work(400_000)))
"""


def test_memory_is_a_dozen_bytes_a_line():
    """A set of these strings would take 50 MB, one of their hashes 30 MB."""
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert int(result.stdout) < 12 * 400_000 + 4 * 2**20
