"""What if: the call and its record, against a real gRPC server on this machine."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import whence
from tests.clients.blocking import Connect
from tests.clients.test_client import BANK, CONCEPT
from whence import _fake_answers
from whence.testing import FakeServer, make_explanation, make_intervention, serve
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc


def test_an_intervention_comes_back_whole(client: whence.Client, image: NDArray[np.uint8]) -> None:
    got = client.intervene(image, bank=BANK, scales={12: 0, 7: 2.5})
    sent = make_intervention()
    assert got.scales == {12: 0.0, 7: 2.5}
    assert [score.name for score in got.before] == ["tabby", "tiger cat"]
    assert [score.name for score in got.after] == ["tiger cat", "tabby"]
    for ours, theirs in zip(
        (got.target, *got.before, *got.after), (sent.target, *sent.before, *sent.after), strict=True
    ):
        assert (ours.index, ours.probability) == (theirs.index, theirs.probability)
        assert ours.logit == np.float32(theirs.logit)
    assert (got.model, got.bank, got.bank_digest, got.runtime) == (
        sent.model,
        sent.bank,
        sent.bank_digest,
        sent.runtime,
    )
    assert got.timings == sent.timings
    assert len(got.request_id) == 32
    assert pickle.loads(pickle.dumps(got)) == got
    with pytest.raises(AttributeError):
        got.bank = "other"  # type: ignore[misc]


def test_what_the_server_is_asked(server: FakeServer, client: whence.Client, image: NDArray[np.uint8]) -> None:
    client.intervene(image, bank=BANK, scales={np.int64(12): np.float32(0.5)}, timeout_s=12)
    client.intervene(image, bank=BANK, scales={12: -1}, target="tabby")
    client.intervene(image, bank=BANK, scales={12: 0}, target=3)
    first, second, third = (call.request for call in server.calls)
    assert {call.method for call in server.calls} == {"Intervene"}
    assert server.calls[0].metadata["request_id"] == first.request_id != second.request_id
    assert first.bank == BANK
    assert dict(first.scales) == {12: 0.5}
    assert 0 < first.deadline.ToTimedelta().total_seconds() <= 12
    assert not first.HasField("target")
    assert (dict(second.scales), second.target.name, third.target.index) == ({12: -1.0}, "tabby", 3)


def test_concepts_are_named_by_what_the_client_gives(
    server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    """Scores of an explanation, with their maps, and concepts of the inventory."""
    explanation = client.explain(image, bank=BANK, maps=("activation",))
    client.intervene(image, bank=BANK, scales=dict.fromkeys(explanation.concepts, 0))
    assert dict(server.calls[1].request.scales) == {score.id: 0.0 for score in explanation.concepts}
    client.intervene(image, bank=BANK, scales={CONCEPT: 2})
    assert dict(server.calls[2].request.scales) == {7: 2.0}


def test_equal_concepts_are_one_key() -> None:
    one, same = make_explanation().concepts[0], make_explanation().concepts[0]
    assert one == same
    assert len({one, same, make_explanation().concepts[1]}) == 2
    copied = pickle.loads(pickle.dumps(CONCEPT))
    assert {CONCEPT: 1}[copied] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scales": {}}, "at least one concept"),
        ({"scales": [(12, 0)]}, r"scales=\{12: 0\}"),
        ({"scales": {12: float("nan")}}, "concept 12 is a finite number, not nan"),
        ({"scales": {12: float("inf")}}, "finite"),
        ({"scales": {12: "0"}}, "finite number, not '0'"),
        ({"scales": {12: True}}, "finite"),
        ({"scales": {-1: 0}}, "a concept's id must be between 0"),
        ({"scales": {"ear": 0}}, "a concept's id is a whole number, not 'ear'"),
        ({"scales": {7: 0, CONCEPT: 2}}, "concept 7 twice"),
        ({"bank": ""}, "model/layer/name"),
        ({"target": 1.5}, "target"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_what_cannot_be_meant_never_reaches_the_server(
    options: dict[str, Any], says: str, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    with pytest.raises(whence.InvalidArgument, match=says):
        client.intervene(image, **{"bank": BANK, "scales": {12: 0}, **options})
    assert not server.calls


@pytest.mark.parametrize(
    ("failure", "attempts"), [(whence.Unavailable("starting"), 5), (whence.InvalidArgument("no such scale"), 1)]
)
def test_only_what_may_pass_is_tried_again(
    failure: whence.WhenceError, attempts: int, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    server.fail_next(failure, times=20)
    with pytest.raises(type(failure)) as caught:
        client.intervene(image, bank=BANK, scales={12: 0})
    assert len(server.calls) == attempts
    assert {call.request.request_id for call in server.calls} == {caught.value.request_id}


def test_a_deadline_ends_the_call(image: NDArray[np.uint8], connect: Connect) -> None:
    release = threading.Event()

    def slow(request: service_pb2.InterveneRequest) -> whence.Intervention:
        release.wait(30)
        return make_intervention()

    with FakeServer(intervene=slow) as server, connect(server.address) as client:
        with pytest.raises(whence.DeadlineExceeded):
            client.intervene(image, bank=BANK, scales={12: 0}, timeout_s=0.3)
        release.set()


def test_an_answer_without_an_id_has_that_of_the_request(image: NDArray[np.uint8], connect: Connect) -> None:
    class Terse(service_grpc.ExplanationServiceServicer):
        def Intervene(self, request: object, context: object) -> service_pb2.InterveneResponse:  # noqa: N802
            return _fake_answers.intervention(make_intervention())

    with serve(Terse()) as address, connect(address) as client:
        assert len(client.intervene(image, bank=BANK, scales={12: 0}).request_id) == 32


def test_in_words() -> None:
    moved = make_intervention(scales={12: 0.0, 7: 2.5})
    assert moved.changed
    first, *rest = moved.describe().splitlines()
    assert first == "With concept 12 × 0, concept 7 × 2.5 the model predicts tiger cat in place of tabby."
    assert rest[0].startswith("tabby: 75.0% before, 25.0% after (logit ")
    assert rest[1].startswith("tiger cat: 18.8% before, 62.5% after (logit ")
    assert repr(moved).startswith("Intervention(tabby p=0.750 → tiger cat p=0.625; concept 12 × 0, concept 7 × 2.5 of ")
    still = make_intervention(after=moved.before)
    assert not still.changed
    assert "the model still predicts tabby." in still.describe()
    nameless = make_intervention(
        before=(whence.ClassScore(3, "", 1.0, 0.5),), after=(whence.ClassScore(3, "", 1.0, 0.5),)
    )
    assert "still predicts 3" in nameless.describe()
