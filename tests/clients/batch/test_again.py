"""Running again: to go on, to redo what changed, to try failures again, in shards; and refusing what does not fit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import whence
from tests.clients.batch.test_images import Odd
from tests.clients.batch.worlds import BANK, FakeService, a_job, do, ends, fill
from whence._batch.planning import Shard
from whence._batch.service import Options
from whence._batch.sources import Content, LocalSource


async def bug_in_5(asked: bytes) -> None:
    if asked == b"image 5":
        raise whence.InternalError("a bug")


async def no_image_7(asked: bytes) -> None:
    if asked == b"image 7":
        raise whence.InvalidArgument("no image", reason="INVALID_IMAGE")


def rows(out: Path) -> dict[str, Any]:
    return {row["key"]: row for row in whence.read_batch(out).to_pylist()}


def test_what_is_done_is_not_read_again(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    job = a_job(tmp_path / "in", tmp_path / "out")
    first = do(job)
    source = Odd(tmp_path / "in", whence.NotFound(""), key="none")
    again = do(job, source=source)
    assert not source.reads
    assert (first.finished_now, again.finished_now) == (10, 0)
    assert (again.explained, again.complete, again.chunks, again.revision) == (10, True, 4, 1)
    assert json.loads((tmp_path / "out/summary.json").read_text())["explained"] == 10


def test_refresh_redoes_what_changed(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in", 12)
    job, refresh = (a_job(tmp_path / "in", tmp_path / "out", refresh=flag) for flag in (False, True))
    do(job, FakeService(no_image_7))
    before = rows(tmp_path / "out")
    assert do(refresh, FakeService()).revision == 1  # nothing to do: no new plan
    (tmp_path / "in/a/004.jpg").write_bytes(b"changed")
    (tmp_path / "in/a/006.jpg").unlink()
    fill(tmp_path / "in", 5, 20)
    assert do(job, FakeService()).finished_now == 0  # not asked for
    service = FakeService(no_image_7)
    summary = do(refresh, service)
    assert set(service.asked) == {b"changed", *(b"image %d" % n for n in range(20, 25))}  # failures stay failures
    after = rows(tmp_path / "out")
    assert after.keys() == objects.keys() - {"a/006.jpg", "b/007.jpg"} | {
        f"{'ab'[n % 2]}/{n:03d}.jpg" for n in range(20, 25)
    }
    assert {key for key in before.keys() & after.keys() if before[key] != after[key]} == {"a/004.jpg"}
    assert (summary.revision, summary.objects, summary.explained, summary.failed) == (2, 16, 15, 1)
    assert len(list((tmp_path / "out/results").iterdir())) == summary.chunks == 6
    (tmp_path / "in/b/007.jpg").write_bytes(b"mended")
    assert do(refresh, FakeService(no_image_7)).failed == 0


def test_chunks_that_became_empty(tmp_path: Path) -> None:
    fill(tmp_path / "in", 9)
    do(a_job(tmp_path / "in", tmp_path / "out"))
    for path in (tmp_path / "in/b").iterdir():  # the last in order, so the last chunk, too
        path.unlink()
    for _ in range(2):
        summary = do(a_job(tmp_path / "in", tmp_path / "out", refresh=True))
        assert (summary.complete, summary.objects, summary.explained, summary.revision) == (True, 5, 5, 2)
    assert len(ends(tmp_path / "out")) == 5


def test_failures_that_may_pass_are_tried_again_on_request(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in", 12)

    async def both(asked: bytes) -> None:
        await bug_in_5(asked)
        await no_image_7(asked)

    job, again = (a_job(tmp_path / "in", tmp_path / "out", retry_failed=flag) for flag in (False, True))
    assert do(job, FakeService(both)).failed == 2
    assert do(job, FakeService()).finished_now == 0
    service = FakeService(both)
    assert do(again, service).failed == 2
    assert set(service.asked) == {b"image 5"}
    summary = do(again, FakeService())
    assert (summary.explained, summary.failed, summary.reasons) == (11, 1, {"INVALID_IMAGE": 1})
    assert ends(tmp_path / "out") == Counter(objects.keys())
    assert do(again, FakeService()).revision == summary.revision  # nothing left that may pass


class Changing(LocalSource):
    """A source of which one object is another one by the time it is read."""

    async def read(self, key: str) -> Content:
        if key == "b/003.jpg":
            (self._root / key).write_bytes(b"another")
        return await super().read(key)


def test_trying_again_is_no_refresh(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in", 12)
    job, again = (a_job(tmp_path / "in", tmp_path / "out", retry_failed=flag) for flag in (False, True))
    do(job, FakeService(bug_in_5), source=Changing(job.source))
    (tmp_path / "in/b/003.jpg").unlink()
    service = FakeService()
    do(again, service)
    assert set(service.asked) == {b"image 5"}
    assert rows(tmp_path / "out")["b/003.jpg"]["runtime"] == "another"
    # A refresh sees that it is not what was listed.
    (tmp_path / "in/b/003.jpg").write_bytes(b"a third")
    do(a_job(tmp_path / "in", tmp_path / "out", refresh=True))
    assert rows(tmp_path / "out")["b/003.jpg"]["runtime"] == "a third"
    assert ends(tmp_path / "out") == Counter(objects.keys())


def test_shards_do_their_own_and_no_more(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in", 20)
    services = [FakeService(bug_in_5) for _ in range(3)]
    for again in (False, True):
        for number, service in enumerate(services, 1):
            job = a_job(tmp_path / "in", tmp_path / "out", shard=Shard(number, 3), retry_failed=again)
            summary = do(job, service)
            assert summary.complete is (number == 3 or again)
    assert (
        sum(len(service.asked) for service in services) == len({key for each in services for key in each.asked}) == 20
    )
    assert sum(service.asked[b"image 5"] for service in services) == 6  # three times in either run
    assert ends(tmp_path / "out") == Counter(objects.keys())


def test_maps_are_kept_too(tmp_path: Path) -> None:
    from tests.clients.batch.worlds import WITH_MAPS

    fill(tmp_path / "in", 6)
    do(a_job(tmp_path / "in", tmp_path / "out"), FakeService(explanation=WITH_MAPS))
    (tmp_path / "in/a/004.jpg").write_bytes(b"changed")
    before = whence.read_batch(tmp_path / "out", "maps")
    do(a_job(tmp_path / "in", tmp_path / "out", refresh=True), FakeService(explanation=WITH_MAPS))
    after = whence.read_batch(tmp_path / "out", "maps")
    assert Counter(before["key"].to_pylist()) == Counter(after["key"].to_pylist())
    assert set(Counter(after["key"].to_pylist()).values()) == {15}  # five concepts, three kinds


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"bank": replace(BANK, digest="c" * 64)}, "bank_digest"),
        ({"bank": replace(BANK, reference="fake/layer/other")}, "bank"),
        ({"options": Options(top_k=3)}, "options"),
        ({"source": "other"}, "source"),
    ],
)
def test_an_output_belongs_to_one_question(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    fill(tmp_path / "in")
    fill(tmp_path / "other")
    do(a_job(tmp_path / "in", tmp_path / "out"))
    source = tmp_path / changes.pop("source", "in")
    bank = changes.pop("bank", BANK)
    with pytest.raises(whence.FailedPrecondition, match="choose another output") as caught:
        do(a_job(source, tmp_path / "out", **changes), bank=bank)
    assert (caught.value.reason, caught.value.metadata["field"]) == ("OUTPUT_OF_ANOTHER_RUN", field)
    if field == "bank_digest":
        assert "fake/layer/bank@" + "b" * 64 in caught.value.message
    if field == "options":  # what differs, and no more
        assert "begun with options {'top_k': 10}, and this asks for {'top_k': 3}:" in caught.value.message


def test_an_object_that_changes_before_it_is_read(tmp_path: Path) -> None:
    """Its row says what was read; a refresh then finds it up to date."""
    fill(tmp_path / "in", 3)

    class Changing(Odd):
        async def read(self, key: str) -> Any:
            if key == "b/001.jpg":
                (tmp_path / "in/b/001.jpg").write_bytes(b"changed")
            return await super().read(key)

    do(a_job(tmp_path / "in", tmp_path / "out"), source=Changing(tmp_path / "in", whence.NotFound(""), key="none"))
    row = rows(tmp_path / "out")["b/001.jpg"]
    assert (row["runtime"], row["size"]) == ("changed", 7)
    service = FakeService()
    do(a_job(tmp_path / "in", tmp_path / "out", refresh=True), service)
    assert not service.asked
    assert rows(tmp_path / "out")["b/001.jpg"] == row


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    job = a_job(tmp_path / "in", tmp_path / "out", dry_run=True)
    summary = do(job)
    assert (summary.objects, summary.bytes, summary.chunks, summary.chunks_done) == (10, 70, 4, 0)
    assert summary.dry_run
    assert not summary.complete
    assert not (tmp_path / "out").exists()
    do(replace(job, dry_run=False))
    fill(tmp_path / "in", 1, 50)
    files = sorted((tmp_path / "out").rglob("*"))
    assert (do(job).chunks_done, do(job).objects, do(replace(job, refresh=True)).objects) == (4, 10, 11)
    assert sorted((tmp_path / "out").rglob("*")) == files


async def refuse(asked: bytes) -> None:
    raise whence.Unauthenticated("expired")


async def bugs_in_4_and_7(asked: bytes) -> None:
    """Of the first chunk, a/000 to a/004, and of the last, b/007 to b/011."""
    if asked in (b"image 4", b"image 7"):
        raise whence.InternalError("a bug")


def test_a_refresh_keeps_the_retry_that_was_cut_short(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    fill(source, 12)
    do(a_job(source, out), FakeService(bugs_in_4_and_7))
    with pytest.raises(whence.Unauthenticated):
        do(a_job(source, out, retry_failed=True), FakeService(refuse))
    (source / "b/011.jpg").write_bytes(b"changed")
    service = FakeService()
    summary = do(a_job(source, out, refresh=True), service)
    assert set(service.asked) == {b"image 4", b"image 7", b"changed"}
    assert (summary.failed, summary.revision) == (0, 3)


def test_a_shards_retry_keeps_that_of_another(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    fill(source, 12)
    do(a_job(source, out), FakeService(bugs_in_4_and_7))
    with pytest.raises(whence.Unauthenticated):
        do(a_job(source, out, retry_failed=True, shard=Shard(1, 2)), FakeService(refuse))
    summary = do(a_job(source, out, retry_failed=True, shard=Shard(2, 2)), FakeService())
    assert (summary.failed, summary.complete, summary.revision) == (1, False, 3)
    service = FakeService()
    assert do(a_job(source, out), service).failed == 0
    assert set(service.asked) == {b"image 4"}
