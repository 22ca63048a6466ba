"""Interventions, through a real gRPC server in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from concepts.engine import Engine
from concepts.intervention import InterventionRequest
from tests.e2e.repository import BANK, MODEL, PER_CLASS, held_out
from tests.service.conftest import Serve
from tests.service.test_ingress import Slow, ask, refusal
from whence.v1 import explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as pb

CAT = 3
CONCEPTS = {CAT * PER_CLASS: 0.0, CAT * PER_CLASS + 1: 2.5}
"""Two concepts of class ``cat``, and their factors."""


def what_if(path: Path, scales: Mapping[int, float], **fields: Any) -> pb.InterveneRequest:
    image, target = image_pb2.Image(encoded=path.read_bytes()), explanation_pb2.Target(index=CAT)
    return pb.InterveneRequest(**{"bank": BANK, "image": image, "scales": scales, "target": target, **fields})


def logits(scores: Any) -> dict[int, float]:
    return {score.index: score.logit for score in scores}


async def test_an_intervention_is_the_engines_own(serve: Serve) -> None:
    path = held_out()[CAT]
    async with serve() as server:
        reply = await server.stub.Intervene(what_if(path, CONCEPTS, request_id="mine"))
        repository = server.repository
        engine = Engine(repository.load_model(MODEL), repository.load(repository.resolve(BANK)))
        counts = server.counts
    view, _ = engine.model.spec.preprocessing.fit(Image.open(path))
    (expected,) = engine.intervene(np.stack([view]), [InterventionRequest(CAT, CONCEPTS)])
    assert reply.request_id == "mine"
    assert (reply.model.name, reply.bank.digest, reply.runtime) == (MODEL, expected.bank_digest, expected.runtime)
    assert (reply.target.index, reply.target.name) == (CAT, "cat")
    for got, own in ((reply.before, expected.before), (reply.after, expected.after)):
        assert [score.index for score in got] == [score.index for score in own]
        assert logits(got) == pytest.approx(logits(own), abs=1e-4)
    assert logits(reply.before) != pytest.approx(logits(reply.after), abs=0.1)
    timings = reply.timings
    assert timings.batch_size == 1
    assert timings.total_ms >= timings.decode_ms + timings.trunk_ms + timings.explain_ms > 0
    assert counts.requests == {("Intervene", "OK"): 1}
    assert [each.total_ms for each in counts.timings] == [timings.total_ms]


async def test_without_a_target_the_predicted_class_is_meant(serve: Serve) -> None:
    path = held_out()[0]
    async with serve() as server:
        predicted = (await server.stub.Explain(ask(path))).explanation.target.index
        reply = await server.stub.Intervene(what_if(path, {predicted * PER_CLASS: 0.0}, target=None))
        assert reply.target.index == predicted == reply.before[0].index
        assert reply.target == reply.before[0]
        other = (predicted + 1) % 10
        code, message, info = await refusal(server.stub.Intervene(what_if(path, {other * PER_CLASS: 0.0}, target=None)))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_OPTION")
    assert "the predicted class" in message
    assert "set `target`" in message


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"scales": {}}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"scales": {12: float("nan")}}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"scales": {12: float("inf")}}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"scales": {12: 1e9}}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"scales": dict.fromkeys(range(12, 16), 1.0)}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"scales": {10 * PER_CLASS: 0.0}}, "NOT_FOUND", "UNKNOWN_CONCEPT"),
        ({"scales": {2**32 - 1: 0.0}}, "NOT_FOUND", "UNKNOWN_CONCEPT"),
        ({"scales": {0: 0.0}}, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION"),
        ({"target": explanation_pb2.Target(name="unicorn")}, "INVALID_ARGUMENT", "UNKNOWN_CLASS"),
        ({"bank": "m/l/none"}, "NOT_FOUND", "UNKNOWN_BANK"),
        ({"image": image_pb2.Image()}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
        ({"image": image_pb2.Image(encoded=b"\0" * 5000)}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"request_id": "é"}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"deadline": {"seconds": 0}}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    ],
)
async def test_bad_input_gets_a_typed_answer(serve: Serve, fields: dict[str, Any], code: str, reason: str) -> None:
    async with serve(limits={"scales": 3, "request_bytes": 4096}) as server:
        request = what_if(held_out()[CAT], **{"scales": CONCEPTS, "request_id": "r-1", **fields})
        got, message, info = await refusal(server.stub.Intervene(request))
        assert (got.name, info.reason) == (code, reason), message
        if "request_id" not in fields:
            assert info.metadata["request_id"] == "r-1"
        assert server.counts.requests == {("Intervene", code): 1}


async def test_interventions_are_computed_together_and_apart_from_explanations(serve: Serve) -> None:
    """Each answer is what it is alone, whoever is in the batch, and one that is refused takes nobody along."""
    requests = [what_if(path, {CAT * PER_CLASS + n % PER_CLASS: n / 4}) for n, path in enumerate(held_out(2))]
    requests[6] = what_if(held_out()[6], {0: 0.0}, target=None)  # a frog with concepts of an aeroplane
    async with serve(batch_limit=8) as server:
        calls = [server.stub.Intervene(request) for request in requests]
        explained = [server.stub.Explain(ask(path)) for path in held_out()]
        together = await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.gather(*explained)
        batches = list(server.counts.batches)
        alone = [await server.stub.Intervene(request) for n, request in enumerate(requests) if n != 6]
    refused = together.pop(6)
    assert isinstance(refused, grpc.aio.AioRpcError)
    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert max(reply.timings.batch_size for reply in together) > 1
    assert sum(batches) == len(requests) + len(explained)
    for reply, single in zip(together, alone, strict=True):
        assert single.timings.batch_size == 1
        for got, expected in ((reply.before, single.before), (reply.after, single.after)):
            assert logits(got) == pytest.approx(logits(expected), abs=1e-3)


async def test_interventions_of_either_scope_go_apart(serve: Serve) -> None:
    """Concepts of several classes, beside requests for those of one class."""
    several = {CAT * PER_CLASS: 0.0, (CAT + 1) * PER_CLASS: 0.0}
    everything = explanation_pb2.CONCEPT_SCOPE_ALL
    requests = [
        what_if(path, several if n % 2 else CONCEPTS, concepts=everything if n % 2 else None)
        for n, path in enumerate(held_out())
    ]
    async with serve(batch_limit=8) as server:
        together = await asyncio.gather(*(server.stub.Intervene(request) for request in requests))
        alone = [await server.stub.Intervene(request) for request in requests]
        code, message, _ = await refusal(server.stub.Intervene(what_if(held_out()[0], several)))
    for reply, single in zip(together, alone, strict=True):
        assert logits(reply.after) == pytest.approx(logits(single.after), abs=1e-3)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "of all classes" in message


async def test_deadlines_and_overload_are_as_for_explanations(serve: Serve) -> None:
    slow = Slow()
    request = what_if(held_out()[0], CONCEPTS)
    async with serve(explainer=slow, default_deadline_s=0.05, limits={"queued_images": 1}) as server:
        code, message, _ = await refusal(server.stub.Intervene(request))
        assert (code, "0.05 s" in message) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        request.deadline.FromSeconds(60)
        held = server.stub.Intervene(request)
        while slow.started < 2:
            await asyncio.sleep(0.01)
        for call in (server.stub.Intervene(request), server.stub.Explain(ask(held_out()[0]))):
            code, _, info = await refusal(call)
            assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        held.cancel()
        while slow.cancelled < 2:
            await asyncio.sleep(0.01)
