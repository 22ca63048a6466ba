"""Background requests over the wire: they take what interactive ones leave."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from concepts.explanation import EngineRequest, Explanation
from concepts.repository import Repository
from service.catalogue import Catalogue
from service.explainer import Computed, EngineKey, Explainer, Job
from service.handlers import Handlers
from service.priority import PRIORITIES, Priority
from service.settings import Settings
from tests.e2e.repository import BANK, held_out
from tests.service.conftest import Serve
from tests.service.test_ingress import Slow, ask, refusal
from whence.v1 import explanation_service_pb2 as pb


class Watched(Explainer):
    """The explainer itself, which remembers in order when interactive images arrived and which batches were begun."""

    def __init__(self, root: Path, **values: Any) -> None:
        super().__init__(Repository(root), device=torch.device("cpu"), threads=1, queue_limit=100, engines=4, **values)
        self.events: list[list[Priority]] = []

    async def explain(self, job: Job[EngineRequest], timeout_s: float) -> Computed[Explanation]:
        if job.priority == "interactive":
            self.events.append([])
        return await super().explain(job, timeout_s)

    async def _run(self, key: Any, jobs: Sequence[Job[Any]]) -> Sequence[Any]:
        self.events.append([job.priority for job in jobs])
        return await super()._run(key, jobs)


async def flood(count: int) -> AsyncIterator[pb.ExplainStreamRequest]:
    """Yield background requests."""
    request = ask(held_out()[0], priority=pb.PRIORITY_BACKGROUND)
    for _ in range(count):
        yield pb.ExplainStreamRequest(request=request)


async def test_a_flood_of_background_images_does_not_keep_interactive_ones_waiting(
    small_repository: Path, serve: Serve
) -> None:
    """Each waits for the batch that runs when it comes, and for no more; and the flood is answered whole."""
    explainer = Watched(small_repository, batch_limit=4)
    await explainer.preload([BANK])
    images, answered = 400, 0
    async with serve(explainer=explainer, batch_limit=4, limits={"stream_in_flight": 40}) as server:
        explainer.events.clear()

        async def background() -> None:
            nonlocal answered
            async for reply in server.stub.ExplainStream(flood(images)):
                assert reply.HasField("explanation"), reply.error
                answered += 1

        flooding = asyncio.create_task(background())
        while answered < 8:
            await asyncio.sleep(0.001)
        for path in held_out():
            await server.stub.Explain(ask(path))
        assert answered < images, "the flood was over too soon to show anything"
        await flooding
        assert server.counts.priorities == {"interactive": len(held_out()), "background": images}
    await explainer.close()
    assert answered == images
    batches = [event for event in explainer.events if event]
    assert all(len(set(batch)) == 1 for batch in batches), "priorities were mixed"
    assert max(len(batch) for batch in batches if batch[0] == "background") == 4
    waited, arrived = 0, False
    for event in explainer.events:
        if not event:
            waited, arrived = 0, True
        elif event[0] == "background":
            waited += arrived
            assert waited <= 1, "an interactive image waited for more than one batch of background ones"
        else:
            arrived = False


async def test_background_calls_are_refused_first_and_take_no_place_from_the_others(serve: Serve) -> None:
    slow = Slow()
    picture = held_out()[0]
    async with serve(explainer=slow, limits={"queued_images": 4}) as server:

        async def held(count: int, **fields: Any) -> None:
            wanted = slow.started + count
            calls.extend(server.stub.Explain(ask(picture, **fields)) for _ in range(count))
            while slow.started < wanted:
                await asyncio.sleep(0.01)

        calls: list[Any] = []
        await held(2, priority=pb.PRIORITY_BACKGROUND)
        code, _, info = await refusal(server.stub.Explain(ask(picture, priority=pb.PRIORITY_BACKGROUND)))
        assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        replies = [reply async for reply in server.stub.ExplainStream(flood(1))]
        assert replies[0].error.reason == "OVERLOADED"
        assert replies[0].error.retry_after.ToNanoseconds() > 0
        await held(4)
        code, _, _ = await refusal(server.stub.Explain(ask(picture, priority=pb.PRIORITY_INTERACTIVE)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()
        while slow.cancelled < len(calls):
            await asyncio.sleep(0.01)
        await held(1, priority=pb.PRIORITY_BACKGROUND)
        calls[-1].cancel()


async def test_interactive_images_are_decoded_beside_background_ones(small_repository: Path) -> None:
    settings = Settings(repository=str(small_repository), decoders=2)
    handlers = Handlers(settings, Catalogue(Repository(small_repository), refresh_s=0), Slow())
    gate = threading.Event()
    waiting = [asyncio.create_task(handlers._in_pool("background", gate.wait)) for _ in range(10)]
    assert await handlers._in_pool("interactive", lambda: 7) == 7
    assert not any(task.done() for task in waiting)
    gate.set()
    await asyncio.gather(*waiting)
    handlers.close()


@pytest.mark.parametrize("priority", PRIORITIES)
def test_a_job_takes_its_priority_to_other_processes(small_repository: Path, priority: Priority) -> None:
    repository = Repository(small_repository)
    job: Job[Any] = Job(EngineKey(repository.resolve(BANK), "d"), torch.zeros(1).numpy(), EngineRequest(), priority)
    assert pickle.loads(pickle.dumps(job)).priority == priority
