"""What the asynchronous client does that no other client does; what both do is tested with both."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import whence
from tests.clients.blocking import left_tasks
from tests.clients.test_stream import check_pairing, echo, numbered
from whence.testing import FakeServer, make_explanation, serve
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

BANK = "fake/layer/bank"


class Stuck(service_grpc.ExplanationServiceServicer):
    """Never answers, and knows of each call whether it runs."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ended = threading.Event()

    def Explain(  # noqa: N802
        self, request: service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> service_pb2.ExplainResponse:
        self._wait(context)
        return service_pb2.ExplainResponse()

    def ExplainStream(  # noqa: N802
        self, request_iterator: Iterator[service_pb2.ExplainStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ExplainStreamResponse]:
        next(request_iterator)
        self._wait(context)
        yield from ()

    def _wait(self, context: grpc.ServicerContext) -> None:
        context.add_callback(self.ended.set)
        self.begun.set()
        self.ended.wait(30)


async def test_a_cancelled_task_cancels_its_call(image: NDArray[np.uint8]) -> None:
    servicer = Stuck()
    with serve(servicer) as address:
        async with whence.AsyncClient(address) as client:
            task = asyncio.create_task(client.explain(image, bank=BANK))
            assert await asyncio.to_thread(servicer.begun.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.ended.wait, 10)
        assert not await left_tasks()


async def test_a_cancelled_task_cancels_its_stream(image: NDArray[np.uint8]) -> None:
    servicer = Stuck()

    async def first(client: whence.AsyncClient) -> None:
        async with contextlib.aclosing(client.explain_many([image], bank=BANK)) as outcomes:
            await anext(outcomes)

    with serve(servicer) as address:
        async with whence.AsyncClient(address) as client:
            task = asyncio.create_task(first(client))
            assert await asyncio.to_thread(servicer.begun.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.ended.wait, 10)
        assert not await left_tasks()


async def test_closing_ends_what_runs(image: NDArray[np.uint8]) -> None:
    servicer = Stuck()
    with serve(servicer) as address:
        client = whence.AsyncClient(address)
        task = asyncio.create_task(client.explain(image, bank=BANK))
        assert await asyncio.to_thread(servicer.begun.wait, 30)
        await client.close()
        with pytest.raises(whence.Cancelled):
            await task
    assert not await left_tasks()


async def test_who_stops_early_leaves_nothing_behind() -> None:
    with FakeServer(echo) as server:
        async with whence.AsyncClient(server.address) as client:
            async with contextlib.aclosing(client.explain_many(numbered(200), bank=BANK, max_in_flight=4)) as outcomes:
                assert check_pairing([outcome async for outcome, _ in azip(outcomes, range(5))]) == [0, 1, 2, 3, 4]
            assert not await left_tasks()
    assert len(server.calls) < 20


async def azip(items: AsyncIterator[whence.Outcome], numbers: range) -> AsyncIterator[tuple[whence.Outcome, int]]:
    for number in numbers:
        yield await anext(items), number


async def test_images_may_come_asynchronously() -> None:
    async def arriving() -> AsyncIterator[NDArray[np.uint8]]:
        for image in numbered(200):
            await asyncio.sleep(0.001)
            yield image

    images = arriving()
    with FakeServer(echo, shuffle=True) as server:
        async with whence.AsyncClient(server.address) as client:
            async with contextlib.aclosing(client.explain_many(images, bank=BANK, max_in_flight=8)) as outcomes:
                assert check_pairing([outcome async for outcome, _ in azip(outcomes, range(40))]) == [*range(40)]
            assert (await anext(images))[0, 0, 0] < 60  # the caller's own, to go on with
            assert not await left_tasks()


async def test_calls_run_side_by_side(image: NDArray[np.uint8]) -> None:
    together = threading.Barrier(8, timeout=30)

    def meet(request: service_pb2.ExplainRequest) -> whence.Explanation:
        together.wait()
        return make_explanation()

    with FakeServer(meet) as server:
        async with whence.AsyncClient(server.address) as client:
            await asyncio.gather(*(client.explain(image, bank=BANK) for _ in range(8)))


async def test_a_token_may_be_waited_for(server: FakeServer, image: NDArray[np.uint8]) -> None:
    async def renewed() -> str:
        await asyncio.sleep(0)
        return "fresh"

    async with whence.AsyncClient(server.address, token=renewed) as client:
        await client.explain(image, bank=BANK)
        assert [outcome.error async for outcome in client.explain_many([image], bank=BANK)] == [None]
    assert [call.metadata["authorization"] for call in server.calls] == ["Bearer fresh"] * 2


async def test_files_are_read_beside_the_loop(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"not looked into")
    threads = set()

    class Watched:
        def __fspath__(self) -> str:
            threads.add(threading.current_thread())
            return str(tmp_path / "photo.jpg")

    async with whence.AsyncClient(server.address) as client:
        await client.explain(Watched(), bank=BANK)
        assert [outcome.error async for outcome in client.explain_many([Watched()], bank=BANK)] == [None]
    assert [call.request.image.encoded for call in server.calls] == [b"not looked into"] * 2
    assert threads
    assert threading.current_thread() not in threads


def test_a_client_is_made_before_its_loop_and_stays_in_it(server: FakeServer, image: NDArray[np.uint8]) -> None:
    client = whence.AsyncClient(server.address)

    async def ask() -> str:
        return (await client.explain(image, bank=BANK)).target.name

    async def first() -> None:
        assert [await ask(), await ask()] == ["tabby", "tabby"]
        await client.close()

    async def stays_open() -> None:
        nonlocal client
        client = whence.AsyncClient(server.address)
        await ask()

    asyncio.run(first())
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(stays_open())
        with pytest.raises(whence.FailedPrecondition, match="another event loop") as caught:
            asyncio.run(ask())
        assert caught.value.reason == "OTHER_LOOP"
        loop.run_until_complete(client.close())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


def test_both_clients_have_the_same_methods() -> None:
    ours, theirs = (
        {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}
        for kind in (whence.Client, whence.AsyncClient)
    )
    assert set(ours) == set(theirs)
    for name, method in ours.items():
        assert list(inspect.signature(method).parameters) == list(inspect.signature(theirs[name]).parameters)
        assert not inspect.iscoroutinefunction(method)
        assert inspect.iscoroutinefunction(theirs[name]) or name == "explain_many"
        assert "await" not in (method.__doc__ or "")
    assert "sync" not in (whence.Client.__doc__ or "")


def test_the_client_for_threads_is_made_of_the_other() -> None:
    script = Path(whence.__file__).parents[1] / "sync_client.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
