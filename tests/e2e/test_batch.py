"""A bucket of 5,000 images, explained by a real service while the batch is killed again and again."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import numpy as np
import pyarrow.compute as pc
import pytest
from moto.s3.models import s3_backends

import whence
from tests.data import real_data
from tests.e2e.conftest import RunningServer, Start
from tests.e2e.repository import BANK
from tests.offline.buckets import BUCKET, s3

OBJECTS, BROKEN = 5000, 50
CHUNK = 250
SOURCE, OUT = f"s3://{BUCKET}/in coming/ñ", f"s3://{BUCKET}/out"
_GET = re.compile(r'"GET /' + BUCKET + r"/(\S+) HTTP")

pytestmark = pytest.mark.timeout(600)


class Reads(logging.Handler):
    """Keys of the source that were read, in order, from the S3 server's own log."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (match := _GET.search(re.sub(r"\x1b\[\d+m", "", record.getMessage()))) is not None:
            name = unquote(match[1].partition("?")[0])
            if name.startswith("in coming/"):
                self.keys.append(name.removeprefix("in coming/ñ/"))


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """What the bucket holds: CIFAR's JPEGs, photographs, and what is no image, under names as people give them."""
    photos = sorted((real_data() / "photos").glob("*.JPEG"))
    small = sorted((real_data() / "cifar10").glob("t*/*/*.jpg"))[: OBJECTS - BROKEN - len(photos)]
    folders = itertools.cycle(("a b", "100%", "日本/x+y", "#1/q&a=1", "z"))
    kept = {
        f"{next(folders)}/{path.parent.parent.name} {path.parent.name} {path.name}": path.read_bytes()
        for path in (*photos, *small)
    }
    whole = list(kept.values())
    broken = itertools.cycle((b"", b"no image", b"\xff\xd8\xff\xe0 no more", b"<svg/>"))
    for place in range(BROKEN):
        # Half are images that end too soon.
        kept[f"broken/{place}.jpg"] = whole[place][: len(whole[place]) // 2] if place % 2 else next(broken)
    assert len(kept) == OBJECTS
    return kept


@pytest.fixture(scope="module")
def reads(contents: dict[str, bytes]) -> Iterator[Reads]:
    """A bucket with the images; gives what is read of it."""
    log = logging.getLogger("werkzeug")
    handler, level, propagate = Reads(), log.level, log.propagate
    with pytest.MonkeyPatch.context() as patch, s3(patch):
        backend = s3_backends["123456789012"]["aws"]  # putting 5,000 objects through the server takes half a minute
        for key, content in contents.items():
            backend.put_object(BUCKET, f"in coming/ñ/{key}", content)
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(handler)
        yield handler
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@pytest.fixture(scope="module")
def server(start: Start, repository: Path) -> RunningServer:
    """The service."""
    return start(repository)


def command(server: RunningServer, *more: str) -> list[str]:
    whence_command = str(Path(sys.executable).parent / "whence")
    arguments = ["batch", SOURCE, OUT, "--bank", BANK, "--chunk-size", str(CHUNK), "--address", server.address]
    return [whence_command, *arguments, *more]


def run(server: RunningServer, *more: str) -> Any:
    """Run a batch to its end and return its summary."""
    done = subprocess.run(command(server, "--json", *more), capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def commits() -> int:
    """How many chunks are done; asked of the server's own memory, so as not to keep it from serving."""
    return sum(key.startswith("out/done/") for key in list(_keys()))


def finished() -> set[str]:
    """Keys that have ended."""
    tables = (whence.read_batch(OUT, table=table, columns=["key"]) for table in ("results", "failures"))
    return {key for table in tables for key in table["key"].to_pylist()}


def test_killed_three_times_every_key_ends_once(
    server: RunningServer, reads: Reads, contents: dict[str, bytes], tmp_path: Path
) -> None:
    read_before: set[str] = set()
    for kill, wanted in enumerate((2, 7, 13)):
        at = len(reads.keys)
        with (tmp_path / f"{kill}.log").open("w") as log:
            process = subprocess.Popen(command(server), stdout=log, stderr=subprocess.STDOUT, env=os.environ)
            try:
                until = time.monotonic() + 120
                while commits() < wanted and process.poll() is None and time.monotonic() < until:
                    time.sleep(0.02)
            finally:
                process.kill()
            assert process.wait() == -signal.SIGKILL, (tmp_path / f"{kill}.log").read_text()
            assert commits() >= wanted
        assert not read_before & set(reads.keys[at:])  # what had ended was not read again
        read_before = finished()
        assert wanted * CHUNK <= len(read_before) < OBJECTS
    at = len(reads.keys)
    summary = run(server)
    assert set(reads.keys[at:]) == contents.keys() - read_before
    assert (summary["explained"], summary["failed"]) == (OBJECTS - BROKEN, BROKEN)

    results, failures = whence.read_batch(OUT), whence.read_batch(OUT, table="failures")
    ends = Counter([*results["key"].to_pylist(), *failures["key"].to_pylist()])
    assert ends == Counter(contents.keys())
    assert {key.partition("/")[0] for key in failures["key"].to_pylist()} == {"broken"}
    assert set(failures["reason"].to_pylist()) == {"INVALID_IMAGE"}
    # Most objects were read once; those of the chunks that a kill cut short, again.
    assert Counter(reads.keys).most_common(1)[0][1] <= 4
    assert len(reads.keys) <= OBJECTS + 3 * 4 * CHUNK
    # Nothing is left of what the killed had written: a reader that knows no commits sees the same.
    names = [
        each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="out/results/")["Contents"]
    ]
    assert len(names) == OBJECTS // CHUNK


def test_they_are_what_the_service_answers(server: RunningServer, reads: Reads, contents: dict[str, bytes]) -> None:
    table = whence.read_batch(OUT).sort_by("key")
    rows = table.to_pylist()
    etags = {key: f'"{obj.etag.strip(chr(34))}"' for key, obj in _objects().items()}
    with whence.Client(server.address) as client:
        bank = client.bank(BANK)
        images = (contents[row["key"]] for row in rows)
        outcomes = client.explain_many(images, bank=BANK, maps=())
        for row, outcome in zip(rows, outcomes, strict=True):
            same(row, outcome.result())
            assert row["etag"] == etags[row["key"]]
    assert set(table["bank_digest"].to_pylist()) == {bank.digest}
    assert len(rows) == OBJECTS - BROKEN
    assert pc.min(table["explained_at"]).as_py() is not None


def same(row: dict[str, Any], explanation: whence.Explanation) -> None:
    """Check that a row is an explanation, as far as floating point is the same in any batch."""
    assert (row["model"], row["model_digest"]) == (explanation.model, explanation.model_digest)
    assert (row["bank"], row["bank_digest"]) == (explanation.bank, explanation.bank_digest)
    best = explanation.predictions[0]
    assert (row["prediction"]["index"], row["prediction"]["name"]) == (best.index, best.name)
    assert row["target"]["index"] == explanation.target.index
    answered = {concept.id: concept for concept in explanation.concepts}
    for listed in row["concepts"]:
        concept = answered[listed["id"]]
        assert (listed["label"], listed["weak_label"]) == (concept.label, concept.weak_label)
        for name in ("activation", "peak", "contribution", "share"):
            np.testing.assert_allclose(listed[name], getattr(concept, name), rtol=1e-3, atol=1e-4, err_msg=name)
    assert len(row["concepts"]) == len(explanation.concepts)
    report = explanation.faithfulness
    assert (row["report"]["exactness"], row["report"]["top1_agrees"]) == (report.exactness, report.top1_agrees)
    for name in ("explained_logit", "constant", "relative_error", "kl"):
        np.testing.assert_allclose(row["report"][name], getattr(report, name), rtol=1e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(row["contributions_total"], explanation.contributions_total, rtol=1e-3, atol=1e-4)


def test_what_changed_is_done_again_on_request(server: RunningServer, reads: Reads, contents: dict[str, bytes]) -> None:
    keys = sorted(contents)
    changed, gone, new, mended = keys[10], keys[11], "z/new one.jpg", "broken/1.jpg"
    other = next(value for key, value in contents.items() if key.startswith("z/"))
    backend = s3_backends["123456789012"]["aws"]
    for key in (changed, new, mended):
        backend.put_object(BUCKET, f"in coming/ñ/{key}", other)
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=f"in coming/ñ/{gone}")
    before = {row["key"]: row for row in whence.read_batch(OUT).to_pylist()}

    at = len(reads.keys)
    run(server)  # not asked for: nothing is read, nothing changes
    assert reads.keys[at:] == []
    summary = run(server, "--refresh")
    assert sorted(reads.keys[at:]) == sorted((changed, new, mended))
    after = {row["key"]: row for row in whence.read_batch(OUT).to_pylist()}
    assert after.keys() == before.keys() - {gone} | {new, mended}
    assert {key for key in before.keys() & after.keys() if before[key] != after[key]} == {changed}
    assert (summary["explained"], summary["failed"]) == (OBJECTS - BROKEN + 1, BROKEN - 1)


def test_an_output_belongs_to_one_bank(server: RunningServer, reads: Reads) -> None:
    arguments = [part if part != BANK else f"{BANK}2" for part in command(server)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def _objects() -> dict[str, Any]:
    prefix = "in coming/ñ/"
    keys = _keys()
    return {key.removeprefix(prefix): keys[key] for key in keys if key.startswith(prefix)}


def _keys() -> Any:
    """All objects in the server's memory, by name."""
    return s3_backends["123456789012"]["aws"].buckets[BUCKET].keys
