"""What becomes of images that fail, and of the run when it is not the images: one service that misbehaves at a time."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import whence
from tests.clients.batch.worlds import FakeService, a_job, do, ends, fill
from whence._batch import patience, pipeline
from whence._batch.locations import parse
from whence._batch.output import Output, open_output
from whence._batch.sources import Content, LocalSource


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait as often, but less long."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE_S", 0.05)


def failing(content: bytes, error: whence.WhenceError, times: int = 10**9) -> Any:
    """What fails for one image, the first times."""
    left = [times]

    async def answer(asked: bytes) -> None:
        if asked == content and left[0] > 0:
            left[0] -= 1
            raise error

    return answer


def run(tmp_path: Path, service: FakeService, count: int = 12, **changes: Any) -> whence.BatchSummary:
    fill(tmp_path / "in", count)
    return do(a_job(tmp_path / "in", tmp_path / "out", **changes), service)


def failures(tmp_path: Path) -> dict[str, tuple[str, str, bool]]:
    rows = whence.read_batch(tmp_path / "out", "failures").to_pylist()
    return {row["key"]: (row["code"], row["reason"], row["retryable"]) for row in rows}


@pytest.mark.parametrize(
    ("error", "retryable", "asked"),
    [
        (whence.InvalidArgument("no image", reason="INVALID_IMAGE"), False, 1),
        (whence.ResourceExhausted("its answer is too large", reason="MESSAGE_TOO_LARGE"), False, 1),
        (whence.FailedPrecondition("NaN", reason="NUMERICAL_FAILURE"), False, 1),
        (whence.InternalError("a bug"), True, 3),
        (whence.DeadlineExceeded("too slow"), True, 3),
    ],
)
def test_what_is_one_images_own_is_a_row(
    tmp_path: Path, error: whence.WhenceError, retryable: bool, asked: int
) -> None:
    service = FakeService(failing(b"image 5", error))
    summary = run(tmp_path, service)
    assert failures(tmp_path) == {"b/005.jpg": (error.code, error.reason, retryable)}
    assert (summary.explained, summary.failed, summary.reasons) == (11, 1, {error.reason: 1})
    assert service.asked[b"image 5"] == asked


def test_classes_without_concepts_are_rows_if_others_have_some(tmp_path: Path) -> None:
    error = whence.InvalidArgument("the bank has no concepts for the class", reason="UNSUPPORTED_OPTION")

    async def half(asked: bytes) -> None:
        if int(asked[6:]) % 2:
            raise error

    assert run(tmp_path, FakeService(half)).failed == 6
    assert set(failures(tmp_path).values()) == {("INVALID_ARGUMENT", "UNSUPPORTED_OPTION", False)}


@pytest.mark.parametrize(
    "error",
    [
        whence.NotFound("no such bank", reason="UNKNOWN_BANK"),
        whence.Unauthenticated("no token"),
        whence.PermissionDenied("not you"),
        whence.Unimplemented("no such method"),
        whence.FailedPrecondition("other weights", reason="WEIGHTS_MISMATCH"),
        whence.InvalidArgument("no such class", reason="UNKNOWN_CLASS"),
        whence.InvalidArgument("too many concepts", reason="UNSUPPORTED_OPTION"),
        whence.DataLoss("a stored file is not what was written", reason="CORRUPT_DATA"),
    ],
)
def test_what_is_wrong_with_the_request_stops_the_run(tmp_path: Path, error: whence.WhenceError) -> None:
    async def always(asked: bytes) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run(tmp_path, FakeService(always))
    assert caught.value.reason == error.reason
    assert not ends(tmp_path / "out")
    assert run(tmp_path, FakeService()).complete


def test_a_token_that_expires_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    answered: set[bytes] = set()

    async def first_seven(asked: bytes) -> None:
        if len(answered) == 7:
            raise whence.Unauthenticated("expired")
        answered.add(asked)

    with pytest.raises(whence.Unauthenticated):
        run(tmp_path, FakeService(first_seven))
    before = ends(tmp_path / "out")
    assert set(before.values()) <= {1}
    assert run(tmp_path, FakeService()).explained == 12
    assert before <= ends(tmp_path / "out")


def test_a_service_that_is_away_for_a_while(tmp_path: Path) -> None:
    began_s = time.monotonic()
    down: Counter[bool] = Counter()

    async def away(asked: bytes) -> None:
        now_s = time.monotonic() - began_s
        down[0.05 < now_s < 0.8] += 1
        if 0.05 < now_s < 0.8:
            raise whence.Unavailable("starting", retry_after_s=0.01)

    progress: list[whence.Progress] = []
    fill(tmp_path / "in", 60)
    job = a_job(tmp_path / "in", tmp_path / "out")
    summary = do(job, FakeService(away, delay_s=0.005), progress=progress.append)
    assert (summary.explained, summary.failed) == (60, 0)
    assert down[True] > 4
    assert "starting" in {each.waiting for each in progress}
    assert (progress[-1].finished, progress[-1].total, progress[-1].waiting) == (60, 60, "")


def test_a_service_that_stays_away_ends_the_run(tmp_path: Path) -> None:
    answered = 0

    async def dies(asked: bytes) -> None:
        nonlocal answered
        answered += 1
        if answered > 7:
            raise whence.Unavailable("gone")

    with pytest.raises(whence.Unavailable, match="gone"):
        run(tmp_path, FakeService(dies), patience_s=0.3)
    assert "failures" not in {path.name for path in (tmp_path / "out").iterdir()}
    assert run(tmp_path, FakeService()).explained == 12


def test_a_busy_service_is_never_a_row(tmp_path: Path) -> None:
    refusals = 0

    async def busy(asked: bytes) -> None:
        nonlocal refusals
        if service.in_flight > 2:
            refusals += 1
            raise whence.Overloaded("busy", retry_after_s=0.002)

    service = FakeService(busy, delay_s=0.003)
    assert run(tmp_path, service, count=100).explained == 100
    assert refusals > 0
    assert max(service.asked.values()) < 20


def test_an_image_that_brings_the_service_down_again_and_again(tmp_path: Path) -> None:
    """Only it is blamed, though whoever is in flight beside it is struck as well."""
    until_s = 0.0

    async def crashes(asked: bytes) -> None:
        nonlocal until_s
        if time.monotonic() < until_s:
            raise whence.Unavailable("starting")
        if asked == b"image 5":
            until_s = time.monotonic() + 0.03
            raise whence.Unavailable("gone")
        await asyncio.sleep(0.002)
        if time.monotonic() < until_s:
            raise whence.Unavailable("gone")

    summary = run(tmp_path, FakeService(crashes), count=60)
    assert failures(tmp_path) == {"b/005.jpg": ("UNAVAILABLE", "UNAVAILABLE", True)}
    assert summary.explained == 59


def test_images_that_bring_the_service_down_and_are_left_at_the_end(tmp_path: Path) -> None:
    """Then nobody else is answered in between, by which the service could be seen to be back."""
    until_s, answered = 0.0, set()

    async def crashes(asked: bytes) -> None:
        nonlocal until_s
        while asked in (b"image 5", b"image 8") and len(answered) < 18:
            await asyncio.sleep(0.001)
        if time.monotonic() < until_s:
            raise whence.Unavailable("starting")
        if asked in (b"image 5", b"image 8"):
            until_s = time.monotonic() + 0.03
            raise whence.Unavailable("gone")
        answered.add(asked)

    summary = run(tmp_path, FakeService(crashes), count=20)
    assert failures(tmp_path) == dict.fromkeys(("b/005.jpg", "a/008.jpg"), ("UNAVAILABLE", "UNAVAILABLE", True))
    assert summary.explained == 18


def test_a_bug_that_hits_every_image_stops_the_run(tmp_path: Path) -> None:
    async def always(asked: bytes) -> None:
        raise whence.InternalError("a bug")

    with pytest.raises(whence.InternalError):
        run(tmp_path, FakeService(always), count=100)


def test_a_lone_image_that_fails_is_a_row(tmp_path: Path) -> None:
    """As when failures are tried again, and there is nothing else to ask."""
    summary = run(tmp_path, FakeService(failing(b"image 0", whence.InternalError("a bug"))), count=1)
    assert (summary.failed, summary.complete) == (1, True)


def test_a_service_that_hangs_is_waited_for(tmp_path: Path) -> None:
    """Deadlines that pass for everyone are not the images' fault, once others were answered."""
    answered, began_s = 0, time.monotonic()

    async def hangs(asked: bytes) -> None:
        nonlocal answered
        if answered >= 8 and time.monotonic() - began_s < 0.8:
            raise whence.DeadlineExceeded("no answer")
        answered += 1

    assert run(tmp_path, FakeService(hangs), count=40).failed == 0


class Odd:
    """A source of which one object misbehaves."""

    def __init__(self, folder: Path, error: whence.WhenceError, *, key: str = "b/005.jpg", down: bool = False) -> None:
        self._source = LocalSource(parse(folder))
        self.place, self.list, self.head = self._source.place, self._source.list, self._source.head
        self.reads: Counter[str] = Counter()
        self._error, self._key, self._down = error, key, down

    async def read(self, key: str) -> Content:
        self.reads[key] += 1
        if re.fullmatch(self._key, key):
            raise self._error
        return await self._source.read(key)

    async def check(self) -> None:
        if self._down:
            raise self._error


@pytest.mark.parametrize(
    ("error", "code", "reason", "retryable"),
    [
        (whence.NotFound("gone", reason="NO_SUCH_OBJECT"), "NOT_FOUND", "OBJECT_GONE", True),
        (whence.PermissionDenied("denied", reason="STORE_DENIED"), "PERMISSION_DENIED", "STORE_DENIED", True),
        (whence.DataLoss("broken disk", reason="UNREADABLE_OBJECT"), "DATA_LOSS", "UNREADABLE_OBJECT", True),
        (whence.Unavailable("500", reason="STORE_UNAVAILABLE"), "UNAVAILABLE", "STORE_UNAVAILABLE", True),
    ],
)
def test_an_object_that_cannot_be_read_is_a_row(
    tmp_path: Path, error: whence.WhenceError, code: str, reason: str, retryable: bool
) -> None:
    fill(tmp_path / "in")
    summary = do(a_job(tmp_path / "in", tmp_path / "out"), source=Odd(tmp_path / "in", error))
    assert failures(tmp_path) == {"b/005.jpg": (code, reason, retryable)}
    assert summary.explained == 9


@pytest.mark.parametrize(
    "error",
    [
        whence.PermissionDenied("denied", reason="STORE_DENIED"),
        whence.Unavailable("no route", reason="STORE_UNAVAILABLE"),
        whence.NotFound("no such bucket", reason="NO_SUCH_BUCKET"),
    ],
)
def test_a_store_that_cannot_be_used_stops_the_run(tmp_path: Path, error: whence.WhenceError) -> None:
    fill(tmp_path / "in")
    source = Odd(tmp_path / "in", error, key=".*", down=True)
    with pytest.raises(type(error)):
        do(a_job(tmp_path / "in", tmp_path / "out", patience_s=0.2), source=source)
    assert not ends(tmp_path / "out")


def test_what_need_not_be_read_is_not(tmp_path: Path) -> None:
    fill(tmp_path / "in", 3)
    (tmp_path / "in/empty.jpg").touch()
    (tmp_path / "in/large.jpg").write_bytes(bytes(10_000))
    source = Odd(tmp_path / "in", whence.NotFound(""), key="none")
    service = FakeService()
    do(a_job(tmp_path / "in", tmp_path / "out"), service, source=source, request_bytes=9_000)
    assert failures(tmp_path) == {
        "empty.jpg": ("INVALID_ARGUMENT", "INVALID_IMAGE", False),
        "large.jpg": ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", False),
    }
    assert source.reads["large.jpg"] == 0
    assert len(service.asked) == 3


def test_in_flight_and_in_memory_are_bounded(tmp_path: Path) -> None:
    fill(tmp_path / "in", 300)
    source = Odd(tmp_path / "in", whence.NotFound(""), key="none")
    held: list[int] = []

    async def count(asked: bytes) -> None:
        held.append(source.reads.total() - len(held))

    service = FakeService(count, delay_s=0.002)
    seen: list[whence.Progress] = []
    do(a_job(tmp_path / "in", tmp_path / "out", chunk_size=50), service, source=source, progress=seen.append)
    # Progress is told now and then; the limit may have been one step higher in between.
    highest = 2 * max(each.limit for each in seen)
    assert service.most_in_flight <= highest
    assert max(held) <= 2 * highest + 16


def test_large_images_are_read_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BYTES", 20)  # two images, nearly three
    fill(tmp_path / "in", 30)
    (tmp_path / "in/large.jpg").write_bytes(b"image " + b"9" * 100)  # taken alone
    service = FakeService(delay_s=0.001)
    assert do(a_job(tmp_path / "in", tmp_path / "out"), service).explained == 31
    assert service.most_in_flight == 2


def test_what_progress_raises_ends_the_run(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in", 100)
    job = a_job(tmp_path / "in", tmp_path / "out")

    def enough(now: whence.Progress) -> None:
        if now.finished:
            raise ValueError("enough")

    service = FakeService(delay_s=0.1)
    with pytest.raises(ValueError, match="enough"):
        do(job, service, progress=enough)
    assert service.asked.total() < len(objects)
    assert do(job).explained == len(objects)


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = fill(tmp_path / "in", 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def fill_disk(asked: bytes) -> None:
        (folder,) = tmp_path.glob("whence-batch-*")
        with suppress(FileExistsError):
            (folder / "results-1-r1.parquet").symlink_to("/dev/full")

    job = a_job(tmp_path / "in", tmp_path / "out")
    with pytest.raises(whence.ResourceExhausted, match="TMPDIR") as caught:
        do(job, FakeService(fill_disk))
    assert caught.value.reason == "DISK_FULL"
    assert not list(tmp_path.glob("whence-batch-*"))
    assert do(job).explained == len(objects)


class Away:
    """An output whose store does not answer every other operation; or, from some operation on, none."""

    def __init__(self, output: Output, ends: int = 10**9) -> None:
        self.place = output.place
        self._output, self._ends = output, ends
        self._operations = 0

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._output, name)

        async def fail_or_do(*arguments: Any) -> Any:
            self._check()
            return await operation(*arguments)

        return fail_or_do

    async def names(self, folder: str) -> AsyncIterator[str]:
        async for name in self._output.names(folder):
            yield name
        self._check()

    def _check(self) -> None:
        self._operations += 1
        if self._operations % 2 or self._operations > self._ends:
            raise whence.Unavailable("no route", reason="STORE_UNAVAILABLE")


def test_an_output_that_is_away_is_waited_for(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in")
    job = a_job(tmp_path / "in", tmp_path / "out")
    seen: list[whence.Progress] = []
    away: Any = Away(open_output(job.output, create=True), ends=30)
    with pytest.raises(whence.Unavailable, match="no route"):
        do(replace(job, patience_s=0.6), output=away, progress=seen.append)
    assert "no route" in {each.waiting for each in seen}
    away = Away(open_output(job.output, create=True))
    assert do(job, output=away).complete
    assert ends(tmp_path / "out") == Counter(objects.keys())
