"""Folders and buckets: what is listed is what is read, under whatever name; and what is wrong with a store is said."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from moto.s3.models import s3_backends
from obstore.exceptions import AlreadyExistsError
from obstore.store import MemoryStore

import whence
from tests.clients.batch.worlds import FakeService, a_job, do, ends, fill
from tests.offline.buckets import BUCKET, s3
from whence._batch.locations import Location, parse, refuse_overlap
from whence._batch.output import StoredOutput, open_output
from whence._batch.planning import Selection
from whence._batch.s3 import nameable
from whence._batch.sources import LocalSource, Source, StoreSource, open_source
from whence._batch.store_errors import from_store

NAMES = [
    "plain.jpg",
    "a b/c d.jpg",
    "ü/日本.jpg",
    "100%/x%20y.jpg",
    "x y.jpg",
    "p+q#r?&a=1.jpg",
    "*[z].jpg",
    "{b}~|^.jpg",
    "back\\slash.jpg",
    "quote'\".jpg",
    " lead and trail ",
    "tab\t.jpg",
    "dots...jpg",
]
ONLY_S3 = ["a//b.jpg", "a/../c.jpg", "./d.jpg", "a/b.jpg", "/e.jpg", "e.jpg", "not empty/", "bell\x07.jpg"]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server."""
    with s3(monkeypatch) as found:
        yield found


def put(key: str, content: bytes) -> str:
    etag: str = boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=content)["ETag"]
    return etag


def read_all(source: Source) -> dict[str, tuple[bytes, str | None]]:
    """What is read of all that is listed; checks that both agree on etags and sizes."""
    listed = list(source.list())
    found = {}
    for item in listed:
        content = asyncio.run(source.read(item.key))
        assert (content.etag, len(content.data)) == (item.etag, item.size)
        assert asyncio.run(source.head(item.key)) == item
        found[item.key] = content
    assert len(found) == len(listed)
    return found


def test_a_bucket_of_odd_names(address: str) -> None:
    etags = {name: put(f"in ü/deep/{name}", f"is {name}".encode()) for name in NAMES + ONLY_S3}
    put("in ü/deep/folder/", b"")  # what consoles make
    put("in ü/deeper/other.jpg", b"not ours")
    source = open_source(parse(f"s3://{BUCKET}/in ü/deep/"))
    assert read_all(source) == {name: (f"is {name}".encode(), etag) for name, etag in etags.items()}


def test_the_top_of_a_bucket(address: str) -> None:
    for name in ONLY_S3:
        put(name, f"is {name}".encode())
    contents = {key: content for key, (content, _) in read_all(open_source(parse(f"s3://{BUCKET}"))).items()}
    assert contents == {name: f"is {name}".encode() for name in ONLY_S3}


def test_more_objects_than_a_page(address: str) -> None:
    backend = s3_backends["123456789012"]["aws"]  # putting them through the server takes half a minute
    for number in range(1005):
        backend.put_object(BUCKET, f"in/{number:04d}", b"x")
    assert len(list(open_source(parse(f"s3://{BUCKET}/in")).list())) == 1005


def test_a_folder_of_odd_names(tmp_path: Path) -> None:
    for name in (*NAMES, "new\nline.jpg"):  # the S3 server of the tests cannot take the last
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"is {name}".encode())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "plain.jpg")
    found = {key: content for key, (content, _) in read_all(open_source(parse(tmp_path))).items()}
    expected = {name: f"is {name}".encode() for name in (*NAMES, "new\nline.jpg")}
    assert found == {**expected, "link.jpg": b"is plain.jpg"}


def test_a_file_that_changes_has_another_etag(tmp_path: Path) -> None:
    source = LocalSource(parse(tmp_path))
    (tmp_path / "a").write_bytes(b"1")
    before = next(source.list())
    os.utime(tmp_path / "a", ns=(1, 1))
    assert next(source.list()).etag != before.etag


def test_names_that_are_no_text_are_failures(tmp_path: Path) -> None:
    fill(tmp_path / "in", 2)
    (tmp_path / "in" / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"x")
    do(a_job(tmp_path / "in", tmp_path / "out"))
    (row,) = whence.read_batch(tmp_path / "out", "failures").to_pylist()
    assert (row["key"], row["reason"], row["retryable"]) == (r"\xff\xfe.jpg", "INVALID_KEY", False)
    assert len(ends(tmp_path / "out")) == 3


def test_any_store_of_obstore() -> None:
    store = MemoryStore()
    place = Location("gs", "bucket", "in/deep")
    for name in NAMES[:-3]:
        if name.isprintable():
            store.put(f"in/deep/{name}", f"is {name}".encode())
    store.put("in/deeper", b"not ours")
    source = StoreSource(store, place)
    asyncio.run(source.check())
    assert {key: content for key, (content, _) in read_all(source).items()} == {
        name: f"is {name}".encode() for name in NAMES[:-3] if name.isprintable()
    }
    with pytest.raises(whence.NotFound):
        asyncio.run(source.read("none"))


def test_an_output_in_a_bucket(address: str, tmp_path: Path) -> None:
    objects = fill(tmp_path / "in")
    out = f"s3://{BUCKET}/some/out put"
    summary = do(a_job(tmp_path / "in", out))
    assert summary.complete
    assert ends(out) == dict.fromkeys(objects, 1)
    assert do(a_job(tmp_path / "in", out)).finished_now == 0
    keys = [each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert {key.split("/")[2] for key in keys} == {"manifest.json", "plan", "results", "done", "summary.json"}


def test_create_lets_one_win(address: str, tmp_path: Path) -> None:
    async def race(output: StoredOutput) -> list[bool]:
        return await asyncio.gather(*(output.create("x/y.json", b"%d" % n) for n in range(8)))

    for place in (str(tmp_path / "out"), f"s3://{BUCKET}/out"):
        output = open_output(parse(place), create=True)
        won = asyncio.run(race(output))
        assert sum(won) == 1
        assert asyncio.run(output.get("x/y.json")) == b"%d" % won.index(True)
        # Sent again, after the answer was lost, it is still the winner's.
        assert asyncio.run(output.create("x/y.json", b"%d" % won.index(True)))


def test_a_conflict_that_nobody_won_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 may refuse both of two writers."""
    refusals = [AlreadyExistsError("409"), AlreadyExistsError("409")]
    put_async = obstore.put_async

    async def conflicting(*arguments: Any, **options: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await put_async(*arguments, **options)

    monkeypatch.setattr(obstore, "put_async", conflicting)
    output = StoredOutput(MemoryStore(), Location("s3", "bucket", ""))
    assert asyncio.run(output.create("x", b"mine"))
    refusals.append(AlreadyExistsError("409"))
    assert not asyncio.run(output.create("x", b"another's"))


class Careless(StoredOutput):
    """A store that ignores the condition, as some that speak S3 do."""

    async def create(self, name: str, content: bytes) -> bool:
        await obstore.put_async(self._store, name, content)
        return True


def test_stores_without_conditional_create_are_found_out(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    job = a_job(tmp_path / "in", tmp_path / "out")
    store = Careless(MemoryStore(), job.output)
    for _ in range(2):  # and not only before there is a manifest
        with pytest.raises(whence.FailedPrecondition, match="only if there is none") as caught:
            do(job, output=store)
        assert caught.value.reason == "NO_CONDITIONAL_CREATE"
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(whence.FailedPrecondition, match="only if there is none"):
        do(a_job(tmp_path / "in", f"s3://{BUCKET}/out"))


@pytest.mark.parametrize("kind", ["source", "output"])
@pytest.mark.parametrize(
    ("url", "error", "reason"),
    [
        ("s3://no-such-bucket/x", whence.NotFound, "NO_SUCH_BUCKET"),
        (f"s3://{BUCKET}/x", whence.Unauthenticated, "STORE_UNAUTHENTICATED"),
        (f"s3://{BUCKET}/y", whence.Unavailable, "STORE_UNAVAILABLE"),
    ],
)
def test_what_is_wrong_with_a_bucket(
    address: str, monkeypatch: pytest.MonkeyPatch, kind: str, url: str, error: type[whence.WhenceError], reason: str
) -> None:
    if error is whence.Unauthenticated:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, "/nonexistent")
    if error is whence.Unavailable:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(error) as caught:
        open_source(parse(url)) if kind == "source" else open_output(parse(url), create=True)
    assert caught.value.reason == reason
    assert url.split("/")[2] in caught.value.message


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("An error occurred (ExpiredToken) when calling the GetObject operation", whence.Unauthenticated),
        ("An error occurred (403) when calling the HeadBucket operation: Forbidden", whence.PermissionDenied),
        ("Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>", whence.PermissionDenied),
        ("status code: 403 Forbidden: <Code>ExpiredToken</Code>", whence.Unauthenticated),
        ("<Code>NotImplemented</Code><Message>A header you provided implies", whence.FailedPrecondition),
        ("connection reset by peer", whence.Unavailable),
    ],
)
def test_what_stores_say(text: str, error: type[whence.WhenceError]) -> None:
    made = from_store(RuntimeError(text), "s3://bucket")
    assert type(made) is error
    assert "s3://bucket" in made.message


def test_an_empty_source(tmp_path: Path, address: str) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    for place in (tmp_path / "in", f"s3://{BUCKET}/nothing"):
        with pytest.raises(whence.NotFound, match="correct the prefix") as caught:
            do(a_job(place, tmp_path / "out"))
        assert caught.value.reason == "EMPTY_SOURCE"
    fill(tmp_path / "in")
    do(a_job(tmp_path / "in", tmp_path / "out"))  # nothing was begun for another source
    with pytest.raises(whence.NotFound) as caught:
        open_source(parse(tmp_path / "none"))
    assert caught.value.reason == "NO_SUCH_FOLDER"


@pytest.mark.parametrize("bad", ["", "http://x/y", "s3://", "s3:///x"])
def test_what_is_no_place(bad: str) -> None:
    with pytest.raises(whence.InvalidArgument):
        parse(bad)


@pytest.mark.parametrize(
    ("source", "output", "apart"),
    [
        ("s3://b/in", "s3://b/out", True),
        ("s3://b/in", "s3://c/in", True),
        ("s3://b/in", "s3://b/in2", True),
        ("s3://b/in", "s3://b/in/out", False),
        ("s3://b/in/deep", "s3://b/in", False),
        ("s3://b", "s3://b/out", False),
        ("/x/in", "/x/in", False),
        ("/x/in", "/x", False),
        ("/x/in", "s3://x/in", True),
    ],
)
def test_source_and_output_lie_apart(source: str, output: str, apart: bool) -> None:
    if apart:
        refuse_overlap(parse(source), parse(output))
        return
    with pytest.raises(whence.InvalidArgument, match="choose an output elsewhere"):
        refuse_overlap(parse(source), parse(output))


def test_what_obstore_can_name() -> None:
    assert all(nameable(name) for name in ("a", "a b/ü", "100%", "..a"))
    assert not any(nameable(name) for name in ("a//b", "/a", "a/", "./a", "a/../b", "a\n"))


def keys_of(source: Path, output: Path, **selection: Any) -> set[str]:
    do(a_job(source, output, selection=Selection(**selection)))
    return set(ends(output))


def test_which_keys_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "in", 4)  # a/000, b/001, a/002, b/003
    (tmp_path / "in/readme.txt").write_text("x")
    source = tmp_path / "in"
    assert len(keys_of(source, tmp_path / "1", include=("*.jpg",))) == 4
    assert keys_of(source, tmp_path / "2", include=("a/*",)) == {"a/000.jpg", "a/002.jpg"}
    assert keys_of(source, tmp_path / "3", include=("*.jpg",), exclude=("a/*",)) == {"b/001.jpg", "b/003.jpg"}
    assert keys_of(source, tmp_path / "4", include=("00[01].jpg", "readme*")) == {
        "a/000.jpg",
        "b/001.jpg",
        "readme.txt",
    }
    file = tmp_path / "keys.txt"
    file.write_text(f"a/000.jpg\n\nb/001.jpg\r\na/000.jpg\n{source}/a/002.jpg\nnone.jpg\n", encoding="utf-8")
    assert keys_of(source, tmp_path / "5", keys=str(file)) == {"a/000.jpg", "b/001.jpg", "a/002.jpg", "none.jpg"}
    (gone,) = whence.read_batch(tmp_path / "5", "failures").to_pylist()
    assert (gone["key"], gone["reason"], gone["etag"], gone["size"]) == ("none.jpg", "OBJECT_GONE", None, None)
    with file.open(encoding="utf-8") as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert len(keys_of(source, tmp_path / "6", keys="-", exclude=("none*",))) == 3
    for line in ("/elsewhere/x.jpg", "s3://bucket/x"):
        file.write_text(line)
        with pytest.raises(whence.InvalidArgument, match="not below the source"):
            keys_of(source, tmp_path / "7", keys=str(file))
    with pytest.raises(whence.InvalidArgument, match="cannot be read"):
        keys_of(source, tmp_path / "7", keys=str(tmp_path / "none"))


def test_keys_do_not_lead_out_of_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "in", 2)
    (tmp_path / "other.jpg").write_bytes(b"private")
    source = LocalSource(parse(tmp_path / "in"))
    for key in ("../other.jpg", "a/../../other.jpg", str(tmp_path / "other.jpg")):
        assert asyncio.run(source.head(key)) is None
        with pytest.raises(whence.NotFound) as caught:
            asyncio.run(source.read(key))
        assert caught.value.reason == "NO_SUCH_OBJECT"
    (tmp_path / "keys").write_text("../other.jpg\na/000.jpg\n")
    service = FakeService()
    do(a_job(tmp_path / "in", tmp_path / "out", selection=Selection(str(tmp_path / "keys"))), service)
    assert set(service.asked) == {b"image 0"}
    assert whence.read_batch(tmp_path / "out", "failures")["reason"].to_pylist() == ["OBJECT_GONE"]


def test_credentials_that_expire_stop_the_run(tmp_path: Path) -> None:
    """What is committed stays, and the message says what to do."""
    objects = fill(tmp_path / "in", 9)
    source = Expiring(LocalSource(parse(tmp_path / "in")), reads=5)
    with pytest.raises(whence.Unauthenticated, match="renew them"):
        do(a_job(tmp_path / "in", tmp_path / "out"), source=source)
    summary = do(a_job(tmp_path / "in", tmp_path / "out"), FakeService())
    assert summary.explained == len(objects)


class Expiring:
    """A source whose credentials last for some reads."""

    def __init__(self, source: LocalSource, reads: int) -> None:
        self.place, self.list, self.head = source.place, source.list, source.head
        self._source, self._reads = source, reads

    async def read(self, key: str) -> Any:
        self._reads -= 1
        if self._reads < 0:
            raise from_store(RuntimeError("ExpiredToken"), self.place)
        return await self._source.read(key)

    async def check(self) -> None:
        if self._reads < 0:
            raise from_store(RuntimeError("ExpiredToken"), self.place)
