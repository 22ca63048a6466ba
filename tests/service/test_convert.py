"""Between wire and domain: nothing is lost, nothing unknown passes."""

from __future__ import annotations

import dataclasses
import io
import typing

import numpy as np
import pytest
from PIL import Image

from concepts import explanation as domain
from concepts.bank import Bank, Concept, Exemplar, Naming
from concepts.contrast.records import Contrast, ContrastRequest, PlaneReport
from concepts.errors import InvalidInput, UnknownClass, UnsupportedOption
from concepts.intervention import Intervention, InterventionRequest
from concepts.model import ModelSpec
from concepts.preprocessing import Box, Preprocessing
from concepts.repository import BankSummary, BankVersion
from service import convert
from service.search import Query
from service.settings import Limits, Settings
from whence.v1 import bank_pb2, explanation_pb2
from whence.v1 import explanation_service_pb2 as service_pb2

SPEC = ModelSpec("m", "demo.x:y", Preprocessing(20, 30), ("cat", "dog"), "w" * 64)
VIEW = np.zeros((20, 30, 3), np.uint8)
BOX = Box(1, 2, 31, 22)


ENUMS: dict[str, tuple[str, typing.Any]] = {
    "exactness": ("exactness", explanation_pb2.Exactness),
    "estimator": ("estimator", explanation_pb2.Estimator),
    "method": ("input_method", explanation_pb2.InputMethod),
    "scope": ("concept_scope", explanation_pb2.ConceptScope),
}
"""Of fields: what the names of their values begin with, and the enumeration."""


def make(cls: type, numbers: typing.Iterator[int], within: type | None = None) -> typing.Any:
    """Fill every field of a record with a value of its own, so that mixed up fields show.

    Records within their like have none of it within themselves.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, object] = {}
    for field in dataclasses.fields(cls):
        number = next(numbers)
        hint = hints[field.name]
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        plain = (options or [hint])[0]
        if typing.get_origin(hint) is typing.Literal:
            values[field.name] = options[number % len(options)]
        elif typing.get_origin(hint) is tuple:
            count = 0 if plain is cls is within else 3
            values[field.name] = tuple(value_of(plain, next(numbers), numbers, cls) for _ in range(count))
        elif typing.get_origin(hint) is dict:
            grids = {kind: np.full((4, 6), next(numbers) + 0.5, np.float32) for kind in ("contribution", "activation")}
            maps = {kind: domain.ConceptMap(grid, 0.25) for kind, grid in grids.items()}
            values[field.name] = maps | {"input": input_map(next(numbers))}
        else:
            values[field.name] = value_of(plain, number, numbers, cls)
    return cls(**values)


def value_of(kind: typing.Any, number: int, numbers: typing.Iterator[int], within: type) -> typing.Any:
    """Return a record, or a plain value made of a number."""
    if dataclasses.is_dataclass(kind):
        return make(typing.cast("type", kind), numbers, within)
    return {float: number + 0.25, int: number, str: f"text {number}", bool: True}[kind]


def input_map(seed: int) -> domain.ConceptMap:
    """Values that half precision cannot hold, and colours, for every pixel."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(0, 256, (*VIEW.shape[:2], 4), np.uint8)
    return domain.ConceptMap(generator.normal(size=VIEW.shape[:2]).astype(np.float32), None, colours)


@pytest.fixture
def explanation() -> domain.Explanation:
    return typing.cast("domain.Explanation", make(domain.Explanation, iter(range(1, 10_000))))


def compare(record: typing.Any, message: typing.Any, path: str = "") -> int:
    """Check that a record and its message hold the same, field by field of equal name; return how many."""
    seen = 0
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), field.name
        if name in ("model", "bank", "model_digest", "bank_digest", "stages", "maps", "batch_size"):
            continue
        theirs = getattr(message, name)
        if dataclasses.is_dataclass(value):
            seen += compare(value, theirs, f"{path}.{name}")
        elif isinstance(value, tuple):
            assert len(value) == len(theirs), f"{path}.{name}"
            for one, other in zip(value, theirs, strict=True):
                if dataclasses.is_dataclass(one):
                    seen += compare(one, other, f"{path}.{name}")
                else:
                    assert one == other, f"{path}.{name}"
                    seen += 1
        elif name in ENUMS:
            prefix, enum = ENUMS[name]
            assert enum.Name(theirs) == f"{prefix}_{value}".upper()
            seen += 1
        else:
            assert value == theirs, f"{path}.{name}"
            seen += 1
    return seen


def test_every_field_of_an_explanation_arrives(explanation: domain.Explanation) -> None:
    message = convert.explanation_to(explanation, view=VIEW, box=BOX, encoding="float16")
    assert compare(explanation, message) > 45
    assert (message.model.name, message.model.digest) == (explanation.model, explanation.model_digest)
    assert (message.bank.reference, message.bank.digest) == (explanation.bank, explanation.bank_digest)
    assert (message.view.left, message.view.top, message.view.right, message.view.bottom) == BOX
    for stage in ("trunk_ms", "head_ms", "codes_ms", "explain_ms", "batch_size"):
        assert getattr(message.timings, stage) == getattr(explanation.stages, stage)
    for score, theirs in zip(explanation.concepts, message.concepts, strict=True):
        compare_maps(score.maps, theirs.maps)


def compare_maps(maps: dict[domain.MapKind, domain.ConceptMap], messages: typing.Any) -> None:
    """Check that maps arrive in half precision."""
    for (kind, values), sent in zip(maps.items(), messages, strict=True):
        assert explanation_pb2.MapKind.Name(sent.kind) == f"MAP_KIND_{kind.upper()}"
        assert (sent.height, sent.width) == values.values.shape
        assert sent.encoding == explanation_pb2.MAP_ENCODING_FLOAT16
        decoded = np.frombuffer(sent.data, "<f2").reshape(sent.height, sent.width)
        assert np.array_equal(decoded, values.values.astype(np.float16))
        assert (sent.class_token if sent.HasField("class_token") else None) == values.class_token


@pytest.mark.parametrize(("encoding", "dtype"), [("float16", "<f2"), ("float32", "<f4"), ("overlay", None)])
def test_colours_come_beside_the_values(
    explanation: domain.Explanation, encoding: convert.MapEncoding, dtype: str | None
) -> None:
    message = convert.explanation_to(explanation, view=VIEW, box=BOX, encoding=encoding)
    for score, theirs in zip(explanation.concepts, message.concepts, strict=True):
        for (kind, expected), sent in zip(score.maps.items(), theirs.maps, strict=True):
            assert bool(sent.colours) == (kind == "input")
            if expected.colours is not None:
                with Image.open(io.BytesIO(sent.colours)) as picture:
                    assert (picture.format, picture.mode) == ("PNG", "RGBA")
                    assert np.array_equal(picture, expected.colours)
            if dtype is not None:
                decoded = np.frombuffer(sent.data, dtype).reshape(sent.height, sent.width)
                assert np.array_equal(decoded, expected.values.astype(dtype))
                assert np.array_equal(decoded, expected.values) or encoding == "float16"


def test_every_field_of_a_contrast_arrives() -> None:
    contrast = make(Contrast, iter(range(1, 10_000)))
    message = convert.contrast_to(contrast, view=VIEW, box=BOX, encoding="float16")
    # Two classes, three contributions, concepts, report, plane, flip, curve, runtime.
    concepts = 3 * (1 + 3) * (9 + 3)  # each with three words and three parts
    assert compare(contrast, message) == 2 * 4 + 3 + concepts + 16 + 6 + 1 + 3 * 3 + 1
    known = {field.name for field in message.DESCRIPTOR.fields} - {"request_id"}  # which the ingress sets
    assert {field.name for field, _ in message.ListFields()} == known
    assert (message.model.name, message.model.digest) == (contrast.model, contrast.model_digest)
    assert (message.bank.reference, message.bank.digest) == (contrast.bank, contrast.bank_digest)
    assert (message.view.left, message.view.top, message.view.right, message.view.bottom) == BOX
    assert message.timings == explanation_pb2.Timings(**dataclasses.asdict(contrast.stages))
    compare_maps(contrast.maps, message.maps)
    for score, theirs in zip(contrast.concepts, message.concepts, strict=True):
        compare_maps(score.maps, theirs.maps)


def test_what_a_contrast_does_not_know_stays_absent() -> None:
    contrast = make(Contrast, iter(range(1, 10_000)))
    bare = dataclasses.replace(contrast, plane=PlaneReport(3, 4), flip_shift=None, shift_curve=())
    message = convert.contrast_to(bare, view=VIEW, box=BOX, encoding="float16")
    assert not message.HasField("flip_shift")
    assert not message.shift_curve
    assert [field.name for field, _ in message.plane.ListFields()] == ["target_images", "other_images"]
    nothing = dataclasses.replace(contrast, flip_shift=0.0, plane=PlaneReport(0, 0, 0.0))
    message = convert.contrast_to(nothing, view=VIEW, box=BOX, encoding="float16")
    assert message.HasField("flip_shift")
    assert message.plane.HasField("accuracy")


def test_every_choice_of_a_contrast_arrives() -> None:
    message = service_pb2.ContrastRequest(
        target=explanation_pb2.Target(index=0),
        other=explanation_pb2.Target(name="dog"),
        options=explanation_pb2.ExplainOptions(top_k=2, maps=[explanation_pb2.MAP_KIND_ACTIVATION]),
        without_shift=True,
    )
    options = domain.ExplainOptions(top_k=2, maps=("activation",))
    assert convert.contrast_from(message, SPEC, top_k_limit=9) == ContrastRequest(0, 1, options, shift=False)
    assert convert.contrast_from(service_pb2.ContrastRequest(), SPEC, top_k_limit=99) == ContrastRequest()
    for field in ("target", "other"):
        with pytest.raises(UnknownClass):
            convert.contrast_from(service_pb2.ContrastRequest(**{field: {"index": 2}}), SPEC, top_k_limit=9)
    with pytest.raises(InvalidInput, match="top_k"):
        convert.contrast_from(message, SPEC, top_k_limit=1)


def test_every_field_of_an_intervention_arrives() -> None:
    intervention = make(Intervention, iter(range(1, 10_000)))
    message = convert.intervention_to(intervention)
    assert compare(intervention, message) == 7 * 4 + 1
    assert (message.model.name, message.model.digest) == (intervention.model, intervention.model_digest)
    assert (message.bank.reference, message.bank.digest) == (intervention.bank, intervention.bank_digest)
    assert message.timings == explanation_pb2.Timings(**dataclasses.asdict(intervention.stages))


def test_every_scale_arrives() -> None:
    request = service_pb2.InterveneRequest(scales={0: 0.0, 7: -1.5}, target=explanation_pb2.Target(name="dog"))
    request.concepts = explanation_pb2.CONCEPT_SCOPE_ALL
    assert convert.intervention_from(request, SPEC, scales_limit=2) == InterventionRequest(1, {0: 0.0, 7: -1.5}, "all")
    assert convert.intervention_from(service_pb2.InterveneRequest(), SPEC, scales_limit=2) == InterventionRequest()
    with pytest.raises(InvalidInput, match="at most 1"):
        convert.intervention_from(request, SPEC, scales_limit=1)


def test_what_is_absent_stays_absent(explanation: domain.Explanation) -> None:
    report = domain.FaithfulnessReport(2.5, 0.5, 0.0, "exact", "because")
    bare = dataclasses.replace(explanation, unexplained=None, faithfulness=report, parts=None)
    message = convert.explanation_to(bare, view=VIEW, box=BOX, encoding="float16")
    assert not message.HasField("unexplained")
    assert not message.HasField("parts")
    optional = [field.name for field in dataclasses.fields(report) if getattr(report, field.name) is None]
    assert len(optional) == 7
    assert not any(message.faithfulness.HasField(name) for name in optional)
    assert message.faithfulness.constant == 0.0


def test_overlays_have_the_size_of_the_view(explanation: domain.Explanation) -> None:
    message = convert.explanation_to(explanation, view=VIEW, box=BOX, encoding="overlay")
    sent = message.concepts[0].maps[0]
    assert (sent.height, sent.width, sent.encoding) == (20, 30, explanation_pb2.MAP_ENCODING_PNG_OVERLAY)
    assert sent.data.startswith(b"\x89PNG")


def test_values_beyond_half_precision_do_not_become_infinite(explanation: domain.Explanation) -> None:
    huge = domain.ConceptMap(np.array([[1e9, -1e9]], np.float32))
    score = dataclasses.replace(explanation.concepts[0], maps={"activation": huge})
    message = convert.explanation_to(
        dataclasses.replace(explanation, concepts=(score,)), view=VIEW, box=BOX, encoding="float16"
    )
    sent = message.concepts[0].maps[0]
    assert np.frombuffer(sent.data, "<f2").tolist() == [65504.0, -65504.0]
    assert not sent.HasField("class_token")


def test_an_empty_message_means_the_defaults() -> None:
    assert convert.options_from(explanation_pb2.ExplainOptions(), top_k_limit=100) == domain.ExplainOptions()
    assert convert.options_from(explanation_pb2.ExplainOptions(), top_k_limit=3).top_k == 3
    assert convert.encoding_from(explanation_pb2.ExplainOptions()) == "float16"


def test_every_option_arrives() -> None:
    message = explanation_pb2.ExplainOptions(
        top_k=3,
        order=explanation_pb2.ORDER_ACTIVATION,
        estimator=explanation_pb2.ESTIMATOR_INTEGRATED,
        maps=[explanation_pb2.MAP_KIND_INPUT, explanation_pb2.MAP_KIND_ACTIVATION, explanation_pb2.MAP_KIND_INPUT],
        map_size=explanation_pb2.MAP_SIZE_IMAGE,
        map_encoding=explanation_pb2.MAP_ENCODING_PNG_OVERLAY,
        substitute=False,
        colours=True,
        parts=True,
        input_method=explanation_pb2.INPUT_METHOD_SMOOTHGRAD,
        concepts=explanation_pb2.CONCEPT_SCOPE_ALL,
    )
    assert {field.name for field, _ in message.ListFields()} == {field.name for field in message.DESCRIPTOR.fields}
    expected = domain.ExplainOptions(
        3, "activation", "integrated", ("input", "activation"), "image", False, True, True, "smoothgrad", "all"
    )
    assert convert.options_from(message, top_k_limit=100) == expected
    assert convert.encoding_from(message) == "overlay"


def test_every_value_of_every_enumeration_has_a_meaning() -> None:
    for field, enum in (
        ("order", explanation_pb2.Order),
        ("estimator", explanation_pb2.Estimator),
        ("map_size", explanation_pb2.MapSize),
        ("input_method", explanation_pb2.InputMethod),
        ("concepts", explanation_pb2.ConceptScope),
    ):
        for value in enum.values():
            convert.options_from(explanation_pb2.ExplainOptions(**{field: value}), top_k_limit=9)
    for value in explanation_pb2.MapEncoding.values():
        convert.encoding_from(explanation_pb2.ExplainOptions(map_encoding=value))
    for value in explanation_pb2.MapKind.values():
        if value:
            convert.options_from(explanation_pb2.ExplainOptions(maps=[value]), top_k_limit=9)
    priorities = [convert.priority_from(service_pb2.ExplainRequest(priority=v)) for v in service_pb2.Priority.values()]
    assert priorities == ["interactive", "interactive", "background"]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 0},
        {"top_k": 101},
        {"top_k": 10**6},
        {"order": 99},
        {"estimator": 99},
        {"maps": [99]},
        {"maps": [0]},
        {"map_size": 99},
        {"input_method": 99},
        {"concepts": 99},
    ],
)
def test_unknown_or_excessive_options_are_refused(fields: dict[str, typing.Any]) -> None:
    with pytest.raises(InvalidInput) as refusal:
        convert.options_from(explanation_pb2.ExplainOptions(**fields), top_k_limit=100)
    assert next(iter(fields)) in refusal.value.message


def test_targets() -> None:
    target = explanation_pb2.Target
    assert convert.target_from(target(), SPEC) is None
    assert convert.target_from(target(index=0), SPEC) == 0
    assert convert.target_from(target(name="dog"), SPEC) == 1
    for wrong in (target(index=2), target(index=2**32 - 1), target(name="cow"), target(name="")):
        with pytest.raises(UnknownClass):
            convert.target_from(wrong, SPEC)


def test_answers_that_would_be_too_large_are_refused_before_they_are_computed() -> None:
    options = domain.ExplainOptions(top_k=10, maps=("activation",), map_size="image")
    convert.check_reply_size(options, SPEC, encoding="float16", limit=12_000)
    for limit, encoding in ((11_999, "float16"), (17_999, "overlay"), (23_999, "float32")):
        with pytest.raises(UnsupportedOption, match="fewer concepts"):
            convert.check_reply_size(options, SPEC, encoding=encoding, limit=limit)
    convert.check_reply_size(domain.ExplainOptions(top_k=10, maps=("activation",)), SPEC, encoding="float16", limit=1)


def test_parts_count_towards_the_size_of_an_answer() -> None:
    options = domain.ExplainOptions(top_k=10, maps=("activation",), map_size="image", parts=True)
    convert.check_reply_size(options, SPEC, encoding="float16", limit=48_000, parts=3)
    with pytest.raises(UnsupportedOption, match="10 concepts and their parts with maps of 600 pixels may take 48000"):
        convert.check_reply_size(options, SPEC, encoding="float16", limit=47_999, parts=3)
    inputs = dataclasses.replace(options, maps=("input",))  # which parts do not have
    convert.check_reply_size(inputs, SPEC, encoding="float16", limit=12_000, parts=3)


def test_the_plane_counts_towards_the_size_of_an_answer() -> None:
    options = domain.ExplainOptions(top_k=10, maps=("activation", "contribution"), map_size="image")
    convert.check_reply_size(options, SPEC, encoding="float16", limit=26_400, planes=1)
    with pytest.raises(UnsupportedOption, match="10 concepts and the plane with maps of 600 pixels may take 26400"):
        convert.check_reply_size(options, SPEC, encoding="float16", limit=26_399, planes=1)


@pytest.mark.parametrize(
    ("maps", "encoding", "colours", "bytes_a_pixel"),
    [
        (("input",), "float16", False, 2),
        (("input",), "float32", False, 4),
        (("input",), "overlay", False, 3),
        (("input",), "float32", True, 8),
        (("activation", "input"), "float32", True, 8),  # the former is on the grid
        (("activation", "input"), "overlay", True, 10),
    ],
)
def test_input_maps_have_the_size_of_the_image(
    maps: tuple[domain.MapKind, ...], encoding: convert.MapEncoding, colours: bool, bytes_a_pixel: int
) -> None:
    options = domain.ExplainOptions(top_k=10, maps=maps, colours=colours)
    assert convert.has_image_size("input", options, encoding)
    needed = 10 * 20 * 30 * bytes_a_pixel
    convert.check_reply_size(options, SPEC, encoding=encoding, limit=needed)
    with pytest.raises(UnsupportedOption, match=f"take {needed} bytes"):
        convert.check_reply_size(options, SPEC, encoding=encoding, limit=needed - 1)


def test_models_banks_and_concepts() -> None:
    model = convert.model_to(SPEC)
    assert (model.name, model.digest, list(model.class_names)) == ("m", "w" * 64, ["cat", "dog"])
    assert (model.input_height, model.input_width) == (20, 30)

    manifest = {
        "kind": "nmf",
        "concept_count": 2,
        "channels": 8,
        "weights_digest": "w",
        "metrics": {"error": 0.5, "classes": {"cat": 1}},
        "configuration": {"seed": 3, "layers": ["a", None]},
    }
    summary = BankSummary(BankVersion("m", "l", "n", "d" * 64), manifest, 86_400.0)
    bank = convert.bank_to(summary)
    assert (bank.reference, bank.kind, bank.concept_count) == ("m/l/n", bank_pb2.BANK_KIND_NMF, 2)
    assert bank.created == "1970-01-02T00:00:00+00:00"
    assert bank.metrics["classes"]["cat"] == 1
    assert bank.configuration["seed"] == 3

    exemplar = Exemplar("exemplars/a.webp", "cat/1.jpg", Box(0, 1, 2, 3), 0.5)
    concept = Concept(1, "ear", 1, {"importance": 0.25}, (exemplar, exemplar), parent=0)
    owner = Bank("nmf", "m", "l", "n", "w", 8, (Concept(0), concept), {})
    message = convert.concept_to(owner, concept, {"exemplars/a.webp": b"webp"}, SPEC)
    assert (message.id, message.label, message.class_index, message.class_name) == (1, "ear", 1, "dog")
    assert dict(message.statistics) == {"importance": 0.25}
    assert [each.picture for each in message.exemplars] == [b"webp"] * 2
    assert (message.exemplars[0].source, message.exemplars[0].box.bottom) == ("cat/1.jpg", 3)
    assert (message.parent, message.layer, list(message.children)) == (0, "l", [])
    assert (bank.parts_layer, bank.part_count) == ("", 0)
    bare = convert.concept_to(owner, Concept(0), {}, SPEC)
    assert not bare.HasField("class_index")
    assert (bare.HasField("other_index"), bare.other_name) == (False, "")
    contrasted = convert.concept_to(owner, Concept(0, class_index=1, other_index=0), {}, SPEC)
    assert (contrasted.class_name, contrasted.HasField("other_index"), contrasted.other_name) == ("dog", True, "cat")


def test_banks_and_concepts_with_parts() -> None:
    manifest = {
        "kind": "nmf",
        "concept_count": 2,
        "channels": 8,
        "weights_digest": "w",
        "metrics": {},
        "configuration": {},
        "parts": {"kind": "nmf", "layer": "early", "channels": 4, "concept_count": 3, "most": 2},
    }
    bank = convert.bank_to(BankSummary(BankVersion("m", "l", "n", "d" * 64), manifest, 0.0))
    assert (bank.layer, bank.concept_count, bank.parts_layer, bank.part_count) == ("l", 2, "early", 3)
    parts = tuple(Concept(index, f"part {index}", parent=parent) for index, parent in enumerate((0, 1, 1)))
    tree = Bank("nmf", "m", "l", "n", "w", 8, (Concept(0), Concept(1)), {}).with_parts("nmf", "early", 4, parts, {})
    whole, part = (convert.concept_to(tree, tree.concept(id_), {}, SPEC) for id_ in (1, 4))
    assert (whole.layer, list(whole.children), whole.HasField("parent")) == ("l", [3, 4], False)
    assert (part.id, part.label, part.layer, list(part.children), part.parent) == (4, "part 2", "early", [], 1)


def test_names_and_counterfactuals_arrive() -> None:
    naming = make(Naming, iter(range(1, 1_000)))
    crops = [Exemplar(f"exemplars/{n}.webp", f"{n}.jpg", Box(n, 1, 2, 3), n + 0.5) for n in range(3)]
    concept = Concept(0, "ear", None, {}, (crops[0],), None, None, True, naming, (crops[1], crops[2]))
    owner = Bank("subspace", "m", "l", "n", "w", 8, (concept,), {})
    message = convert.concept_to(owner, concept, {crop.file: crop.file.encode() for crop in crops}, SPEC)
    assert compare(naming, message.naming) == 4 + 2 * 3 * 2
    assert {field.name for field, _ in message.naming.ListFields()} == {
        field.name for field in message.naming.DESCRIPTOR.fields
    }
    assert message.named_by_person
    assert [each.picture for each in message.exemplars] == [b"exemplars/0.webp"]
    assert [each.picture for each in message.counterfactuals] == [b"exemplars/1.webp", b"exemplars/2.webp"]
    assert [(each.source, each.activation, each.box.left) for each in message.counterfactuals] == [
        ("1.jpg", 1.5, 1),
        ("2.jpg", 2.5, 2),
    ]
    bare = convert.concept_to(owner, Concept(0), {}, SPEC)
    assert (bare.HasField("naming"), bare.named_by_person, len(bare.counterfactuals)) == (False, False, 0)


def test_how_a_bank_was_named_arrives() -> None:
    manifest = {
        "kind": "subspace",
        "concept_count": 2,
        "channels": 8,
        "weights_digest": "w",
        "metrics": {},
        "configuration": {},
        "labelling": {"clip": {"name": "c", "digest": "d"}, "vocabulary": {"captions": 7, "digest": "e"}},
    }
    bank = convert.bank_to(BankSummary(BankVersion("m", "l", "n", "d" * 64), manifest, 0.0))
    assert bank.kind == bank_pb2.BANK_KIND_SUBSPACE
    assert bank.labelling == bank_pb2.Labelling(clip="c", clip_digest="d", captions=7)
    del manifest["labelling"]
    assert not convert.bank_to(BankSummary(BankVersion("m", "l", "n", "d" * 64), manifest, 0.0)).HasField("labelling")


def test_every_choice_of_a_search_arrives() -> None:
    message = service_pb2.SearchConceptsRequest
    assert convert.query_from(message(text=" a ring\n"), limit=99) == Query("a ring", "meaning", 10)
    assert convert.query_from(message(text="x"), limit=3).limit == 3
    for value, by in ((0, "meaning"), (1, "meaning"), (2, "label")):
        query = convert.query_from(message(text="x" * 1000, by=value, limit=3), limit=3)
        assert query == Query("x" * 1000, by, 3)
    assert set(service_pb2.SearchBy.values()) == {0, 1, 2}
    for wrong in (message(), message(text="x", by=3), message(text="x", limit=0), message(text="x", limit=4)):
        with pytest.raises(InvalidInput):
            convert.query_from(wrong, limit=3)


def test_what_the_server_accepts_arrives() -> None:
    limits = Limits(
        request_bytes=2**21,
        reply_bytes=2**22,
        pixels=2**33,
        image_formats=("PNG", "GIF"),
        top_k=7,
        scales=8,
        stream_in_flight=9,
        deadline_s=12.5,
    )
    message = convert.server_info_to(Settings(repository="x", limits=limits, default_deadline_s=2.25), "1.2.3")
    assert message.version == "1.2.3"
    assert message.contract_revision == max(service_pb2.ContractRevision.values()) >= 1
    sent = message.limits
    for field in sent.DESCRIPTOR.fields:
        if field.message_type is None:
            value = getattr(sent, field.name)
            assert (tuple(value) if field.is_repeated else value) == getattr(limits, field.name), field.name
    assert (sent.deadline.ToNanoseconds(), sent.default_deadline.ToNanoseconds()) == (12_500_000_000, 2_250_000_000)
    assert len(sent.DESCRIPTOR.fields) == len(sent.ListFields()), "a limit was not filled in"
