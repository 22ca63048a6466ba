"""Every key ends exactly once: whatever is killed, and whoever works beside."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import whence
from tests.clients.batch.worlds import BANK, FakeService, a_job, do, ends, fill
from whence._batch.locations import Location
from whence._batch.output import Output, open_output
from whence._batch.planning import Shard
from whence._batch.run import run_job
from whence._batch.sources import open_source

SHARDS = (Shard(1, 2), Shard(2, 2))


class Killed(BaseException):
    """The process is gone."""


class Mortal:
    """An output whose user dies at the n-th operation, before or after it."""

    def __init__(self, output: Output, dies_at: int = 10**9, *, after: bool = False, yields: int = 0) -> None:
        self.place: Location = output.place
        self.operations = 0
        self._output, self._dies_at, self._after, self._yields = output, dies_at, after, yields

    @asynccontextmanager
    async def _operation(self) -> AsyncIterator[None]:
        number = self.operations
        self.operations += 1
        if number == self._dies_at and not self._after:
            raise Killed
        for _ in range(random.randint(0, self._yields)):
            await asyncio.sleep(0)
        try:
            yield
        finally:
            if number == self._dies_at:
                raise Killed

    async def create(self, name: str, content: bytes) -> bool:
        async with self._operation():
            return await self._output.create(name, content)

    async def put(self, name: str, file: Path) -> None:
        async with self._operation():
            await self._output.put(name, file)

    async def get(self, name: str) -> bytes:
        async with self._operation():
            return await self._output.get(name)

    async def fetch(self, name: str, file: Path) -> None:
        async with self._operation():
            await self._output.fetch(name, file)

    async def names(self, folder: str) -> AsyncIterator[str]:
        async with self._operation():
            found = [name async for name in self._output.names(folder)]
        for name in found:
            yield name

    async def delete(self, names: Sequence[str]) -> None:
        for name in names:
            async with self._operation():
                await self._output.delete([name])


def globbed(output: Path) -> set[str]:
    """Keys that a reader finds who knows nothing of commits."""
    files = [*(output / "results").glob("*.parquet"), *(output / "failures").glob("*.parquet")]
    keys = list(itertools.chain.from_iterable(pq.read_table(file)["key"].to_pylist() for file in files))
    assert len(keys) == len(set(keys))
    return set(keys)


async def no_image(content: bytes) -> None:
    if content.endswith(b"7"):
        raise whence.InvalidArgument("no image", reason="INVALID_IMAGE")


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_operation_of_the_store(tmp_path: Path, after: bool) -> None:
    objects = fill(tmp_path / "in", 8)
    for dies_at in itertools.count():
        job = a_job(tmp_path / "in", tmp_path / f"out{dies_at}")
        store = Mortal(open_output(job.output, create=True), dies_at, after=after)
        try:
            do(job, FakeService(no_image), output=store)
            assert dies_at > 20  # it lived to its end, for once
            break
        except Killed:
            pass
        begun = (tmp_path / f"out{dies_at}/manifest.json").exists()
        finished = set(ends(tmp_path / f"out{dies_at}")) if begun else set()
        service = FakeService(no_image)
        summary = do(job, service)
        assert not {objects[key] for key in finished} & set(service.asked)  # what had ended was not asked again
        assert ends(tmp_path / f"out{dies_at}") == dict.fromkeys(objects, 1)
        assert globbed(tmp_path / f"out{dies_at}") == set(objects)
        assert (summary.complete, summary.explained, summary.failed) == (True, 7, 1)


@pytest.mark.parametrize("seed", range(12))
def test_two_at_once_of_which_one_dies(tmp_path: Path, seed: int) -> None:
    random.seed(seed)
    objects = fill(tmp_path / "in", 20)
    job = a_job(tmp_path / "in", tmp_path / "out")

    async def both() -> None:
        stores = [
            Mortal(open_output(job.output, create=True), dies_at, after=bool(seed % 2), yields=30)
            for dies_at in (10**9, random.randint(0, 40))
        ]
        runs = [run_job(job, open_source(job.source), store, BANK, FakeService(no_image)) for store in stores]
        for ended in await asyncio.gather(*(mortal(run) for run in runs)):
            assert ended is None or ended.complete

    async def mortal(run: object) -> whence.BatchSummary | None:
        try:
            return await run  # type: ignore[misc,no-any-return]
        except Killed:
            return None

    asyncio.run(both())
    assert ends(tmp_path / "out") == dict.fromkeys(objects, 1)
    do(job)
    assert globbed(tmp_path / "out") == set(objects)


def test_refreshing_and_trying_again_beside_each_other(tmp_path: Path) -> None:
    for seed in range(6):
        random.seed(seed)
        source, out = tmp_path / f"in{seed}", tmp_path / f"out{seed}"
        objects = fill(source, 20)
        job = a_job(source, out)
        store = Mortal(open_output(job.output, create=True), random.randint(10, 40))
        with suppress(Killed):
            do(job, FakeService(fails_often), output=store)
        (source / "a/000.jpg").write_bytes(b"changed")
        (source / "b/001.jpg").unlink()
        objects = {key: content for key, content in objects.items() if key != "b/001.jpg"} | fill(source, 4, 20)
        objects["a/000.jpg"] = b"changed"
        jobs = [job, a_job(source, out, refresh=True), a_job(source, out, retry_failed=True, shard=SHARDS[0])]
        jobs.append(a_job(source, out, retry_failed=True, refresh=True, shard=SHARDS[1]))

        async def all_of_them(jobs: list[object] = jobs, out: Path = out) -> None:  # type: ignore[assignment]
            runs = []
            for each in jobs:
                store = Mortal(open_output(each.output, create=True), yields=30)  # type: ignore[attr-defined]
                service = FakeService(no_image)
                runs.append(run_job(each, open_source(each.source), store, BANK, service))  # type: ignore[arg-type,attr-defined]
            await asyncio.gather(*runs)

        asyncio.run(all_of_them())
        do(a_job(source, out, refresh=True, retry_failed=True), FakeService(no_image))
        assert ends(out) == dict.fromkeys(objects, 1)
        assert globbed(out) == set(objects)
        results = whence.read_batch(out).to_pylist()
        assert {row["key"]: row["runtime"].encode() for row in results} == {
            key: content for key, content in objects.items() if not content.endswith(b"7")
        }


async def fails_often(content: bytes) -> None:
    await no_image(content)
    if content.endswith((b"3", b"4")):
        raise whence.InternalError("a bug")


PROGRAM = """
import asyncio, sys
from tests.clients.batch.worlds import FakeService, a_job, do
do(a_job(sys.argv[1], sys.argv[2], chunk_size=8), FakeService(delay_s=0.002))
"""


def test_kill_9(tmp_path: Path) -> None:
    objects = fill(tmp_path / "in", 400)
    randomly = random.Random(0)
    kills = 0
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(tmp_path / "out")]
    while True:
        process = subprocess.Popen(command, cwd=Path(__file__).parents[3], env={**os.environ, "TMPDIR": str(tmp_path)})
        at = time.monotonic() + 120
        begun = len(list((tmp_path / "out/done").glob("*.json"))) if kills else 0
        target = begun + randomly.randint(0, 9)
        while process.poll() is None and len(list((tmp_path / "out/done").glob("*.json"))) <= target:
            assert time.monotonic() < at
            time.sleep(randomly.uniform(0.001, 0.02))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert set(ends(tmp_path / "out").values()) <= {1}
    assert process.returncode == 0
    assert kills >= 3
    assert ends(tmp_path / "out") == dict.fromkeys(objects, 1)
    assert globbed(tmp_path / "out") == set(objects)


INTERRUPTED = """
import asyncio, sys, whence
from tests.clients.batch.worlds import BANK
from whence.testing import FakeServer, make_explanation
import time

def slow(request):
    time.sleep(0.01)
    return make_explanation(concept_count=1)

def run():
    whence.explain_batch(sys.argv[1], sys.argv[2], bank="fake/layer/bank", address=server.address, chunk_size=8)

async def within_a_loop():
    run()

with FakeServer(slow, banks=[BANK]) as server:
    try:
        if sys.argv[3] == "loop":  # as notebooks run theirs: it leaves interrupts alone
            asyncio.new_event_loop().run_until_complete(within_a_loop())
        else:
            run()
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.parametrize("where", ["loop", "plain"])
def test_an_interrupt_stops_at_once_and_cleanly(tmp_path: Path, where: str) -> None:
    objects = fill(tmp_path / "in", 400)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "in"), str(tmp_path / "out"), where]
    (tmp_path / "scratch").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "out/done").glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=60)
    assert said == b"stopped\n", complaints
    assert b"Traceback" not in complaints
    assert b"xception" not in complaints
    assert not list((tmp_path / "scratch").iterdir())  # temporary files are gone
    assert set(ends(tmp_path / "out").values()) == {1}
    assert len(ends(tmp_path / "out")) < len(objects)
