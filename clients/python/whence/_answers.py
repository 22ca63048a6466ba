"""Messages of the wire contract, made into the SDK's records."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from whence import _requests, _status
from whence._contrast import Contrast, PlaneReport, ShiftPoint
from whence._errors import DataLoss, missing_extra
from whence._explanation import (
    Box,
    ClassScore,
    ConceptMap,
    ConceptScope,
    ConceptScore,
    Estimator,
    Exactness,
    Explanation,
    FaithfulnessReport,
    InputMapReport,
    InputMethod,
    MapKind,
    PartsReport,
    Timings,
)
from whence._images import Source
from whence._intervention import Intervention
from whence._inventory import Bank, BankKind, Concept, Exemplar, Labelling, Model, Naming, Word
from whence._search import FoundConcept, SearchBy, SearchResults, UnsearchedBank
from whence._server_info import Limits, ServerInfo
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as service_pb2

if TYPE_CHECKING:
    from google.protobuf.struct_pb2 import Struct, Value

EXACTNESS: dict[int, Exactness] = {
    explanation_pb2.EXACTNESS_EXACT: "exact",
    explanation_pb2.EXACTNESS_FIRST_ORDER: "first_order",
}
BANK_KINDS: dict[int, BankKind] = {
    bank_pb2.BANK_KIND_SAE: "sae",
    bank_pb2.BANK_KIND_NMF: "nmf",
    bank_pb2.BANK_KIND_CONTRAST: "contrast",
    bank_pb2.BANK_KIND_SUBSPACE: "subspace",
}
ESTIMATORS = {number: cast(Estimator, name) for name, number in _requests.ESTIMATORS.items()}
INPUT_METHODS = {number: cast(InputMethod, name) for name, number in _requests.INPUT_METHODS.items()}
CONCEPT_SCOPES = {number: cast(ConceptScope, name) for name, number in _requests.CONCEPT_SCOPES.items()}
MAP_KINDS = {number: cast(MapKind, name) for name, number in _requests.MAP_KINDS.items()}
MAP_NUMBERS: dict[int, str] = {
    explanation_pb2.MAP_ENCODING_UNSPECIFIED: "<f2",
    explanation_pb2.MAP_ENCODING_FLOAT16: "<f2",
    explanation_pb2.MAP_ENCODING_FLOAT32: "<f4",
}
"""How numpy calls the numbers of a map, by its encoding."""


def explanation(message: explanation_pb2.Explanation, request_id: str, source: Source | None) -> Explanation:
    """The record of an explanation.

    Raises
    ------
    DataLoss
        If a map does not have the size that it names.
    MissingExtra
        If colours came and Pillow is not installed.
    """
    return Explanation(
        request_id=request_id,
        model=message.model.name,
        model_digest=message.model.digest,
        bank=message.bank.reference,
        bank_digest=message.bank.digest,
        predictions=tuple(map(_class_score, message.predictions)),
        target=_class_score(message.target),
        concepts=tuple(map(_concept_score, message.concepts)),
        unexplained=_optional(message, "unexplained"),
        contributions_total=message.contributions_total,
        faithfulness=_faithfulness(message.faithfulness),
        timings=_timings(message.timings),
        view=_box(message.view),
        runtime=message.runtime,
        estimator=ESTIMATORS.get(message.estimator, "gradient"),
        substitute=message.substitute,
        scope=CONCEPT_SCOPES.get(message.scope, "target"),
        image=source,
        parts=_parts(message.parts) if message.HasField("parts") else None,
    )


def intervention(message: service_pb2.InterveneResponse, request_id: str, scales: Mapping[int, float]) -> Intervention:
    """The record of an intervention.

    Raises
    ------
    DataLoss
        If the predictions before and after are not of the same classes.
    """
    before, after = (tuple(map(_class_score, scores)) for scores in (message.before, message.after))
    if not before or {score.index for score in before} != {score.index for score in after}:
        raise DataLoss("The predictions before and after do not name the same classes.", reason="BAD_ANSWER")
    return Intervention(
        request_id=request_id,
        model=message.model.name,
        model_digest=message.model.digest,
        bank=message.bank.reference,
        bank_digest=message.bank.digest,
        scales=scales,
        target=_class_score(message.target),
        before=before,
        after=after,
        timings=_timings(message.timings),
        runtime=message.runtime,
    )


def contrast(message: service_pb2.ContrastResponse, request_id: str, source: Source | None) -> Contrast:
    """The record of a contrast.

    Raises
    ------
    DataLoss
        If a map does not have the size that it names.
    """
    return Contrast(
        request_id=request_id,
        model=message.model.name,
        model_digest=message.model.digest,
        bank=message.bank.reference,
        bank_digest=message.bank.digest,
        target=_class_score(message.target),
        other=_class_score(message.other),
        contribution=message.contribution,
        contribution_for_target=message.contribution_for_target,
        contribution_for_other=message.contribution_for_other,
        maps=_maps(message.maps),
        concepts=tuple(map(_concept_score, message.concepts)),
        faithfulness=_faithfulness(message.faithfulness),
        plane=_plane(message.plane),
        flip_shift=_optional(message, "flip_shift"),
        shift_curve=tuple(map(_shift_point, message.shift_curve)),
        timings=_timings(message.timings),
        view=_box(message.view),
        runtime=message.runtime,
        image=source,
    )


def model(message: bank_pb2.Model) -> Model:
    """The record of a model."""
    return Model(
        name=message.name,
        digest=message.digest,
        architecture=message.architecture,
        class_names=tuple(message.class_names),
        input_height=message.input_height,
        input_width=message.input_width,
    )


def bank(message: bank_pb2.Bank) -> Bank:
    """The record of a bank."""
    return Bank(
        reference=message.reference,
        digest=message.digest,
        kind=BANK_KINDS.get(message.kind, "unknown"),
        model=message.model,
        layer=message.layer,
        name=message.name,
        concept_count=message.concept_count,
        channels=message.channels,
        weights_digest=message.weights_digest,
        created=message.created,
        metrics=_struct(message.metrics),
        configuration=_struct(message.configuration),
        parts_layer=message.parts_layer,
        part_count=message.part_count,
        labelling=_labelling(message.labelling) if message.HasField("labelling") else None,
    )


def concept(answer: service_pb2.GetConceptResponse) -> Concept:
    """The record of a concept."""
    return _concept(answer.concept, answer.bank)


def search(answer: service_pb2.SearchConceptsResponse, text: str, by: SearchBy) -> SearchResults:
    """The record of a search for a text."""
    return SearchResults(
        text=text,
        by=by,
        found=tuple(FoundConcept(_concept(each.concept, each.bank), each.score) for each in answer.concepts),
        unsearched=tuple(UnsearchedBank(each.reference, each.reason) for each in answer.unsearched),
    )


def server_info(answer: service_pb2.GetServerInfoResponse) -> ServerInfo:
    """The record of a server's version and limits."""
    limits = answer.limits
    return ServerInfo(
        version=answer.version,
        contract_revision=answer.contract_revision,
        limits=Limits(
            request_bytes=limits.request_bytes,
            reply_bytes=limits.reply_bytes,
            pixels=limits.pixels,
            image_formats=tuple(limits.image_formats),
            top_k=limits.top_k,
            scales=limits.scales,
            stream_in_flight=limits.stream_in_flight,
            deadline_s=_status.seconds(limits.deadline),
            default_deadline_s=_status.seconds(limits.default_deadline),
        ),
    )


def _concept(message: bank_pb2.Concept, version: explanation_pb2.BankVersion) -> Concept:
    return Concept(
        id=message.id,
        label=message.label,
        class_index=_optional(message, "class_index"),
        class_name=message.class_name,
        statistics=dict(message.statistics),
        exemplars=tuple(map(_exemplar, message.exemplars)),
        parent=_optional(message, "parent"),
        bank=version.reference,
        bank_digest=version.digest,
        layer=message.layer,
        children=tuple(message.children),
        other_index=_optional(message, "other_index"),
        other_name=message.other_name,
        named_by_person=message.named_by_person,
        naming=_naming(message.naming) if message.HasField("naming") else None,
        counterfactuals=tuple(map(_exemplar, message.counterfactuals)),
    )


def _naming(message: bank_pb2.Naming) -> Naming:
    return Naming(
        label=message.label,
        score=message.score,
        weak=message.weak,
        words=_words(message.words),
        phrases=_words(message.phrases),
        counterfactuals=message.counterfactuals,
    )


def _words(messages: Iterable[bank_pb2.Word]) -> tuple[Word, ...]:
    return tuple(Word(message.text, message.score) for message in messages)


def _labelling(message: bank_pb2.Labelling) -> Labelling:
    return Labelling(clip=message.clip, clip_digest=message.clip_digest, captions=message.captions)


def _class_score(message: explanation_pb2.ClassScore) -> ClassScore:
    return ClassScore(index=message.index, name=message.name, logit=message.logit, probability=message.probability)


def _concept_score(message: explanation_pb2.ConceptScore) -> ConceptScore:
    return ConceptScore(
        id=message.id,
        label=message.label,
        activation=message.activation,
        peak=message.peak,
        contribution=message.contribution,
        share=message.share,
        maps=_maps(message.maps),
        class_index=_optional(message, "class_index"),
        class_name=message.class_name,
        parts=tuple(map(_concept_score, message.parts)),
        weak_label=message.weak_label,
        words=tuple(message.words),
    )


def _parts(message: explanation_pb2.PartsReport) -> PartsReport:
    return PartsReport(
        layer=message.layer,
        contributions_total=message.contributions_total,
        unexplained=_optional(message, "unexplained"),
        faithfulness=_faithfulness(message.faithfulness),
    )


def _maps(messages: Iterable[explanation_pb2.Map]) -> dict[MapKind, ConceptMap]:
    """Maps of the kinds that this version of the SDK has heard of."""
    return {MAP_KINDS[item.kind]: _concept_map(item) for item in messages if item.kind in MAP_KINDS}


def _concept_map(message: explanation_pb2.Map) -> ConceptMap:
    numbers = MAP_NUMBERS.get(message.encoding)
    if numbers is None:
        raise DataLoss("The service sent a map as a picture, which was not asked for.", reason="BAD_ANSWER")
    expected = message.height * message.width * np.dtype(numbers).itemsize
    if len(message.data) != expected:
        raise DataLoss(
            f"A map of {message.height}×{message.width} came with {len(message.data)} bytes, not {expected}.",
            reason="BAD_ANSWER",
        )
    values = np.frombuffer(message.data, numbers).reshape(message.height, message.width).astype(np.float32)
    values.setflags(write=False)
    return ConceptMap(values=values, class_token=_optional(message, "class_token"), colours=_colours(message))


def _colours(message: explanation_pb2.Map) -> NDArray[np.uint8] | None:
    if not message.colours:
        return None
    try:
        from PIL import Image
    except ImportError as exc:
        raise missing_extra("pictures", "Pillow") from exc
    try:
        with Image.open(io.BytesIO(message.colours), formats=("PNG",)) as picture:
            # Before anything is decoded.
            if (picture.mode, picture.size) != ("RGBA", (message.width, message.height)):
                raise ValueError(f"{picture.mode} {picture.size}")
            pixels = np.array(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
        raise DataLoss(
            f"The colours of a map are no RGBA picture of {message.height}×{message.width}.", reason="BAD_ANSWER"
        ) from exc
    pixels.setflags(write=False)
    return pixels


def _plane(message: service_pb2.PlaneReport) -> PlaneReport:
    return PlaneReport(
        target_images=message.target_images,
        other_images=message.other_images,
        accuracy=_optional(message, "accuracy"),
        margin=_optional(message, "margin"),
        swap_rate=_optional(message, "swap_rate"),
        swap_shift=_optional(message, "swap_shift"),
    )


def _shift_point(message: service_pb2.ShiftPoint) -> ShiftPoint:
    return ShiftPoint(message.shift, message.target_probability, message.other_probability)


def _faithfulness(message: explanation_pb2.FaithfulnessReport) -> FaithfulnessReport:
    return FaithfulnessReport(
        explained_logit=message.explained_logit,
        completeness_residual=message.completeness_residual,
        constant=message.constant,
        # What a server does not claim to be exact is not.
        exactness=EXACTNESS.get(message.exactness, "first_order"),
        exactness_reason=message.exactness_reason,
        relative_error=_optional(message, "relative_error"),
        kl=_optional(message, "kl"),
        top1_agrees=_optional(message, "top1_agrees"),
        carried_share=_optional(message, "carried_share"),
        integration_error=_optional(message, "integration_error"),
        code_tolerance=_optional(message, "code_tolerance"),
        input_maps=_input_maps(message.input_maps) if message.HasField("input_maps") else None,
    )


def _input_maps(message: explanation_pb2.InputMapReport) -> InputMapReport:
    return InputMapReport(
        exactness=EXACTNESS.get(message.exactness, "first_order"),
        reason=message.reason,
        residual=message.residual,
        method=INPUT_METHODS.get(message.method, "gradient"),
        completeness_residual=_optional(message, "completeness_residual"),
    )


def _timings(message: explanation_pb2.Timings) -> Timings:
    return Timings(
        decode_ms=message.decode_ms,
        queue_ms=message.queue_ms,
        trunk_ms=message.trunk_ms,
        head_ms=message.head_ms,
        codes_ms=message.codes_ms,
        explain_ms=message.explain_ms,
        encode_ms=message.encode_ms,
        total_ms=message.total_ms,
        batch_size=message.batch_size,
    )


def _box(message: image_pb2.Box) -> Box:
    return Box(left=message.left, top=message.top, right=message.right, bottom=message.bottom)


def _exemplar(message: bank_pb2.Exemplar) -> Exemplar:
    return Exemplar(
        picture=message.picture,
        source=message.source,
        box=_box(message.box),
        activation=message.activation,
    )


def _optional(message: Message, name: str) -> Any:
    """A field's value; None where it is absent."""
    return getattr(message, name) if message.HasField(name) else None


def _struct(message: Struct) -> dict[str, Any]:
    """A Struct as plain Python values."""
    return {name: _plain(value) for name, value in message.fields.items()}


def _plain(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return _struct(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    if kind == "number_value":
        # The wire has no integers; a configuration's 10 must not come back as 10.0.
        return int(value.number_value) if value.number_value.is_integer() else value.number_value
    return getattr(value, kind) if kind in ("string_value", "bool_value") else None
