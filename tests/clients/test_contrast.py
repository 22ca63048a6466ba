"""Why one class and not another: the call, its record and its words, against a real gRPC server on this machine."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import whence
from tests.clients.blocking import Connect
from tests.clients.test_client import BANK
from whence import _fake_answers
from whence.testing import FakeServer, make_contrast, serve
from whence.v1 import explanation_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc


def test_a_contrast_comes_back_whole(client: whence.Client, image: NDArray[np.uint8]) -> None:
    got, sent = client.contrast(image, "tabby", "tiger cat", bank=BANK), make_contrast()
    assert (got.target.name, got.other.name) == ("tabby", "tiger cat")
    assert got.maps == sent.maps
    assert [concept.id for concept in got.concepts] == [concept.id for concept in sent.concepts]
    for ours, theirs in zip(got.concepts, sent.concepts, strict=True):
        assert ours.maps == theirs.maps
        assert ours.contribution == np.float32(theirs.contribution)
    assert got.plane == sent.plane
    assert got.flip_shift == sent.flip_shift
    assert [point.shift for point in got.shift_curve] == [point.shift for point in sent.shift_curve]
    assert got.difference == pytest.approx(got.faithfulness.explained_logit, rel=1e-6)
    assert len(got.request_id) == 32
    assert got.image is not None
    assert np.array_equal(got.image.pixels(), image)
    assert pickle.loads(pickle.dumps(got)) == got
    with pytest.raises(AttributeError):
        got.bank = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        got.maps["activation"].values[0, 0] = 1


def test_what_the_server_is_asked(server: FakeServer, client: whence.Client, image: NDArray[np.uint8]) -> None:
    client.contrast(image, bank=BANK, timeout_s=12)
    client.contrast(image, np.int64(3), 5, bank=BANK, top_k=2, order="activation", maps="activation", map_size="image")
    client.contrast(image, other="lynx", bank=BANK, maps=(), shift=False)
    first, second, third = (call.request for call in server.calls)
    assert {call.method for call in server.calls} == {"Contrast"}
    assert server.calls[0].metadata["request_id"] == first.request_id != second.request_id
    assert first.bank == BANK
    assert first.image.raw.data == image.tobytes()
    assert 0 < first.deadline.ToTimedelta().total_seconds() <= 12
    assert {"target", "other", "without_shift"}.isdisjoint(field.name for field, _ in first.ListFields())
    # Options that mean nothing to a contrast are not there at all.
    assert first.options == explanation_pb2.ExplainOptions(
        top_k=10,
        order=explanation_pb2.ORDER_CONTRIBUTION,
        maps=[explanation_pb2.MAP_KIND_ACTIVATION, explanation_pb2.MAP_KIND_CONTRIBUTION],
        map_size=explanation_pb2.MAP_SIZE_GRID,
        map_encoding=explanation_pb2.MAP_ENCODING_FLOAT16,
    )
    assert (second.target.index, second.other.index) == (3, 5)
    assert second.options == explanation_pb2.ExplainOptions(
        top_k=2,
        order=explanation_pb2.ORDER_ACTIVATION,
        maps=[explanation_pb2.MAP_KIND_ACTIVATION],
        map_size=explanation_pb2.MAP_SIZE_IMAGE,
        map_encoding=explanation_pb2.MAP_ENCODING_FLOAT16,
    )
    assert not third.HasField("target")
    assert (third.other.name, third.without_shift, list(third.options.maps)) == ("lynx", True, [])


def test_the_fake_answers_what_is_asked_for(client: whence.Client, image: NDArray[np.uint8]) -> None:
    one = client.contrast(image, bank=BANK, top_k=1, maps="contribution")
    assert len(one.concepts) == 1
    assert set(one.maps) == set(one.concepts[0].maps) == {"contribution"}
    assert one.shift_curve
    bare = client.contrast(image, bank=BANK, maps=(), shift=False)
    assert (bare.maps, bare.flip_shift, bare.shift_curve) == ({}, None, ())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": 3, "other": 3}, "between two classes, not 3 and itself"),
        ({"target": np.int64(0), "other": 0}, "and itself"),
        ({"target": "lynx", "other": "lynx"}, "not 'lynx' and itself"),
        ({"target": -1}, "target must be between 0"),
        ({"other": -1}, "other must be between 0"),
        ({"other": 1.5}, "other is a whole number"),
        ({"maps": "heat"}, "maps must be one of"),
        ({"order": "size"}, "order must be one of"),
        ({"map_size": "huge"}, "map_size must be one of"),
        ({"top_k": -1}, "top_k"),
        ({"bank": ""}, "model/layer/name"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_what_cannot_be_meant_never_reaches_the_server(
    options: dict[str, Any], says: str, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    with pytest.raises(whence.InvalidArgument, match=says):
        client.contrast(image, **{"bank": BANK, **options})
    assert not server.calls


def test_an_index_and_a_name_may_be_two_classes(
    server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    client.contrast(image, 3, "3", bank=BANK)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    ("failure", "attempts"), [(whence.Unavailable("starting"), 5), (whence.InvalidArgument("the same class"), 1)]
)
def test_only_what_may_pass_is_tried_again(
    failure: whence.WhenceError, attempts: int, server: FakeServer, client: whence.Client, image: NDArray[np.uint8]
) -> None:
    server.fail_next(failure, times=20)
    with pytest.raises(type(failure)) as caught:
        client.contrast(image, bank=BANK)
    assert len(server.calls) == attempts
    assert {call.request.request_id for call in server.calls} == {caught.value.request_id}


def test_an_answer_without_an_id_has_that_of_the_request(image: NDArray[np.uint8], connect: Connect) -> None:
    class Terse(service_grpc.ExplanationServiceServicer):
        def Contrast(self, request: object, context: object) -> object:  # noqa: N802
            return _fake_answers.contrast(make_contrast())

    with serve(Terse()) as address, connect(address) as client:
        assert len(client.contrast(image, bank=BANK).request_id) == 32


@pytest.mark.parametrize("grid", [(7, 7), (14, 9), (3, 5)])
@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_the_fakes_contrast_hangs_together(grid: tuple[int, int], count: int) -> None:
    made = make_contrast(grid=grid, prototype_count=count)
    distances, evidence = (made.maps[kind].values.astype(float) for kind in ("activation", "contribution"))
    assert distances.shape == evidence.shape == grid
    assert np.unravel_index(distances.argmax(), grid) == (2, 2)
    assert evidence.sum() == pytest.approx(made.contribution, abs=1e-5)
    assert evidence[evidence > 0].sum() == pytest.approx(made.contribution_for_target, abs=1e-5)
    assert evidence[evidence < 0].sum() == pytest.approx(made.contribution_for_other, abs=1e-5)
    assert len(made.concepts) == count
    for concept in made.concepts:
        codes = concept.maps["activation"].values
        assert not codes[distances <= 0].any()
        assert codes.sum() == pytest.approx(concept.activation, abs=1e-5)
        assert concept.maps["contribution"].values.sum() == pytest.approx(concept.contribution, abs=1e-5)
    if count:
        assert sum(c.contribution for c in made.concepts) == pytest.approx(made.contribution_for_target, rel=1e-3)
        assert sum(c.share for c in made.concepts) == pytest.approx(1, rel=1e-3)
    report = made.faithfulness
    assert report.constant + made.contribution + report.completeness_residual == pytest.approx(made.difference)
    assert report.carried_share == pytest.approx(made.contribution / (made.difference - report.constant))
    assert made.target.probability / made.other.probability == pytest.approx(math.exp(made.difference))
    first, *_ = made.shift_curve
    assert (first.target_probability, first.other_probability) == (made.target.probability, made.other.probability)
    assert made.flip_shift == min(point.shift for point in made.shift_curve if point.other_probability > 0.5)


def test_in_a_line() -> None:
    made = make_contrast()
    line = repr(made)
    assert line.startswith(
        "Contrast(tabby rather than tiger cat: +2.74 logits, 62% of it by the plane; flips at shift 1;"
    )
    assert line.endswith("; 3 prototypes of fake/layer/bank@bbbbbbbbbbbb)")
    assert "by the plane; no flip; 3 prototypes" in repr(replace(made, flip_shift=None))
    assert "flip" not in repr(replace(made, flip_shift=None, shift_curve=()))
    for nothing in (None, math.nan):
        report = replace(made.faithfulness, carried_share=nothing)
        assert "+2.74 logits, +1.56 by the plane" in repr(replace(made, faithfulness=report))
    assert "; 1 prototype of fake" in repr(make_contrast(prototype_count=1))
    nameless = replace(made, target=replace(made.target, name=""))
    assert "281 rather than tiger cat" in repr(nameless)


def test_in_words() -> None:
    made = make_contrast()
    unit = "× the layer's mean activation norm"
    assert made.describe().splitlines() == [
        "The logit of tabby is 4.24, that of tiger cat 1.5: a difference of +2.74.",
        "The plane between them contributes +1.56 to it: +2.78 where the image speaks for tabby, -1.23 where it speaks "
        "for tiger cat.",
        f"Shifted along the plane's normal by 1 {unit}, it would have a probability above 50% of tiger cat.",
        "Exact: the plane's part, what is left over and the constant are the difference (the head is affine after "
        "average pooling).",
        "The plane carries 62.5% of what the layer adds to the difference.",
        "Left over of the difference after the plane's part and the constant (+0.25): +0.934 logits.",
        "The prototypes' codes are optimal to 1e-06.",
        "The plane was fitted to 60 training images of tabby and 48 of tiger cat.",
        f"Of held-out positions that speak for either class, 93.8% are on its side, on average 0.25 {unit} from the "
        "plane.",
        f"A shift along its normal turns 96.9% of held-out images of tabby into tiger cat, half of those by "
        f"0.38 {unit} or less.",
    ]


def test_words_say_only_what_is_known() -> None:
    made = make_contrast(prototype_count=0, plane=whence.PlaneReport(60, 0))
    words = made.describe()
    for absent in ("held-out", "prototypes", "nan", "None"):
        assert absent not in words
    assert "60 training images of tabby and 0 of tiger cat." in words
    assert "already has a probability above 50% of tiger cat" in replace(made, flip_shift=0.0).describe()
    assert "No shift along the plane's normal, up to 8 ×" in replace(made, flip_shift=None).describe()
    unasked = replace(made, flip_shift=None, shift_curve=()).describe()
    assert "hift" not in unasked
    report = replace(made.faithfulness, exactness="first_order", exactness_reason="", carried_share=math.nan)
    words = replace(made, faithfulness=report).describe()
    assert "First order: contributions say how the difference changes near this image.\n" in words
    assert "carries" not in words
    shared = replace(report, carried_share=-0.25)
    assert "carries -25.0% of the difference's first-order part." in replace(made, faithfulness=shared).describe()
    alone = replace(made, plane=whence.PlaneReport(1, 1, accuracy=0.5, swap_rate=0.0))
    assert "50.0% are on its side.\n" in alone.describe()
    assert alone.describe().endswith("turns 0.0% of held-out images of tabby into tiger cat.")
