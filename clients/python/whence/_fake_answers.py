"""The SDK's records, made into messages: the way back of ``whence._answers``, for the fake service."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from whence import _answers, _requests
from whence._contrast import Contrast
from whence._errors import missing_extra
from whence._explanation import (
    Box,
    ClassScore,
    ConceptMap,
    ConceptScore,
    Explanation,
    FaithfulnessReport,
    MapKind,
    PartsReport,
)
from whence._intervention import Intervention
from whence._inventory import Bank, Concept, Exemplar, Model, Naming
from whence._search import SearchResults
from whence._server_info import ServerInfo
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as service_pb2

_EXACTNESS = {name: number for number, name in _answers.EXACTNESS.items()}
_BANK_KINDS = {name: number for number, name in _answers.BANK_KINDS.items()}


def asked_for(record: Explanation, options: explanation_pb2.ExplainOptions) -> Explanation:
    """An explanation with as many concepts and only those maps that were asked for."""
    kinds = {_answers.MAP_KINDS[kind] for kind in options.maps}

    def score(concept: ConceptScore) -> ConceptScore:
        maps = {
            kind: item if options.colours else replace(item, colours=None)
            for kind, item in concept.maps.items()
            if kind in kinds
        }
        return replace(concept, maps=maps, parts=tuple(map(score, concept.parts)) if options.parts else ())

    concepts = tuple(map(score, record.concepts[: options.top_k]))
    input_maps = record.faithfulness.input_maps if "input" in kinds else None
    if input_maps is not None:
        input_maps = replace(input_maps, method=_answers.INPUT_METHODS.get(options.input_method, "gradient"))
    report = replace(record.faithfulness, input_maps=input_maps)
    parts = record.parts if options.parts else None
    return replace(record, concepts=concepts, faithfulness=report, parts=parts)


def explanation(
    record: Explanation, encoding: explanation_pb2.MapEncoding = explanation_pb2.MAP_ENCODING_FLOAT32
) -> explanation_pb2.Explanation:
    """The message of an explanation, with its maps in an encoding."""
    return explanation_pb2.Explanation(
        model=explanation_pb2.ModelVersion(name=record.model, digest=record.model_digest),
        bank=explanation_pb2.BankVersion(reference=record.bank, digest=record.bank_digest),
        predictions=[_class_score(score) for score in record.predictions],
        target=_class_score(record.target),
        concepts=[_concept_score(score, encoding) for score in record.concepts],
        unexplained=record.unexplained,
        contributions_total=record.contributions_total,
        faithfulness=_report(record.faithfulness),
        timings=explanation_pb2.Timings(**asdict(record.timings)),
        view=_box(record.view),
        runtime=record.runtime,
        estimator=_requests.ESTIMATORS[record.estimator],
        substitute=record.substitute,
        scope=_requests.CONCEPT_SCOPES[record.scope],
        parts=None if record.parts is None else _parts(record.parts),
    )


def intervention(record: Intervention) -> service_pb2.InterveneResponse:
    """The message of an intervention, without its request id; what was scaled is not in it."""
    return service_pb2.InterveneResponse(
        model=explanation_pb2.ModelVersion(name=record.model, digest=record.model_digest),
        bank=explanation_pb2.BankVersion(reference=record.bank, digest=record.bank_digest),
        before=[_class_score(score) for score in record.before],
        after=[_class_score(score) for score in record.after],
        timings=explanation_pb2.Timings(**asdict(record.timings)),
        runtime=record.runtime,
        target=_class_score(record.target),
    )


def contrast_asked_for(record: Contrast, request: service_pb2.ContrastRequest) -> Contrast:
    """A contrast with as many prototypes, only those maps, and the shift, as asked for."""
    kinds = {_answers.MAP_KINDS[kind] for kind in request.options.maps}

    def maps(found: Mapping[MapKind, ConceptMap]) -> dict[MapKind, ConceptMap]:
        return {kind: item for kind, item in found.items() if kind in kinds}

    concepts = tuple(replace(concept, maps=maps(concept.maps)) for concept in record.concepts[: request.options.top_k])
    record = replace(record, maps=maps(record.maps), concepts=concepts)
    return replace(record, flip_shift=None, shift_curve=()) if request.without_shift else record


def contrast(
    record: Contrast, encoding: explanation_pb2.MapEncoding = explanation_pb2.MAP_ENCODING_FLOAT32
) -> service_pb2.ContrastResponse:
    """The message of a contrast, without its request id, with its maps in an encoding."""
    return service_pb2.ContrastResponse(
        model=explanation_pb2.ModelVersion(name=record.model, digest=record.model_digest),
        bank=explanation_pb2.BankVersion(reference=record.bank, digest=record.bank_digest),
        target=_class_score(record.target),
        other=_class_score(record.other),
        contribution=record.contribution,
        contribution_for_target=record.contribution_for_target,
        contribution_for_other=record.contribution_for_other,
        maps=_maps(record.maps, encoding),
        concepts=[_concept_score(score, encoding) for score in record.concepts],
        faithfulness=_report(record.faithfulness),
        plane=service_pb2.PlaneReport(**asdict(record.plane)),
        flip_shift=record.flip_shift,
        shift_curve=[service_pb2.ShiftPoint(**asdict(point)) for point in record.shift_curve],
        timings=explanation_pb2.Timings(**asdict(record.timings)),
        view=_box(record.view),
        runtime=record.runtime,
    )


def model(record: Model) -> bank_pb2.Model:
    """The message of a model."""
    return bank_pb2.Model(**asdict(record))


def bank(record: Bank) -> bank_pb2.Bank:
    """The message of a bank."""
    fields = asdict(record)
    metrics, configuration = fields.pop("metrics"), fields.pop("configuration")
    # An absent message is no argument.
    if record.labelling is None:
        del fields["labelling"]
    message = bank_pb2.Bank(**{**fields, "kind": _BANK_KINDS[record.kind]})
    _fill(message.metrics, metrics)
    _fill(message.configuration, configuration)
    return message


def concept(record: Concept, max_exemplars: int | None = None) -> service_pb2.GetConceptResponse:
    """The message of a concept."""
    message = _concept(record, max_exemplars)
    message.counterfactuals.extend(map(_exemplar, record.counterfactuals[:max_exemplars]))
    return service_pb2.GetConceptResponse(concept=message, bank=_version(record))


def server_info(record: ServerInfo) -> service_pb2.GetServerInfoResponse:
    """A server's version and limits as they travel."""
    limits = record.limits
    return service_pb2.GetServerInfoResponse(
        version=record.version,
        contract_revision=cast(service_pb2.ContractRevision, record.contract_revision),
        limits=service_pb2.Limits(
            request_bytes=limits.request_bytes,
            reply_bytes=limits.reply_bytes,
            pixels=limits.pixels,
            image_formats=limits.image_formats,
            top_k=limits.top_k,
            scales=limits.scales,
            stream_in_flight=limits.stream_in_flight,
            deadline=_requests.duration(limits.deadline_s),
            default_deadline=_requests.duration(limits.default_deadline_s),
        ),
    )


def search(record: SearchResults, request: service_pb2.SearchConceptsRequest) -> service_pb2.SearchConceptsResponse:
    """The message of a search, with as many concepts and exemplars as asked for."""
    limit = request.limit if request.HasField("limit") else 10
    return service_pb2.SearchConceptsResponse(
        concepts=[
            service_pb2.FoundConcept(
                concept=_concept(found.concept, request.max_exemplars), bank=_version(found.concept), score=found.score
            )
            for found in record.found[:limit]
        ],
        unsearched=[service_pb2.UnsearchedBank(**asdict(bank)) for bank in record.unsearched],
    )


def _version(record: Concept) -> explanation_pb2.BankVersion:
    return explanation_pb2.BankVersion(reference=record.bank, digest=record.bank_digest)


def _concept(record: Concept, max_exemplars: int | None) -> bank_pb2.Concept:
    """A concept, without its counterfactuals."""
    return bank_pb2.Concept(
        id=record.id,
        label=record.label,
        class_index=record.class_index,
        class_name=record.class_name,
        statistics=dict(record.statistics),
        exemplars=map(_exemplar, record.exemplars[:max_exemplars]),
        parent=record.parent,
        layer=record.layer,
        children=record.children,
        other_index=record.other_index,
        other_name=record.other_name,
        named_by_person=record.named_by_person,
        naming=None if record.naming is None else _naming(record.naming),
    )


def _naming(record: Naming) -> bank_pb2.Naming:
    return bank_pb2.Naming(**asdict(record))


def _exemplar(record: Exemplar) -> bank_pb2.Exemplar:
    return bank_pb2.Exemplar(**asdict(record))


def _report(record: FaithfulnessReport) -> explanation_pb2.FaithfulnessReport:
    fields = asdict(record) | {"exactness": _EXACTNESS[record.exactness]}
    if record.input_maps is not None:
        fields["input_maps"] |= {
            "exactness": _EXACTNESS[record.input_maps.exactness],
            "method": _requests.INPUT_METHODS[record.input_maps.method],
        }
    return explanation_pb2.FaithfulnessReport(**fields)


def _class_score(record: ClassScore) -> explanation_pb2.ClassScore:
    return explanation_pb2.ClassScore(**asdict(record))


def _concept_score(record: ConceptScore, encoding: explanation_pb2.MapEncoding) -> explanation_pb2.ConceptScore:
    return explanation_pb2.ConceptScore(
        id=record.id,
        label=record.label,
        activation=record.activation,
        peak=record.peak,
        contribution=record.contribution,
        share=record.share,
        maps=_maps(record.maps, encoding),
        class_index=record.class_index,
        class_name=record.class_name,
        parts=[_concept_score(part, encoding) for part in record.parts],
        weak_label=record.weak_label,
        words=record.words,
    )


def _parts(record: PartsReport) -> explanation_pb2.PartsReport:
    return explanation_pb2.PartsReport(
        layer=record.layer,
        contributions_total=record.contributions_total,
        unexplained=record.unexplained,
        faithfulness=_report(record.faithfulness),
    )


def _maps(records: Mapping[MapKind, ConceptMap], encoding: explanation_pb2.MapEncoding) -> list[explanation_pb2.Map]:
    return [_map(kind, item, encoding) for kind, item in records.items()]


def _map(kind: MapKind, record: ConceptMap, encoding: explanation_pb2.MapEncoding) -> explanation_pb2.Map:
    height, width = record.values.shape
    return explanation_pb2.Map(
        kind=_requests.MAP_KINDS[kind],
        height=height,
        width=width,
        encoding=encoding,
        data=record.values.astype(_answers.MAP_NUMBERS[encoding]).tobytes(),
        class_token=record.class_token,
        colours=None if record.colours is None else _png(record.colours),
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """An RGBA picture as a file; needs Pillow."""
    try:
        from PIL import Image
    except ImportError as exc:
        raise missing_extra("pictures", "Pillow") from exc
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _box(record: Box) -> image_pb2.Box:
    return image_pb2.Box(**asdict(record))


def _fill(message: Any, values: Mapping[str, Any]) -> None:
    """Fill a Struct; ``update`` takes nested mappings and lists."""
    message.update(dict(values))
