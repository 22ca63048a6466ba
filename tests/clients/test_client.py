"""The client against a real gRPC server on this machine."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import pickle
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from numpy.typing import NDArray

import whence
from tests.clients.blocking import Connect
from whence import _requests, _retry
from whence.testing import FakeServer, make_explanation, serve
from whence.v1 import explanation_pb2
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

BANK = "fake/layer/bank"
MODEL = whence.Model("fake", "d" * 64, "torchvision:resnet50", ("tabby", "tiger cat"), 224, 160)
HELD = whence.Bank(
    BANK, "e" * 64, "nmf", "fake", "layer", "bank", 20, 512, "d" * 64, "2026-01-01T00:00:00Z", {"r2": 0.5}, {"rank": 10}
)
CONCEPT = whence.Concept(
    id=7,
    label="ear",
    class_index=0,
    class_name="tabby",
    statistics={"importance": 0.5},
    exemplars=tuple(whence.Exemplar(b"webp", f"{n}.jpg", whence.Box(0, 1, 2, 3), 0.5) for n in range(3)),
    parent=None,
    bank=BANK,
    bank_digest="e" * 64,
)


def test_an_explanation_comes_back_whole(client: whence.Client, image: NDArray[np.uint8]) -> None:
    got = client.explain(image, bank=BANK, maps=("activation", "contribution", "input"), colours=True)
    # float32 on the wire: the fake's numbers are rounded once.
    sent = make_explanation()
    assert got.target.name == "tabby"
    assert [concept.id for concept in got.concepts] == [concept.id for concept in sent.concepts]
    for ours, theirs in zip(got.concepts, sent.concepts, strict=True):
        assert ours.contribution == np.float32(theirs.contribution)
        assert ours.maps == theirs.maps
        assert ours.maps["contribution"].values.sum() == pytest.approx(ours.contribution, rel=1e-2)
        assert ours.maps["input"].values.sum() == pytest.approx(ours.activation, rel=1e-5)
    assert len(got.request_id) == 32
    total = sum(concept.contribution for concept in got.concepts) + got.unlisted
    report = got.faithfulness
    assert total + (got.unexplained or 0) + report.constant == pytest.approx(got.target.logit, rel=1e-5)
    assert pickle.loads(pickle.dumps(got)) == got


def test_what_the_server_is_asked(server: FakeServer, client: whence.Client, image: NDArray[np.uint8]) -> None:
    client.explain(image, bank=BANK, timeout_s=12)
    (call,) = server.calls
    assert call.metadata["application"] == "whence"
    assert call.metadata["request_id"] == call.request.request_id
    assert "authorization" not in call.metadata
    assert call.time_remaining_s is not None
    assert 0 < call.time_remaining_s <= 12.5  # gRPC rounds its header up, by up to a tenth of a second
    assert 0 < call.request.deadline.ToTimedelta().total_seconds() <= 12
    assert not call.request.HasField("target")
    assert call.request.options == explanation_pb2.ExplainOptions(
        top_k=10,
        order=explanation_pb2.ORDER_CONTRIBUTION,
        estimator=explanation_pb2.ESTIMATOR_GRADIENT,
        maps=[explanation_pb2.MAP_KIND_ACTIVATION],
        map_size=explanation_pb2.MAP_SIZE_GRID,
        map_encoding=explanation_pb2.MAP_ENCODING_FLOAT16,
        input_method=explanation_pb2.INPUT_METHOD_GRADIENT,
        concepts=explanation_pb2.CONCEPT_SCOPE_TARGET,
    )
    client.explain(image, bank=BANK, target=np.int64(3), maps=())
    assert server.calls[1].request.target.index == 3
    assert server.calls[1].metadata["request_id"] != call.metadata["request_id"]


@pytest.mark.parametrize("maps", ["input", ("input",), ("activation", "input")])
@pytest.mark.parametrize("colours", [False, True])
def test_input_maps_come_in_single_precision_and_in_colours_where_asked_for(
    maps: Any, colours: bool, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    alone = client.explain(image, bank=BANK, maps=maps, colours=colours)
    (outcome,) = client.explain_many([image], bank=BANK, maps=maps, colours=colours)
    for call, got in zip(server.calls, (alone, outcome.result()), strict=True):
        assert call.request.options.map_encoding == explanation_pb2.MAP_ENCODING_FLOAT32
        assert call.request.options.colours is colours
        assert got.faithfulness.input_maps == make_explanation().faithfulness.input_maps
        for ours, theirs in zip(got.concepts, make_explanation().concepts, strict=True):
            assert set(ours.maps) == ({maps} if isinstance(maps, str) else set(maps))
            found, expected = ours.maps["input"], theirs.maps["input"]
            assert np.array_equal(found.values, expected.values)
            assert (found == expected) is colours
            assert (found.colours is not None) is colours
    without = client.explain(image, bank=BANK)
    assert without.faithfulness.input_maps is None


@pytest.mark.parametrize("method", ["gradient", "smoothgrad", "integrated"])
def test_input_maps_by_every_method(
    method: Any, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    report = client.explain(image, bank=BANK, maps="input", input_method=method).faithfulness.input_maps
    (call,) = server.calls
    assert call.request.options.input_method == _requests.INPUT_METHODS[method]
    assert report is not None
    assert report.method == method


def test_all_calls_carry_the_application_and_a_token(
    server: FakeServer, image: NDArray[np.uint8], connect: Connect
) -> None:
    tokens = iter("-abcdefgh")  # the first goes with the question what the service is
    server.models, server.banks = {"fake": MODEL}, {BANK: HELD}
    server.concepts = {(BANK, 7): CONCEPT}
    with connect(server.address, token=lambda: next(tokens), application="other") as client:
        client.explain(image, bank=BANK)
        list(client.explain_many([image], bank=BANK))
        client.intervene(image, bank=BANK, scales={12: 0})
        client.contrast(image, bank=BANK)
        client.models()
        client.banks()
        client.bank(BANK)
        client.concept(BANK, 7)
    assert {call.method for call in server.calls} == {
        "Explain",
        "ExplainStream",
        "Intervene",
        "Contrast",
        "ListModels",
        "ListBanks",
        "GetBank",
        "GetConcept",
    }
    for call, token in zip(server.calls, "abcdefgh", strict=True):
        assert call.metadata["application"] == "other"
        assert call.metadata["authorization"] == f"Bearer {token}"
        assert call.metadata["request_id"]


def test_a_token_is_asked_for_before_every_attempt(
    server: FakeServer, image: NDArray[np.uint8], connect: Connect
) -> None:
    tokens = iter("abcd")
    server.fail_next(whence.Unavailable("starting"), times=2)
    with connect(server.address, token=lambda: next(tokens), check_version=False) as client:
        client.explain(image, bank=BANK)
    assert [call.metadata["authorization"] for call in server.calls] == ["Bearer a", "Bearer b", "Bearer c"]


def test_a_token_that_is_refused_is_not_tried_again(
    server: FakeServer, image: NDArray[np.uint8], connect: Connect
) -> None:
    server.fail_next(whence.Unauthenticated("expired", reason="BAD_TOKEN"))
    with connect(server.address, token=lambda: "old") as client, pytest.raises(whence.Unauthenticated):
        client.explain(image, bank=BANK)
    assert len(server.calls) == 1


@pytest.mark.parametrize("token", ["secret\n", "geheimnis-ä"])
def test_a_token_that_cannot_travel_is_refused(
    token: str, server: FakeServer, image: NDArray[np.uint8], connect: Connect
) -> None:
    with connect(server.address, token=token) as client, pytest.raises(whence.InvalidArgument, match="token") as caught:
        client.explain(image, bank=BANK)
    assert token not in str(caught.value)
    assert not server.calls


@pytest.mark.parametrize("priority", ["interactive", "background"])
def test_priority_reaches_the_server(
    priority: Any, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    client.explain(image, bank=BANK, priority=priority)
    list(client.explain_many([image], bank=BANK, priority=priority))
    assert [call.request.priority for call in server.calls] == [_requests.PRIORITIES[priority]] * 2


def test_the_inventory(server: FakeServer, client: whence.Client) -> None:
    assert client.models() == ()
    other = whence.Bank(**{name: getattr(HELD, name) for name in HELD.__slots__} | {"reference": "o/l/b", "model": "o"})
    server.models, server.banks = {"fake": MODEL}, {BANK: HELD, "o/l/b": other}
    server.concepts = {(BANK, 7): CONCEPT}
    assert client.models() == (MODEL,)
    assert client.banks() == (HELD, other)
    assert client.banks("fake") == (HELD,)
    assert client.bank(f"{BANK}@{'e' * 64}") == HELD
    assert client.concept(BANK, 7) == CONCEPT
    assert client.concept(BANK, 7, max_exemplars=1).exemplars == CONCEPT.exemplars[:1]
    assert client.concept(BANK, 7, max_exemplars=0).exemplars == ()
    with pytest.raises(whence.NotFound, match="no concept 8"):
        client.concept(BANK, 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bank": ""}, "model/layer/name"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**32}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"target": -1}, "target"),
        ({"target": 1.5}, "target"),
        ({"order": "size"}, "'contribution', 'activation'"),
        ({"estimator": "guess"}, "'integrated'"),
        ({"maps": "heat"}, "'input'"),
        ({"maps": ("heat",)}, "'input'"),
        ({"maps": ("activation",), "colours": True}, "maps='input'"),
        ({"map_size": "huge"}, "'grid'"),
        ({"input_method": "smoothgrad"}, "maps='input'"),
        ({"maps": "input", "input_method": "deeplift"}, "'smoothgrad'"),
        ({"maps": "input", "input_method": "integrated", "colours": True}, "one gradient"),
        ({"concepts": "some"}, "'target', 'all'"),
        ({"priority": "urgent"}, "'background'"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
    ],
)
def test_wrong_options_never_reach_the_server(
    options: dict[str, object], says: str, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    given: dict[str, Any] = {"bank": BANK, **options}
    with pytest.raises(whence.InvalidArgument, match=says):
        client.explain(image, **given)
    with pytest.raises(whence.InvalidArgument, match=says):
        client.explain_many([image], **given)
    assert not server.calls


@pytest.mark.parametrize(
    "options",
    [
        {"address": ""},
        {"address": "http://localhost:9000"},
        {"timeout_s": -1},
        {"timeout_s": 1e15},
        {"max_message_bytes": 0},
        {"max_attempts": 0},
        {"retry_budget": -1},
        {"tls": whence.TLS(certificate="only.pem")},
        {"tls": whence.TLS(authorities="/nowhere/ca.pem")},
        {"tls": whence.TLS(authorities=__file__)},
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, object], connect: Connect) -> None:
    with pytest.raises(whence.InvalidArgument):
        connect(**{"address": "localhost:1", **options})  # type: ignore[arg-type]


def test_explain_and_explain_many_take_the_same_options() -> None:
    one = inspect.signature(whence.Client.explain).parameters
    many = inspect.signature(whence.Client.explain_many).parameters
    assert {name: one[name] for name in one if name != "image"} == {
        name: many[name] for name in many if name not in ("images", "max_in_flight", "ordered")
    }


# Retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [
        (whence.Unavailable("starting"), 5),
        (whence.Overloaded("busy", retry_after_s=0.01), 5),
        (whence.ResourceExhausted("message too large"), 1),
        (whence.InvalidArgument("no"), 1),
        (whence.DeadlineExceeded("late"), 1),
        (whence.InternalError("bug"), 1),
    ],
)
def test_only_what_may_pass_is_tried_again(
    failure: whence.WhenceError, attempts: int, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    server.fail_next(failure, times=20)
    with pytest.raises(type(failure)):
        client.explain(image, bank=BANK)
    assert len(server.calls) == attempts
    assert len({call.request.request_id for call in server.calls}) == 1
    deadlines = [call.request.deadline.ToTimedelta() for call in server.calls]
    assert deadlines == sorted(deadlines, reverse=True)


def test_a_failure_that_passes_is_not_seen(server: FakeServer, client: whence.Client, image: NDArray[np.uint8]) -> None:
    server.fail_next(whence.Unavailable("starting"), times=2)
    assert client.explain(image, bank=BANK).target.name == "tabby"
    server.fail_next(whence.Unavailable("starting"), times=2)
    client.models()
    assert len(server.calls) == 6


def test_retries_can_be_turned_off(server: FakeServer, image: NDArray[np.uint8], connect: Connect) -> None:
    server.fail_next(whence.Unavailable("starting"))
    with connect(server.address, max_attempts=1) as client, pytest.raises(whence.Unavailable):
        client.explain(image, bank=BANK)
    assert len(server.calls) == 1


def test_retry_after_is_honoured(server: FakeServer, client: whence.Client, image: NDArray[np.uint8]) -> None:
    server.fail_next(whence.Overloaded("busy", retry_after_s=0.4))
    begin = time.monotonic()
    client.explain(image, bank=BANK)
    assert time.monotonic() - begin >= 0.4  # a lower bound: no machine is too slow for it


def test_no_retry_goes_past_the_deadline(server: FakeServer, client: whence.Client, image: NDArray[np.uint8]) -> None:
    server.fail_next(whence.Overloaded("busy", retry_after_s=60), times=5)
    with pytest.raises(whence.Overloaded):  # at once: waiting would be in vain
        client.explain(image, bank=BANK, timeout_s=15)
    assert len(server.calls) == 1


def test_all_calls_share_a_budget_of_retries(server: FakeServer, image: NDArray[np.uint8], connect: Connect) -> None:
    server.fail_next(whence.Unavailable("down"), times=9)
    with connect(server.address, retry_budget=4) as client:
        with pytest.raises(whence.Unavailable):  # takes all four
            client.explain(image, bank=BANK)
        assert len(server.calls) == 5
        for _ in range(3):  # none is left: asked once, and not more
            with pytest.raises(whence.Unavailable):
                client.models()
        assert len(server.calls) == 8
        with pytest.raises(whence.Unavailable):
            client.explain(image, bank=BANK)
        for _ in range(10):  # ten successes give one back
            client.models()
        server.calls.clear()
        server.fail_next(whence.Unavailable("down"), times=2)
        with pytest.raises(whence.Unavailable):
            client.explain(image, bank=BANK)
    assert len(server.calls) == 2


def test_a_budget_never_holds_more_than_at_first() -> None:
    budget = _retry.RetryBudget(2)
    for _ in range(100):
        budget.give_back()
    assert [budget.take() for _ in range(4)] == [True, True, False, False]
    for _ in range(9):
        budget.give_back()
    assert not budget.take()
    budget.give_back()
    assert budget.take()


def test_pauses_grow_with_jitter_up_to_a_cap() -> None:
    policy = _retry.RetryPolicy(max_attempts=100, first_pause_s=0.1, longest_pause_s=5.0)
    error = whence.Unavailable("gone")
    for attempt in (1, 2, 3, 10, 50):
        longest = min(0.1 * 2 ** (attempt - 1), 5.0)
        pauses = [policy.pause_s(error, attempt, 1e9) or 0.0 for _ in range(200)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
    assert policy.pause_s(error, 100, 1e9) is None
    assert policy.pause_s(error, 5, 0.5) is None


def test_a_server_that_starts_late_is_found(image: NDArray[np.uint8], connect: Connect) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = threading.Event()

    class Late(service_grpc.ExplanationServiceServicer):
        def ListModels(self, request: object, context: object) -> service_pb2.ListModelsResponse:  # noqa: N802
            return service_pb2.ListModelsResponse()

    def start() -> None:
        time.sleep(0.4)
        with serve(Late(), port=port):
            started.wait(30)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        with connect(f"localhost:{port}", timeout_s=30, max_attempts=50) as client:
            assert client.models() == ()
    finally:
        started.set()
        thread.join()


def test_retries_do_connect_again(connect: Connect) -> None:
    connections = 0

    def refuse(listener: socket.socket) -> None:
        nonlocal connections
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()
                connections += 1

    with socket.create_server(("localhost", 0)) as listener:
        thread = threading.Thread(target=refuse, args=(listener,))
        thread.start()
        with connect(f"localhost:{listener.getsockname()[1]}") as client, pytest.raises(whence.Unavailable):
            client.models()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert connections >= 3  # gRPC's own pause would make it one or two


# Deadlines and limits --------------------------------------------------------------------------------------------


def test_a_deadline_ends_the_call(image: NDArray[np.uint8], connect: Connect) -> None:
    release = threading.Event()

    def slow(request: service_pb2.ExplainRequest) -> whence.Explanation:
        release.wait(30)
        return make_explanation()

    with FakeServer(slow) as server, connect(server.address) as client:
        with pytest.raises(whence.DeadlineExceeded) as caught:
            client.explain(image, bank=BANK, timeout_s=0.3)
        release.set()
    assert caught.value.request_id
    assert len(server.calls) == 1


def test_an_image_that_is_too_large_is_not_sent(server: FakeServer, connect: Connect) -> None:
    with connect(server.address, max_message_bytes=100_000) as client:
        with pytest.raises(whence.ResourceExhausted, match="max_message_bytes") as caught:
            client.explain(np.zeros((200, 200, 3), np.uint8), bank=BANK)
        client.explain(np.zeros((150, 200, 3), np.uint8), bank=BANK)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert len(server.calls) == 1


def test_large_messages_pass_both_ways(connect: Connect) -> None:
    large = make_explanation(grid=(1500, 1500), concept_count=1)  # 4.5 MB of maps, beyond gRPC's own limit
    with FakeServer(lambda request: large) as server, connect(server.address) as client:
        got = client.explain(np.zeros((1600, 1600, 3), np.uint8), bank=BANK)
    assert got.concepts[0].maps["activation"].values.shape == (1500, 1500)


def test_an_answer_beyond_the_limit_is_an_error_and_not_tried_again(connect: Connect) -> None:
    large = make_explanation(grid=(300, 300), concept_count=1)
    with (
        FakeServer(lambda request: large) as server,
        connect(server.address, max_message_bytes=50_000) as client,
        pytest.raises(whence.ResourceExhausted, match="limit"),
    ):
        client.explain(np.zeros((9, 9, 3), np.uint8), bank=BANK)
    assert len(server.calls) == 1


def test_a_closed_client_says_so(server: FakeServer, image: NDArray[np.uint8], connect: Connect) -> None:
    client = connect(server.address)
    client.close()
    for call in (client.models, lambda: client.explain(image, bank=BANK), lambda: client.explain_many([], bank=BANK)):
        with pytest.raises(whence.FailedPrecondition, match="closed"):
            call()


def test_many_threads_share_one_client(server: FakeServer, client: whence.Client, image: NDArray[np.uint8]) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(client.explain(image, bank=BANK).request_id)) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 16


# TLS -------------------------------------------------------------------------------------------------------------


def write_identity(folder: Path, name: str) -> tuple[Path, Path]:
    """A key and a certificate that vouches for itself, valid for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_file, certificate_file = folder / f"{name}.key", folder / f"{name}.pem"
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key_file, certificate_file


def test_tls_and_mutual_tls(tmp_path: Path, image: NDArray[np.uint8], connect: Connect) -> None:
    server_key, server_certificate = write_identity(tmp_path, "service.example")
    client_key, client_certificate = write_identity(tmp_path, "client.example")
    trusting = whence.TLS(authorities=server_certificate, server_name="service.example")
    mutual = whence.TLS(
        authorities=server_certificate,
        certificate=client_certificate,
        key=client_key,
        server_name="service.example",
    )
    with FakeServer(identity=(server_key, server_certificate)) as server:
        with connect(server.address, tls=trusting) as client:
            assert client.explain(image, bank=BANK).target.name == "tabby"
        for wrong in (True, False, whence.TLS(authorities=client_certificate)):
            with (
                connect(server.address, tls=wrong, max_attempts=1, timeout_s=10) as client,
                pytest.raises(whence.Unavailable),
            ):
                client.models()
    with FakeServer(identity=(server_key, server_certificate), client_authorities=client_certificate) as server:
        with connect(server.address, tls=mutual) as client:
            assert client.models() == ()
        with connect(server.address, tls=trusting, max_attempts=1) as client, pytest.raises(whence.Unavailable):
            client.models()
