"""The RPCs, through a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import io
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from concepts.engine import Engine
from concepts.errors import Unavailable
from concepts.explanation import EngineRequest, ExplainOptions, Explanation
from concepts.repository import Repository
from service.explainer import Computed, Explainer, Job
from tests.e2e.repository import BANK, MODEL, PER_CLASS, held_out, publish_bank, publish_sae_bank
from tests.service.conftest import Serve
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as pb


def ask(path: Path, **fields: Any) -> pb.ExplainRequest:
    return pb.ExplainRequest(**{"bank": BANK, "image": image_pb2.Image(encoded=path.read_bytes()), **fields})


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, error_details_pb2.ErrorInfo]:
    """Return code, message and ErrorInfo of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as problem:
        await call
    trailers = dict(problem.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == problem.value.code().value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "whence"
    assert info.metadata["request_id"]
    assert status.message == problem.value.details()
    return problem.value.code(), status.message, info


async def test_an_explanation_is_the_engines_own(serve: Serve) -> None:
    path = held_out()[3]
    maps = [explanation_pb2.MAP_KIND_ACTIVATION, explanation_pb2.MAP_KIND_CONTRIBUTION]
    async with serve() as server:
        reply = await server.stub.Explain(
            ask(path, request_id="mine", options=explanation_pb2.ExplainOptions(top_k=3, maps=maps))
        )
        repository = server.repository
        engine = Engine(repository.load_model(MODEL), repository.load(repository.resolve(BANK)))
        counts = server.counts
    view, _ = engine.model.spec.preprocessing.fit(Image.open(path))
    (expected,) = engine.explain(
        np.stack([view]), [EngineRequest(None, ExplainOptions(top_k=3, maps=("activation", "contribution")))]
    )
    assert reply.request_id == "mine"
    got = reply.explanation
    assert got.bank.digest == expected.bank_digest
    assert got.target.name == expected.target.name
    assert [score.id for score in got.concepts] == [score.id for score in expected.concepts]
    for mine, theirs in zip(got.concepts, expected.concepts, strict=True):
        assert mine.contribution == pytest.approx(theirs.contribution, abs=1e-4)
        for sent, kind in zip(mine.maps, ("activation", "contribution"), strict=True):
            values = np.frombuffer(sent.data, "<f2").reshape(sent.height, sent.width)
            assert np.allclose(values, theirs.maps[kind].values, atol=2e-3)
    total = got.faithfulness.constant + got.contributions_total + got.unexplained
    assert total == pytest.approx(got.target.logit, abs=1e-3)
    timings = got.timings
    assert timings.batch_size == 1
    assert timings.queue_ms > 0, "the bank had to be loaded first"
    assert timings.total_ms >= timings.decode_ms + timings.trunk_ms > 0
    assert counts.requests == {("Explain", "OK"): 1}
    assert len(counts.timings) == 1


async def test_raw_pixels_and_the_same_picture_encoded_agree(serve: Serve) -> None:
    path = held_out()[0]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    raws = [
        image_pb2.RawImage(height=32, width=32, data=pixels.tobytes()),
        image_pb2.RawImage(
            height=32, width=32, pixel_type=image_pb2.PIXEL_TYPE_FLOAT32, data=(pixels / 255).astype("<f4").tobytes()
        ),
    ]
    async with serve() as server:
        encoded = await server.stub.Explain(ask(path))
        for raw in raws:
            reply = await server.stub.Explain(pb.ExplainRequest(bank=BANK, image=image_pb2.Image(raw=raw)))
            assert reply.explanation.concepts == encoded.explanation.concepts


async def test_input_maps_add_up_over_the_wire(tmp_path: Path, serve: Serve) -> None:
    """From the logit to the concepts, and from each of them to the pixels; every sum is the caller's own."""
    reference = publish_sae_bank(tmp_path)
    options = explanation_pb2.ExplainOptions(
        top_k=100,
        maps=[explanation_pb2.MAP_KIND_INPUT, explanation_pb2.MAP_KIND_ACTIVATION],
        map_encoding=explanation_pb2.MAP_ENCODING_FLOAT32,
        colours=True,
    )
    async with serve(tmp_path) as server:
        requests = [ask(path, bank=reference, options=options) for path in held_out()]
        # More than are computed together.
        replies = await asyncio.gather(*(server.stub.Explain(request) for request in requests))
    for reply in replies:
        answer = reply.explanation
        report = answer.faithfulness
        assert answer.substitute
        assert not answer.HasField("unexplained")
        assert answer.concepts  # all of them: the bank has fewer than may be listed
        listed = sum(score.contribution for score in answer.concepts)
        assert report.constant + listed == pytest.approx(report.explained_logit, rel=1e-4)
        assert report.exactness == explanation_pb2.EXACTNESS_EXACT
        assert report.input_maps.exactness == explanation_pb2.EXACTNESS_EXACT
        assert report.input_maps.residual <= 1e-4
        for score in answer.concepts:
            pixels, grid = score.maps
            assert [sent.kind for sent in (pixels, grid)] == list(options.maps)
            values = np.frombuffer(pixels.data, "<f4").reshape(32, 32)
            assert values.sum(dtype=np.float64) == pytest.approx(score.activation, rel=1e-4)
            with Image.open(io.BytesIO(pixels.colours)) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGBA", (32, 32))
            assert (grid.height, grid.width, grid.colours) == (8, 8, b"")


@pytest.mark.parametrize("method", ["GRADIENT", "SMOOTHGRAD", "INTEGRATED"])
async def test_input_maps_of_least_squares_are_the_engines_own(serve: Serve, method: str) -> None:
    """By every method, of the concepts of all classes; whoever is in the batch."""
    asked = explanation_pb2.InputMethod.Value(f"INPUT_METHOD_{method}")
    options = explanation_pb2.ExplainOptions(
        top_k=2,
        maps=[explanation_pb2.MAP_KIND_INPUT],
        map_encoding=explanation_pb2.MAP_ENCODING_FLOAT32,
        input_method=asked,
        concepts=explanation_pb2.CONCEPT_SCOPE_ALL,
    )
    # Not those that the bank's concepts are positions of: there, codes of others are on the brink of zero.
    paths = held_out(PER_CLASS + 1)[PER_CLASS :: PER_CLASS + 1][:2]
    async with serve() as server:
        plain = server.stub.Explain(ask(paths[0]))
        replies = await asyncio.gather(*(server.stub.Explain(ask(path, options=options)) for path in paths))
        assert (await plain).explanation.scope == explanation_pb2.CONCEPT_SCOPE_TARGET
        repository = server.repository
        engine = Engine(repository.load_model(MODEL), repository.load(repository.resolve(BANK)))
    for path, reply in zip(paths, replies, strict=True):
        view, _ = engine.model.spec.preprocessing.fit(Image.open(path))
        wanted = ExplainOptions(top_k=2, maps=("input",), input_method=method.lower(), concepts="all")  # type: ignore[arg-type]
        (expected,) = engine.explain(np.stack([view]), [EngineRequest(None, wanted)])
        assert isinstance(expected, Explanation)
        got, report = reply.explanation, reply.explanation.faithfulness.input_maps
        assert (got.scope, report.method) == (explanation_pb2.CONCEPT_SCOPE_ALL, asked)
        assert report.HasField("completeness_residual") == (method == "INTEGRATED")
        for mine, theirs in zip(got.concepts, expected.concepts, strict=True):
            assert (mine.id, mine.class_index, mine.class_name) == (theirs.id, theirs.class_index, theirs.class_name)
            values, pixels = np.frombuffer(mine.maps[0].data, "<f4").reshape(32, 32), theirs.maps["input"].values
            assert np.linalg.norm(values - pixels) <= 5e-3 * np.linalg.norm(pixels)


async def test_overlays_and_image_sized_maps(serve: Serve) -> None:
    path = held_out()[0]
    options = explanation_pb2.ExplainOptions(
        maps=[explanation_pb2.MAP_KIND_ACTIVATION], map_encoding=explanation_pb2.MAP_ENCODING_PNG_OVERLAY
    )
    async with serve() as server:
        drawn = await server.stub.Explain(ask(path, options=options))
        large = await server.stub.Explain(
            ask(
                path, options=explanation_pb2.ExplainOptions(maps=options.maps, map_size=explanation_pb2.MAP_SIZE_IMAGE)
            )
        )
    assert all(score.maps[0].data.startswith(b"\x89PNG") for score in drawn.explanation.concepts)
    assert {(score.maps[0].height, score.maps[0].width) for score in large.explanation.concepts} == {(32, 32)}


RAW_NAN = image_pb2.RawImage(
    height=1, width=1, pixel_type=image_pb2.PIXEL_TYPE_FLOAT32, data=np.full(3, np.nan, "<f4").tobytes()
)


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"bank": "m/l/none"}, "NOT_FOUND", "UNKNOWN_BANK"),
        ({"bank": f"{MODEL}/layer9/quick"}, "NOT_FOUND", "UNKNOWN_BANK"),
        ({"bank": f"{BANK}@{'0' * 64}"}, "NOT_FOUND", "UNKNOWN_BANK"),
        ({"bank": ""}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"bank": "../../etc/passwd"}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"bank": "x" * 100_000}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"target": explanation_pb2.Target(name="unicorn")}, "INVALID_ARGUMENT", "UNKNOWN_CLASS"),
        ({"target": explanation_pb2.Target(index=10)}, "INVALID_ARGUMENT", "UNKNOWN_CLASS"),
        ({"options": explanation_pb2.ExplainOptions(top_k=0)}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"options": explanation_pb2.ExplainOptions(top_k=10**6)}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        (
            {"options": explanation_pb2.ExplainOptions(input_method=explanation_pb2.INPUT_METHOD_SMOOTHGRAD)},
            "INVALID_ARGUMENT",
            "UNSUPPORTED_OPTION",
        ),
        ({"options": explanation_pb2.ExplainOptions(colours=True)}, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION"),
        ({"priority": 9}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"image": image_pb2.Image()}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
        ({"image": image_pb2.Image(encoded=b"")}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
        ({"image": image_pb2.Image(encoded=b"no picture")}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
        ({"image": image_pb2.Image(raw=RAW_NAN)}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
        ({"image": image_pb2.Image(raw=image_pb2.RawImage(pixel_type=9))}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
        ({"image": image_pb2.Image(encoded=b"\0" * 5000)}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"request_id": "é"}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"request_id": "x" * 129}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ({"deadline": {"seconds": 0}}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        ({"deadline": {"seconds": -5}}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    ],
)
async def test_bad_input_gets_a_typed_answer(serve: Serve, fields: dict[str, Any], code: str, reason: str) -> None:
    async with serve(limits={"request_bytes": 4096} if len(str(fields)) > 5000 else {}) as server:
        call = server.stub.Explain(ask(held_out()[0], **{"request_id": "r-1", **fields}))
        got, message, info = await refusal(call)
        assert (got.name, info.reason) == (code, reason)
        assert message
        assert str(server.repository) not in message
        if "request_id" not in fields:
            assert info.metadata["request_id"] == "r-1"
        assert server.counts.requests == {("Explain", code): 1}
        await server.stub.Explain(ask(held_out()[0])) if code != "INVALID_ARGUMENT" else None


async def test_malformed_protobuf_gets_a_typed_answer(serve: Serve) -> None:
    async with serve() as server:
        for rpc in ("Explain", "Intervene", "GetBank", "Contrast", "SearchConcepts", "GetServerInfo"):
            call = server.channel.unary_unary(f"/whence.v1.ExplanationService/{rpc}")
            code, message, info = await refusal(call(b"\xff\xff\xff"))
            assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
            assert f"whence.v1.{rpc}Request" in message
        stream = server.channel.stream_stream("/whence.v1.ExplanationService/ExplainStream")
        good = pb.ExplainStreamRequest(request=ask(held_out()[0], request_id="good")).SerializeToString()
        replies = [pb.ExplainStreamResponse.FromString(data) async for data in stream(iter([b"\xff\xff", good]))]
    failures = [reply.error for reply in replies if reply.HasField("error")]
    assert [failure.reason for failure in failures] == ["INVALID_INPUT"]
    assert [reply.request_id for reply in replies if reply.HasField("explanation")] == ["good"]


async def test_a_bug_shows_neither_trace_nor_path(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def explain(self, job: Job[EngineRequest], timeout_s: float) -> Computed[Explanation]:
            raise FileNotFoundError("/srv/secret/weights.pt")

    async with serve(explainer=Broken()) as server:
        code, message, info = await refusal(server.stub.Explain(ask(held_out()[0], request_id="r-7")))
        assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in message
        assert "r-7" in message
        replies = [
            r async for r in server.stub.ExplainStream(iter([pb.ExplainStreamRequest(request=ask(held_out()[0]))]))
        ]
        assert replies[0].error.reason == "INTERNAL"
        assert "secret" not in str(replies[0])
    assert "/srv/secret/weights.pt" in caplog.text


async def test_the_stream_answers_each_request_with_its_own_id(serve: Serve) -> None:
    images = held_out(per_class=2)
    requests = [pb.ExplainStreamRequest(request=ask(path, request_id=f"r{n}")) for n, path in enumerate(images)]
    requests[5].request.image.encoded = b"broken"
    requests[7].request.bank = "m/l/none"
    async with serve(batch_limit=8) as server:
        replies = {reply.request_id: reply async for reply in server.stub.ExplainStream(iter(requests))}
        alone = (await server.stub.Explain(requests[0].request)).explanation
        counts = server.counts
    assert set(replies) == {f"r{n}" for n in range(len(images))}
    errors = {name: reply.error for name, reply in replies.items() if reply.HasField("error")}
    assert {name: error.reason for name, error in errors.items()} == {"r5": "INVALID_IMAGE", "r7": "UNKNOWN_BANK"}
    assert errors["r5"].metadata["request_id"] == "r5"
    assert counts.requests["ExplainStream", "OK"] == len(images) - 2
    batched = replies["r0"].explanation
    assert max(reply.explanation.timings.batch_size for reply in replies.values()) > 1
    for mine, theirs in zip(batched.concepts, alone.concepts, strict=True):
        assert mine.id == theirs.id
        assert mine.contribution == pytest.approx(theirs.contribution, abs=1e-3)


async def test_too_many_streams_are_refused(serve: Serve) -> None:
    async with serve(limits={"streams": 1}) as server:
        first = server.stub.ExplainStream()
        await first.write(pb.ExplainStreamRequest(request=ask(held_out()[0])))
        await first.read()
        second = server.stub.ExplainStream(iter(()))
        code, _, info = await refusal(second.read())
        assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        await first.done_writing()
        assert await first.read() is grpc.aio.EOF
        assert [r async for r in server.stub.ExplainStream(iter(()))] == []


class Slow:
    """An engine that takes its time, and remembers what was given up."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0

    async def explain(self, job: Job[Any], timeout_s: float) -> Computed[Any]:
        self.started += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        raise Unavailable("never", retry_after_s=1.0)

    intervene = contrast = explain


async def test_overload_is_refused_before_work_and_says_when_to_come_back(serve: Serve) -> None:
    slow = Slow()
    async with serve(explainer=slow, limits={"queued_images": 2}) as server:
        held = [server.stub.Explain(ask(held_out()[0])) for _ in range(2)]
        while slow.started < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as problem:
            await server.stub.Explain(ask(held_out()[0]))
        assert problem.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert float(dict(problem.value.trailing_metadata())["retry-after"]) > 0
        for call in held:
            call.cancel()
        while slow.cancelled < 2:
            await asyncio.sleep(0.01)
        again = server.stub.Explain(ask(held_out()[0]))
        while slow.started < 3:
            await asyncio.sleep(0.01)
        again.cancel()


async def test_a_cancelled_call_is_given_up(serve: Serve) -> None:
    slow = Slow()
    async with serve(explainer=slow) as server:
        call = server.stub.Explain(ask(held_out()[0]))
        stream = server.stub.ExplainStream()
        await stream.write(pb.ExplainStreamRequest(request=ask(held_out()[0])))
        while slow.started < 2:
            await asyncio.sleep(0.01)
        call.cancel()
        stream.cancel()
        while slow.cancelled < 2:
            await asyncio.sleep(0.01)
        assert server.counts.requests == {("Explain", "CANCELLED"): 1, ("ExplainStream", "CANCELLED"): 1}


async def test_the_deadline_of_the_request_is_kept_and_cut_to_the_limit(serve: Serve) -> None:
    async with serve(explainer=Slow(), default_deadline_s=0.05, limits={"deadline_s": 0.1}) as server:
        code, message, _ = await refusal(server.stub.Explain(ask(held_out()[0])))
        assert (code, "0.05 s" in message) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        code, message, _ = await refusal(server.stub.Explain(ask(held_out()[0], deadline={"seconds": 3600})))
        assert (code, "0.1 s" in message) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)


async def test_models_banks_and_concepts_are_described(serve: Serve) -> None:
    async with serve() as server:
        (model,) = (await server.stub.ListModels(pb.ListModelsRequest())).models
        (bank,) = (await server.stub.ListBanks(pb.ListBanksRequest())).banks
        assert (await server.stub.GetBank(pb.GetBankRequest(bank=BANK))).bank == bank
        assert not (await server.stub.ListBanks(pb.ListBanksRequest(model="other"))).banks
        concept = await server.stub.GetConcept(pb.GetConceptRequest(bank=f"{BANK}@{bank.digest}", concept_id=5))
        code, _, info = await refusal(server.stub.GetConcept(pb.GetConceptRequest(bank=BANK, concept_id=40)))
    assert (model.name, model.input_height, len(model.class_names)) == (MODEL, 32, 10)
    assert (bank.reference, bank.kind, bank.concept_count) == (BANK, bank_pb2.BANK_KIND_NMF, 10 * PER_CLASS)
    assert bank.weights_digest == model.digest
    assert (concept.concept.id, concept.concept.class_name) == (5, "automobile")
    assert concept.bank.digest == bank.digest
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_CONCEPT")


async def test_a_new_version_is_served_and_an_old_one_stays_within_reach(
    small_repository: Path, tmp_path: Path, serve: Serve
) -> None:
    root = tmp_path / "repository"
    shutil.copytree(small_repository, root)
    old = Repository(root).resolve(BANK).digest
    async with serve(root) as server:

        async def served(reference: str = BANK) -> str:
            return str((await server.stub.Explain(ask(held_out()[0], bank=reference))).explanation.bank.digest)

        assert await served() == old
        new = (await asyncio.to_thread(publish_bank, root, seed=1)).digest
        assert new != old
        assert await served() == new
        assert await served(f"{BANK}@{old}") == old
        await asyncio.to_thread(Repository(root).roll_back, f"{BANK}@{old}")
        assert await served() == old


async def test_a_corrupted_bank_names_its_file_and_others_are_served(
    small_repository: Path, tmp_path: Path, serve: Serve
) -> None:
    root = tmp_path / "repository"
    shutil.copytree(small_repository, root)
    publish_bank(root, "other", seed=1)
    (tensors,) = (root / "banks" / BANK).glob("*/tensors.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    async with serve(root) as server:
        code, message, info = await refusal(server.stub.Explain(ask(held_out()[0])))
        assert (code, info.reason) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_DATA")
        assert "tensors.safetensors" in message
        assert str(tmp_path) not in message
        await server.stub.Explain(ask(held_out()[0], bank=f"{MODEL}/layer3/other"))
        await asyncio.to_thread(publish_bank, root)  # mends it
        await server.stub.Explain(ask(held_out()[0]))


async def test_a_model_described_anew_is_explained_as_described(
    small_repository: Path, tmp_path: Path, serve: Serve
) -> None:
    """The same weights under other class names: no engine of the old description may answer."""
    root = tmp_path / "repository"
    shutil.copytree(small_repository, root)
    async with serve(root) as server:
        before = (await server.stub.Explain(ask(held_out()[0]))).explanation.target
        spec = server.repository.model_spec(MODEL)
        renamed = replace(spec, class_names=tuple(f"a kind of {name}" for name in spec.class_names))
        weights = server.repository.load_model(MODEL).module.state_dict()
        await asyncio.to_thread(lambda: server.repository.publish_model(renamed, weights, replace=True))
        after = (await server.stub.Explain(ask(held_out()[0]))).explanation.target
    assert (after.index, after.name) == (before.index, f"a kind of {before.name}")


async def test_a_damaged_model_does_not_hide_the_others(small_repository: Path, tmp_path: Path, serve: Serve) -> None:
    root = tmp_path / "repository"
    shutil.copytree(small_repository, root)
    (root / "models" / "damaged").mkdir()
    (root / "models" / "damaged" / "model.json").write_text("{")
    async with serve(root) as server:
        listed = await server.stub.ListModels(pb.ListModelsRequest())
    assert [model.name for model in listed.models] == [MODEL]


async def test_preloading_skips_what_cannot_be_loaded(small_repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    explainer = Explainer(
        Repository(small_repository), device=torch.device("cpu"), threads=1, batch_limit=4, queue_limit=4, engines=4
    )
    await explainer.preload(["m/l/none", BANK])
    assert "m/l/none is not served" in caplog.text
    assert len(explainer._engines._entries) == 1
    await explainer.preload(None)
    assert len(explainer._engines._entries) == 1
    await explainer.close()


async def test_the_server_says_what_it_is_and_accepts(serve: Serve) -> None:
    async with serve(limits={"top_k": 7, "deadline_s": 30.5}) as server:
        info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.version == version("whence-server")
        assert info.contract_revision == max(pb.ContractRevision.values())
        assert (info.limits.top_k, info.limits.deadline.ToNanoseconds()) == (7, 30_500_000_000)
        options = explanation_pb2.ExplainOptions(top_k=info.limits.top_k + 1)
        assert (await refusal(server.stub.Explain(ask(held_out()[0], options=options))))[2].reason == "INVALID_INPUT"
        assert server.counts.requests["GetServerInfo", "OK"] == 1


async def test_health(serve: Serve) -> None:
    async with serve() as server:
        health = health_pb2_grpc.HealthStub(server.channel)  # type: ignore[no-untyped-call]
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", "whence.v1.ExplanationService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == serving
        code, _, _ = await refusal(health.Check(health_pb2.HealthCheckRequest(service="other")))
        assert code == grpc.StatusCode.NOT_FOUND
        assert len((await health.List(health_pb2.HealthListRequest())).statuses) == 2
        watch = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
