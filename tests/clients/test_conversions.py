"""Messages to records and back: every field of the contract is walked, so that none can be missed."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from PIL import Image

import whence
from whence import _answers, _fake_answers, _images, _json, _requests
from whence.testing import make_explanation
from whence.v1 import bank_pb2, explanation_pb2
from whence.v1 import explanation_service_pb2 as service_pb2

MAP_SIDE = 4


def fill(message: Message, numbers: Iterator[int], *, within: Message | None = None) -> None:
    """Set every field, at every depth, to a value that no other field has; messages within their like stay bare."""
    if isinstance(message, Struct):
        message.update({"number": next(numbers) + 0.5, "list": [1, True, None, "text"], "inner": {"k": next(numbers)}})
        return
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[f"key{next(numbers)}"] = float(next(numbers))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            if isinstance(within, type(message)) and field.message_type is message.DESCRIPTOR:
                continue
            target = getattr(message, field.name)
            for item in (target.add(), target.add()) if field.is_repeated else (target,):
                fill(item, numbers, within=message)
        elif field.is_repeated:
            getattr(message, field.name).extend([leaf(field, numbers), leaf(field, numbers)])
        else:
            setattr(message, field.name, leaf(field, numbers))
    make_coherent(message, numbers)


def make_coherent(message: Message, numbers: Iterator[int]) -> None:
    """Mend fields that depend on one another."""
    if isinstance(message, explanation_pb2.Map):
        message.height, message.width, message.encoding = 2, MAP_SIDE, explanation_pb2.MAP_ENCODING_FLOAT32
        message.data = (np.arange(2 * MAP_SIDE) + next(numbers) + 1e-3).astype("<f4").tobytes()
        message.colours = picture("RGBA", (2, MAP_SIDE, 4), next(numbers))
    if isinstance(message, service_pb2.InterveneResponse):
        for was, now in zip(message.before, message.after, strict=True):
            now.index = was.index
    if isinstance(message, (explanation_pb2.ConceptScore, service_pb2.ContrastResponse)):
        for kind, item in zip(itertools.count(1), message.maps, strict=False):
            item.kind = kind  # type: ignore[assignment]


def picture(mode: str, shape: tuple[int, ...], number: int = 0) -> bytes:
    """A PNG of pixels that are all different."""
    pixels = (np.arange(np.prod(shape)) + number).astype(np.uint8).reshape(shape)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG")
    return file.getvalue()


def leaf(field: FieldDescriptor, numbers: Iterator[int]) -> Any:
    number = next(numbers)
    if field.type == FieldDescriptor.TYPE_ENUM:
        values = field.enum_type.values
        return values[1 + number % (len(values) - 1)].number
    return {
        FieldDescriptor.TYPE_STRING: f"text {number}",
        FieldDescriptor.TYPE_BYTES: f"bytes {number}".encode(),
        FieldDescriptor.TYPE_BOOL: True,
        FieldDescriptor.TYPE_FLOAT: number + 0.5,
        FieldDescriptor.TYPE_DOUBLE: number + 0.5,
    }.get(field.type, number)


def assert_full(message: Message, within: Message | None = None) -> None:
    """Check that the walk left nothing out but messages within their like within their like."""
    expected = {
        field.name
        for field in message.DESCRIPTOR.fields
        if not (isinstance(within, type(message)) and field.message_type is message.DESCRIPTOR)
    }
    assert {field.name for field, _ in message.ListFields()} == expected
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and not isinstance(value, Struct):
            if field.message_type.GetOptions().map_entry:
                continue
            for item in value if field.is_repeated else [value]:
                assert_full(item, message)


def test_every_field_of_an_explanation_comes_through() -> None:
    message = explanation_pb2.Explanation()
    fill(message, itertools.count(3))
    assert_full(message)
    record = _answers.explanation(message, "r-1", None)
    assert record.request_id == "r-1"
    assert _fake_answers.explanation(record) == message


def test_every_field_of_an_intervention_comes_through() -> None:
    message = service_pb2.InterveneResponse()
    fill(message, itertools.count(3))
    assert_full(message)
    record = _answers.intervention(message, message.request_id, {1: 2.0})
    assert (record.request_id, record.scales) == (message.request_id, {1: 2.0})
    message.ClearField("request_id")
    assert _fake_answers.intervention(record) == message


def test_every_field_of_a_contrast_comes_through() -> None:
    message = service_pb2.ContrastResponse()
    fill(message, itertools.count(3))
    assert_full(message)
    record = _answers.contrast(message, "r-1", None)
    assert record.request_id == "r-1"
    assert set(record.maps) == {"activation", "contribution"}
    message.ClearField("request_id")
    assert _fake_answers.contrast(record) == message


def test_what_was_not_measured_stays_absent_from_a_contrast() -> None:
    message = service_pb2.ContrastResponse()
    record = _answers.contrast(message, "", None)
    optional = {field.name for field in service_pb2.PlaneReport.DESCRIPTOR.fields if field.has_presence}
    assert len(optional) == 4
    assert all(getattr(record.plane, name) is None for name in optional)
    assert (record.flip_shift, record.shift_curve, record.concepts, record.maps) == (None, (), (), {})


def test_predictions_that_cannot_be_compared_are_refused() -> None:
    score = explanation_pb2.ClassScore
    for before, after in (([], []), ([score(index=1)], []), ([score(index=1)], [score(index=2)])):
        with pytest.raises(whence.DataLoss, match="same classes"):
            _answers.intervention(service_pb2.InterveneResponse(before=before, after=after), "", {})


def test_every_absent_field_stays_absent() -> None:
    message = explanation_pb2.Explanation(
        faithfulness=explanation_pb2.FaithfulnessReport(exactness=explanation_pb2.EXACTNESS_EXACT),
        concepts=[explanation_pb2.ConceptScore(maps=[explanation_pb2.Map(kind=explanation_pb2.MAP_KIND_ACTIVATION)])],
    )
    record = _answers.explanation(message, "", None)
    report = record.faithfulness
    optional = {field.name for field in explanation_pb2.FaithfulnessReport.DESCRIPTOR.fields if field.has_presence}
    assert len(optional) == 7
    assert all(getattr(report, name) is None for name in optional)
    assert record.unexplained is None
    assert record.parts is None
    found = record.concepts[0].maps["activation"]
    assert (found.class_token, found.colours) == (None, None)


def search_record(message: service_pb2.SearchConceptsResponse) -> whence.SearchResults:
    for found in message.concepts:
        found.concept.ClearField("counterfactuals")  # which are not sent with what is found
    return _answers.search(message, "text", "meaning")


def search_message(record: whence.SearchResults) -> Message:
    return _fake_answers.search(record, service_pb2.SearchConceptsRequest(limit=9, max_exemplars=9))


@pytest.mark.parametrize(
    ("message", "there", "back"),
    [
        (bank_pb2.Model(), _answers.model, _fake_answers.model),
        (bank_pb2.Bank(), _answers.bank, _fake_answers.bank),
        (service_pb2.GetConceptResponse(), _answers.concept, _fake_answers.concept),
        (service_pb2.SearchConceptsResponse(), search_record, search_message),
    ],
)
def test_every_field_of_the_inventory_comes_through(message: Message, there: Any, back: Any) -> None:
    fill(message, itertools.count(3))
    assert_full(message)
    assert back(there(message)) == message


def test_what_is_absent_of_names_stays_absent() -> None:
    assert _answers.bank(bank_pb2.Bank()).labelling is None
    assert not _fake_answers.bank(_answers.bank(bank_pb2.Bank(kind=1))).HasField("labelling")
    concept = _answers.concept(service_pb2.GetConceptResponse())
    assert (concept.naming, concept.named_by_person, concept.counterfactuals) == (None, False, ())
    assert not _fake_answers.concept(concept).concept.HasField("naming")


def test_whole_numbers_of_a_configuration_stay_whole() -> None:
    message = bank_pb2.Bank()
    message.configuration.update({"rank": 10, "rate": 0.5, "sizes": [1, 2]})
    configuration = _answers.bank(message).configuration
    assert configuration == {"rank": 10, "rate": 0.5, "sizes": [1, 2]}
    assert isinstance(configuration["rank"], int)


@pytest.mark.parametrize(
    ("enum", "numbers"),
    [
        (explanation_pb2.Order.DESCRIPTOR, _requests.ORDERS.values()),
        (explanation_pb2.Estimator.DESCRIPTOR, _requests.ESTIMATORS.values()),
        (explanation_pb2.MapKind.DESCRIPTOR, _requests.MAP_KINDS.values()),
        (explanation_pb2.MapSize.DESCRIPTOR, _requests.MAP_SIZES.values()),
        (explanation_pb2.InputMethod.DESCRIPTOR, _requests.INPUT_METHODS.values()),
        (explanation_pb2.ConceptScope.DESCRIPTOR, _requests.CONCEPT_SCOPES.values()),
        (explanation_pb2.Exactness.DESCRIPTOR, _answers.EXACTNESS),
        (bank_pb2.BankKind.DESCRIPTOR, _answers.BANK_KINDS),
    ],
)
def test_every_value_of_an_enum_has_a_name(enum: EnumDescriptor, numbers: Any) -> None:
    assert set(numbers) == {value.number for value in enum.values} - {0}


def test_values_from_a_newer_service_do_no_harm() -> None:
    assert _answers.bank(bank_pb2.Bank(kind=99)).kind == "unknown"  # type: ignore[arg-type]
    message = explanation_pb2.Explanation(
        concepts=[explanation_pb2.ConceptScore(maps=[explanation_pb2.Map(kind=99)])]  # type: ignore[arg-type]
    )
    assert _answers.explanation(message, "", None).concepts[0].maps == {}


@pytest.mark.parametrize(
    "broken",
    [
        explanation_pb2.Map(kind=1, height=2, width=3, data=b"\0" * 11),  # type: ignore[arg-type]
        explanation_pb2.Map(kind=1, encoding=explanation_pb2.MAP_ENCODING_PNG_OVERLAY),  # type: ignore[arg-type]
        explanation_pb2.Map(kind=1, encoding=3, height=2, width=3, data=b"\0" * 12),  # type: ignore[arg-type]
        explanation_pb2.Map(kind=1, encoding=99),  # type: ignore[arg-type]
        *(
            explanation_pb2.Map(kind=3, height=2, width=3, data=b"\0" * 12, colours=colours)  # type: ignore[arg-type]
            for colours in (
                b"no picture",
                picture("RGBA", (2, 3, 4))[:48],
                picture("RGBA", (3, 2, 4)),
                picture("RGB", (2, 3, 3)),
            )
        ),
    ],
)
def test_a_map_that_is_not_what_it_says_is_refused(broken: explanation_pb2.Map) -> None:
    message = explanation_pb2.Explanation(concepts=[explanation_pb2.ConceptScore(maps=[broken])])
    with pytest.raises(whence.DataLoss):
        _answers.explanation(message, "", None)


def test_every_option_reaches_the_request() -> None:
    question = _requests.question(
        bank="m/l/n@ab",
        target="tabby",
        top_k=3,
        order="activation",
        estimator="ablation",
        maps=("contribution", "input", "contribution"),
        map_size="image",
        substitute=False,
        colours=True,
        parts=True,
        input_method="gradient",
        concepts="all",
        priority="background",
    )
    assert question.bank == "m/l/n@ab"
    assert question.target == explanation_pb2.Target(name="tabby")
    options = question.options
    assert {field.name for field, _ in options.ListFields()} == {field.name for field in options.DESCRIPTOR.fields}
    assert options.top_k == 3
    assert options.order == explanation_pb2.ORDER_ACTIVATION
    assert options.estimator == explanation_pb2.ESTIMATOR_ABLATION
    assert list(options.maps) == [explanation_pb2.MAP_KIND_CONTRIBUTION, explanation_pb2.MAP_KIND_INPUT]
    assert options.map_size == explanation_pb2.MAP_SIZE_IMAGE
    assert options.substitute is False
    assert options.map_encoding == explanation_pb2.MAP_ENCODING_FLOAT32
    assert options.colours is True
    assert options.parts is True
    assert options.input_method == explanation_pb2.INPUT_METHOD_GRADIENT
    assert options.concepts == explanation_pb2.CONCEPT_SCOPE_ALL
    assert question.priority == service_pb2.PRIORITY_BACKGROUND


@pytest.mark.parametrize("encoding", [explanation_pb2.MAP_ENCODING_FLOAT16, explanation_pb2.MAP_ENCODING_FLOAT32])
def test_numbers_of_either_precision_are_read(encoding: explanation_pb2.MapEncoding) -> None:
    record = make_explanation()
    read = _answers.explanation(_fake_answers.explanation(record, encoding), "", None)
    half = encoding == explanation_pb2.MAP_ENCODING_FLOAT16
    for ours, theirs in zip(read.concepts, record.concepts, strict=True):
        for kind, expected in theirs.maps.items():
            values = expected.values.astype(np.float16) if half else expected.values
            assert np.array_equal(ours.maps[kind].values, values)
            assert ours.maps[kind].values.dtype == np.float32


def test_every_choice_of_a_contrast_reaches_the_request() -> None:
    pair = _requests.pair(
        bank="m/l/n@ab",
        target="tabby",
        other=3,
        top_k=3,
        order="activation",
        maps=("contribution", "activation", "contribution"),
        map_size="image",
        shift=False,
    )
    request = pair.request(_images.read(b"file"), "r-1", 1.5)
    assert {field.name for field, _ in request.ListFields()} == {field.name for field in request.DESCRIPTOR.fields}
    assert (request.request_id, request.image.encoded, request.bank) == ("r-1", b"file", "m/l/n@ab")
    assert (request.target.name, request.other.index, request.without_shift) == ("tabby", 3, True)
    assert request.deadline.ToMilliseconds() == 1500
    assert list(request.options.maps) == [explanation_pb2.MAP_KIND_CONTRIBUTION, explanation_pb2.MAP_KIND_ACTIVATION]


def test_maps_are_read_only_and_compare_by_value() -> None:
    message = explanation_pb2.Explanation()
    fill(message, itertools.count(3))
    one, same = _answers.explanation(message, "", None), _answers.explanation(message, "", None)
    assert one == same
    values = one.concepts[0].maps["activation"].values
    assert values.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1
    colours = one.concepts[0].maps["activation"].colours
    assert colours is not None
    assert (colours.dtype, colours.shape) == (np.uint8, (2, MAP_SIDE, 4))
    with pytest.raises(ValueError, match="read-only"):
        colours[0, 0] = 1
    token = one.concepts[0].maps["activation"].class_token
    for other in (
        whence.ConceptMap(values + 1, token, colours),
        whence.ConceptMap(values, token, 255 - colours),
        whence.ConceptMap(values, token),
        whence.ConceptMap(values, None, colours),
    ):
        assert other != one.concepts[0].maps["activation"]


def test_json_holds_every_field_but_the_image() -> None:
    message = explanation_pb2.Explanation()
    fill(message, itertools.count(3))
    record = _answers.explanation(message, "r", None)
    plain = _json._plain(record)
    assert set(plain) >= set(record.__slots__) - {"image"}
    assert np.shape(plain["concepts"][0]["maps"]["activation"]["values"]) == (2, MAP_SIDE)
    answer = service_pb2.ContrastResponse()
    fill(answer, itertools.count(3))
    answer.faithfulness.carried_share = float("nan")
    contrast = _answers.contrast(answer, "r", None)
    plain = _json._plain(contrast)
    assert set(plain) >= set(contrast.__slots__) - {"image"}
    assert np.shape(plain["maps"]["contribution"]["values"]) == (2, MAP_SIDE)
    assert plain["faithfulness"]["carried_share"] is None
    assert "null" in _json.dumps(whence.Exemplar(b"a", "s", whence.Box(0, 0, 1, 1), float("nan")))
