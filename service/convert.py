"""Between the wire and the domain, both ways; no other module reads or writes explanation messages."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from google.protobuf import struct_pb2
from numpy.typing import NDArray

from concepts.bank import Bank, Concept, Exemplar, Naming, Word
from concepts.contrast.records import Contrast, ContrastRequest, PlaneReport
from concepts.errors import InvalidInput, UnsupportedOption
from concepts.explanation import (
    ClassScore,
    ConceptMap,
    ConceptScope,
    ConceptScore,
    Estimator,
    Exactness,
    ExplainOptions,
    Explanation,
    FaithfulnessReport,
    InputMapReport,
    InputMethod,
    MapKind,
    MapSize,
    Order,
    PartsReport,
    StageTimes,
)
from concepts.intervention import Intervention, InterventionRequest
from concepts.model import ModelSpec
from concepts.preprocessing import Box
from concepts.repository import BankSummary, BankVersion
from service.overlay import overlay, png
from service.priority import Priority
from service.search import Query, SearchBy
from service.settings import Settings
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as service_pb2

MapEncoding = Literal["float16", "float32", "overlay"]

_ORDERS: Mapping[int, Order] = {
    explanation_pb2.ORDER_UNSPECIFIED: "contribution",
    explanation_pb2.ORDER_CONTRIBUTION: "contribution",
    explanation_pb2.ORDER_ACTIVATION: "activation",
}
_ESTIMATORS: Mapping[int, Estimator] = {
    explanation_pb2.ESTIMATOR_UNSPECIFIED: "gradient",
    explanation_pb2.ESTIMATOR_GRADIENT: "gradient",
    explanation_pb2.ESTIMATOR_INTEGRATED: "integrated",
    explanation_pb2.ESTIMATOR_ABLATION: "ablation",
}
_MAP_KINDS: Mapping[int, MapKind] = {
    explanation_pb2.MAP_KIND_ACTIVATION: "activation",
    explanation_pb2.MAP_KIND_CONTRIBUTION: "contribution",
    explanation_pb2.MAP_KIND_INPUT: "input",
}
_MAP_SIZES: Mapping[int, MapSize] = {
    explanation_pb2.MAP_SIZE_UNSPECIFIED: "grid",
    explanation_pb2.MAP_SIZE_GRID: "grid",
    explanation_pb2.MAP_SIZE_IMAGE: "image",
}
_ENCODINGS: Mapping[int, MapEncoding] = {
    explanation_pb2.MAP_ENCODING_UNSPECIFIED: "float16",
    explanation_pb2.MAP_ENCODING_FLOAT16: "float16",
    explanation_pb2.MAP_ENCODING_PNG_OVERLAY: "overlay",
    explanation_pb2.MAP_ENCODING_FLOAT32: "float32",
}
_BYTES_A_PIXEL: Mapping[MapEncoding, int] = {"float16": 2, "float32": 4, "overlay": 3}
"""Pictures: as much as uncompressed."""
_COLOUR_BYTES_A_PIXEL = 4
_INPUT_METHODS: Mapping[int, InputMethod] = {
    explanation_pb2.INPUT_METHOD_UNSPECIFIED: "gradient",
    explanation_pb2.INPUT_METHOD_GRADIENT: "gradient",
    explanation_pb2.INPUT_METHOD_SMOOTHGRAD: "smoothgrad",
    explanation_pb2.INPUT_METHOD_INTEGRATED: "integrated",
}
_CONCEPT_SCOPES: Mapping[int, ConceptScope] = {
    explanation_pb2.CONCEPT_SCOPE_UNSPECIFIED: "target",
    explanation_pb2.CONCEPT_SCOPE_TARGET: "target",
    explanation_pb2.CONCEPT_SCOPE_ALL: "all",
}
_EXACTNESSES: Mapping[Exactness, explanation_pb2.Exactness] = {
    "exact": explanation_pb2.EXACTNESS_EXACT,
    "first_order": explanation_pb2.EXACTNESS_FIRST_ORDER,
}
_ESTIMATORS_OUT: Mapping[Estimator, explanation_pb2.Estimator] = {
    "gradient": explanation_pb2.ESTIMATOR_GRADIENT,
    "integrated": explanation_pb2.ESTIMATOR_INTEGRATED,
    "ablation": explanation_pb2.ESTIMATOR_ABLATION,
}
_MAP_KINDS_OUT: Mapping[MapKind, explanation_pb2.MapKind] = {
    "activation": explanation_pb2.MAP_KIND_ACTIVATION,
    "contribution": explanation_pb2.MAP_KIND_CONTRIBUTION,
    "input": explanation_pb2.MAP_KIND_INPUT,
}
_INPUT_METHODS_OUT: Mapping[InputMethod, explanation_pb2.InputMethod] = {
    "gradient": explanation_pb2.INPUT_METHOD_GRADIENT,
    "smoothgrad": explanation_pb2.INPUT_METHOD_SMOOTHGRAD,
    "integrated": explanation_pb2.INPUT_METHOD_INTEGRATED,
}
_CONCEPT_SCOPES_OUT: Mapping[ConceptScope, explanation_pb2.ConceptScope] = {
    "target": explanation_pb2.CONCEPT_SCOPE_TARGET,
    "all": explanation_pb2.CONCEPT_SCOPE_ALL,
}
_BANK_KINDS: Mapping[str, bank_pb2.BankKind] = {
    "sae": bank_pb2.BANK_KIND_SAE,
    "nmf": bank_pb2.BANK_KIND_NMF,
    "contrast": bank_pb2.BANK_KIND_CONTRAST,
    "subspace": bank_pb2.BANK_KIND_SUBSPACE,
}
_SEARCHES: Mapping[int, SearchBy] = {
    service_pb2.SEARCH_BY_UNSPECIFIED: "meaning",
    service_pb2.SEARCH_BY_MEANING: "meaning",
    service_pb2.SEARCH_BY_LABEL: "label",
}
_PRIORITIES: Mapping[int, Priority] = {
    service_pb2.PRIORITY_UNSPECIFIED: "interactive",
    service_pb2.PRIORITY_INTERACTIVE: "interactive",
    service_pb2.PRIORITY_BACKGROUND: "background",
}
_TEXT_CHARACTERS = 1000
"""Longest text to look for."""

Meaning = TypeVar("Meaning")


# From the wire


def options_from(message: explanation_pb2.ExplainOptions, *, top_k_limit: int) -> ExplainOptions:
    """Return what a caller asks for, defaults filled in.

    Raises
    ------
    InvalidInput
        If a value is unknown or out of range.
    """
    top_k = message.top_k if message.HasField("top_k") else min(ExplainOptions().top_k, top_k_limit)
    if not 1 <= top_k <= top_k_limit:
        raise InvalidInput(f"top_k must be between 1 and {top_k_limit}, not {top_k}.", top_k_limit=top_k_limit)
    return ExplainOptions(
        top_k=top_k,
        order=_meaning(_ORDERS, message.order, "order"),
        estimator=_meaning(_ESTIMATORS, message.estimator, "estimator"),
        # Asked for twice is asked for once.
        maps=tuple(dict.fromkeys(_meaning(_MAP_KINDS, kind, "maps") for kind in message.maps)),
        map_size=_meaning(_MAP_SIZES, message.map_size, "map_size"),
        substitute=message.substitute if message.HasField("substitute") else None,
        colours=message.colours,
        parts=message.parts,
        input_method=_meaning(_INPUT_METHODS, message.input_method, "input_method"),
        concepts=_meaning(_CONCEPT_SCOPES, message.concepts, "concepts"),
    )


def encoding_from(message: explanation_pb2.ExplainOptions) -> MapEncoding:
    """Return how maps are to be written.

    Raises
    ------
    InvalidInput
        If the encoding is unknown.
    """
    return _meaning(_ENCODINGS, message.map_encoding, "map_encoding")


def priority_from(message: service_pb2.ExplainRequest) -> Priority:
    """Return whether somebody waits for the answer.

    Raises
    ------
    InvalidInput
        If the priority is unknown.
    """
    return _meaning(_PRIORITIES, message.priority, "priority")


def target_from(message: explanation_pb2.Target, spec: ModelSpec) -> int | None:
    """Return the index of the class to explain; None: the predicted class.

    Raises
    ------
    UnknownClass
        If the model has no such class.
    """
    chosen = message.WhichOneof("class")
    if chosen is None:
        return None
    if chosen == "name":
        return spec.class_index(message.name)
    spec.check_class(message.index)
    return message.index


def contrast_from(message: service_pb2.ContrastRequest, spec: ModelSpec, *, top_k_limit: int) -> ContrastRequest:
    """Return what a caller would have contrasted.

    Raises
    ------
    InvalidInput
        If an option is unknown or out of range.
    UnknownClass
        If the model does not have one of the classes.
    """
    return ContrastRequest(
        target=target_from(message.target, spec),
        other=target_from(message.other, spec),
        options=options_from(message.options, top_k_limit=top_k_limit),
        shift=not message.without_shift,
    )


def intervention_from(
    message: service_pb2.InterveneRequest, spec: ModelSpec, *, scales_limit: int
) -> InterventionRequest:
    """Return which concepts a caller would scale, and by how much.

    Raises
    ------
    InvalidInput
        If they are too many, or the scope is unknown.
    UnknownClass
        If the model has no such target.
    """
    if len(message.scales) > scales_limit:
        raise InvalidInput(
            f"scales must name at most {scales_limit} concepts, not {len(message.scales)}.", scales_limit=scales_limit
        )
    scope = _meaning(_CONCEPT_SCOPES, message.concepts, "concepts")
    return InterventionRequest(target_from(message.target, spec), dict(message.scales), scope)


def query_from(message: service_pb2.SearchConceptsRequest, *, limit: int) -> Query:
    """Return what a caller looks for; ``limit`` is how many concepts may be found.

    Raises
    ------
    InvalidInput
        If there is no text, or too much of it, or a value is unknown or out of range.
    """
    text = message.text.strip()
    if not 1 <= len(text) <= _TEXT_CHARACTERS:
        raise InvalidInput(f"text must have between 1 and {_TEXT_CHARACTERS} characters, not {len(text)}.")
    asked = message.limit if message.HasField("limit") else min(Query.limit, limit)
    if not 1 <= asked <= limit:
        raise InvalidInput(f"limit must be between 1 and {limit}, not {asked}.", limit=limit)
    return Query(text, _meaning(_SEARCHES, message.by, "by"), asked)


def check_reply_size(
    options: ExplainOptions, spec: ModelSpec, *, encoding: MapEncoding, limit: int, parts: int = 0, planes: int = 0
) -> None:
    """Refuse an answer that would be too large, before it is computed.

    A concept has at most so many parts listed, and so many planes have maps beside the concepts.

    Raises
    ------
    UnsupportedOption
        If maps of the image's size may exceed ``limit`` bytes.
    """
    pixels = spec.preprocessing.height * spec.preprocessing.width
    # Grids are small: their size is not known here, nor does it matter.
    # Parts have maps at their layer alone.
    copies = {kind: 1 if kind == "input" else 1 + parts for kind in options.maps}
    large = sum(copies[kind] for kind in options.maps if has_image_size(kind, options, encoding))
    bytes_a_pixel = large * _BYTES_A_PIXEL[encoding] + options.colours * _COLOUR_BYTES_A_PIXEL
    needed = (options.top_k + planes) * pixels * bytes_a_pixel
    if needed > limit:
        more = " and their parts" if parts else " and the plane" if planes else ""
        listed = f"{options.top_k} concepts{more}"
        raise UnsupportedOption(
            f"{listed} with maps of {pixels} pixels may take {needed} bytes, and the largest answer "
            f"has {limit}; ask for fewer concepts, or for float16 maps on the layer's grid.",
            reply_bytes_limit=limit,
        )


def has_image_size(kind: MapKind, options: ExplainOptions, encoding: MapEncoding) -> bool:
    """Return whether maps of a kind have a value for every pixel of the model's view."""
    return kind == "input" or options.map_size == "image" or encoding == "overlay"


def _meaning(table: Mapping[int, Meaning], value: int, field: str) -> Meaning:
    if value not in table:
        raise InvalidInput(f"{field} has the value {value}, which this server does not know.")
    return table[value]


# To the wire


def explanation_to(
    explanation: Explanation, *, view: NDArray[np.uint8], box: Box, encoding: MapEncoding
) -> explanation_pb2.Explanation:
    """Return an explanation as a message; its timings hold what the engine measured.

    Parameters
    ----------
    explanation
        From the engine.
    view
        uint8 ``[height, width, 3]``: what the model saw.
    box
        Where in the caller's image.
    encoding
        Of maps.
    """
    return explanation_pb2.Explanation(
        model=explanation_pb2.ModelVersion(name=explanation.model, digest=explanation.model_digest),
        bank=explanation_pb2.BankVersion(reference=explanation.bank, digest=explanation.bank_digest),
        predictions=[_class_to(score) for score in explanation.predictions],
        target=_class_to(explanation.target),
        concepts=[_score_to(score, view, encoding) for score in explanation.concepts],
        unexplained=explanation.unexplained,
        contributions_total=explanation.contributions_total,
        faithfulness=_report_to(explanation.faithfulness),
        timings=_timings_to(explanation.stages),
        view=box_to(box),
        runtime=explanation.runtime,
        estimator=_ESTIMATORS_OUT[explanation.estimator],
        substitute=explanation.substitute,
        scope=_CONCEPT_SCOPES_OUT[explanation.scope],
        parts=None if explanation.parts is None else _parts_to(explanation.parts),
    )


def contrast_to(
    contrast: Contrast, *, view: NDArray[np.uint8], box: Box, encoding: MapEncoding
) -> service_pb2.ContrastResponse:
    """Return a contrast as a message without a request id; parameters and timings as for an explanation."""
    return service_pb2.ContrastResponse(
        model=explanation_pb2.ModelVersion(name=contrast.model, digest=contrast.model_digest),
        bank=explanation_pb2.BankVersion(reference=contrast.bank, digest=contrast.bank_digest),
        target=_class_to(contrast.target),
        other=_class_to(contrast.other),
        contribution=contrast.contribution,
        contribution_for_target=contrast.contribution_for_target,
        contribution_for_other=contrast.contribution_for_other,
        maps=[_map_to(kind, values, view, encoding) for kind, values in contrast.maps.items()],
        concepts=[_score_to(score, view, encoding) for score in contrast.concepts],
        faithfulness=_report_to(contrast.faithfulness),
        plane=_plane_to(contrast.plane),
        flip_shift=contrast.flip_shift,
        shift_curve=[
            service_pb2.ShiftPoint(
                shift=point.shift,
                target_probability=point.target_probability,
                other_probability=point.other_probability,
            )
            for point in contrast.shift_curve
        ],
        timings=_timings_to(contrast.stages),
        view=box_to(box),
        runtime=contrast.runtime,
    )


def intervention_to(intervention: Intervention) -> service_pb2.InterveneResponse:
    """Return an intervention as a message without a request id; its timings hold what the engine measured."""
    return service_pb2.InterveneResponse(
        model=explanation_pb2.ModelVersion(name=intervention.model, digest=intervention.model_digest),
        bank=explanation_pb2.BankVersion(reference=intervention.bank, digest=intervention.bank_digest),
        before=[_class_to(score) for score in intervention.before],
        after=[_class_to(score) for score in intervention.after],
        timings=_timings_to(intervention.stages),
        runtime=intervention.runtime,
        target=_class_to(intervention.target),
    )


def model_to(spec: ModelSpec) -> bank_pb2.Model:
    """Return a model's description as a message."""
    return bank_pb2.Model(
        name=spec.name,
        digest=spec.weights_digest,
        architecture=spec.architecture,
        class_names=spec.class_names,
        input_height=spec.preprocessing.height,
        input_width=spec.preprocessing.width,
    )


def bank_to(summary: BankSummary) -> bank_pb2.Bank:
    """Return a bank's summary as a message."""
    manifest, version = summary.manifest, summary.version
    parts = manifest.get("parts", {"layer": "", "concept_count": 0})
    return bank_pb2.Bank(
        reference=version.reference,
        digest=version.digest,
        kind=_BANK_KINDS[manifest["kind"]],
        model=version.model,
        layer=version.layer,
        name=version.name,
        concept_count=manifest["concept_count"],
        channels=manifest["channels"],
        weights_digest=manifest["weights_digest"],
        created=datetime.datetime.fromtimestamp(summary.published, datetime.UTC).isoformat(timespec="seconds"),
        metrics=_struct_to(manifest["metrics"]),
        configuration=_struct_to(manifest["configuration"]),
        parts_layer=parts["layer"],
        part_count=parts["concept_count"],
        labelling=_labelling_to(manifest["labelling"]) if "labelling" in manifest else None,
    )


def bank_version_to(version: BankVersion) -> explanation_pb2.BankVersion:
    """Return a version of a bank as a message."""
    return explanation_pb2.BankVersion(reference=version.reference, digest=version.digest)


def concept_to(bank: Bank, concept: Concept, pictures: Mapping[str, bytes], spec: ModelSpec) -> bank_pb2.Concept:
    """Return a concept as a message; ``pictures`` holds the files of its exemplars and counterfactuals."""
    return bank_pb2.Concept(
        id=concept.id,
        label=concept.label,
        class_index=concept.class_index,
        class_name="" if concept.class_index is None else spec.class_names[concept.class_index],
        statistics=concept.statistics,
        exemplars=[_exemplar_to(exemplar, pictures) for exemplar in concept.exemplars],
        parent=concept.parent,
        layer=bank.layer_of(concept.id),
        children=bank.children(concept.id),
        other_index=concept.other_index,
        other_name="" if concept.other_index is None else spec.class_names[concept.other_index],
        named_by_person=concept.named_by_person,
        naming=None if concept.naming is None else _naming_to(concept.naming),
        counterfactuals=[_exemplar_to(exemplar, pictures) for exemplar in concept.counterfactuals],
    )


def server_info_to(settings: Settings, version: str) -> service_pb2.GetServerInfoResponse:
    """Return what the server of a version is and accepts, as a message."""
    limits = settings.limits
    response = service_pb2.GetServerInfoResponse(
        version=version,
        contract_revision=service_pb2.ContractRevision.Name(max(service_pb2.ContractRevision.values())),
        limits=service_pb2.Limits(
            request_bytes=limits.request_bytes,
            reply_bytes=limits.reply_bytes,
            pixels=limits.pixels,
            image_formats=limits.image_formats,
            top_k=limits.top_k,
            scales=limits.scales,
            stream_in_flight=limits.stream_in_flight,
        ),
    )
    response.limits.deadline.FromNanoseconds(round(limits.deadline_s * 1e9))
    response.limits.default_deadline.FromNanoseconds(round(settings.default_deadline_s * 1e9))
    return response


def box_to(box: Box) -> image_pb2.Box:
    """Return a rectangle as a message."""
    return image_pb2.Box(left=box.left, top=box.top, right=box.right, bottom=box.bottom)


def _exemplar_to(exemplar: Exemplar, pictures: Mapping[str, bytes]) -> bank_pb2.Exemplar:
    return bank_pb2.Exemplar(
        picture=pictures[exemplar.file],
        source=exemplar.source,
        box=box_to(exemplar.box),
        activation=exemplar.activation,
    )


def _naming_to(naming: Naming) -> bank_pb2.Naming:
    return bank_pb2.Naming(
        label=naming.label,
        score=naming.score,
        weak=naming.weak,
        words=_words_to(naming.words),
        phrases=_words_to(naming.phrases),
        counterfactuals=naming.counterfactuals,
    )


def _words_to(words: Iterable[Word]) -> list[bank_pb2.Word]:
    return [bank_pb2.Word(text=word.text, score=word.score) for word in words]


def _labelling_to(labelling: Mapping[str, Any]) -> bank_pb2.Labelling:
    clip, vocabulary = labelling["clip"], labelling["vocabulary"]
    return bank_pb2.Labelling(clip=clip["name"], clip_digest=clip["digest"], captions=vocabulary["captions"])


def _class_to(score: ClassScore) -> explanation_pb2.ClassScore:
    return explanation_pb2.ClassScore(
        index=score.index, name=score.name, logit=score.logit, probability=score.probability
    )


def _timings_to(stages: StageTimes) -> explanation_pb2.Timings:
    return explanation_pb2.Timings(
        trunk_ms=stages.trunk_ms,
        head_ms=stages.head_ms,
        codes_ms=stages.codes_ms,
        explain_ms=stages.explain_ms,
        batch_size=stages.batch_size,
    )


def _score_to(score: ConceptScore, view: NDArray[np.uint8], encoding: MapEncoding) -> explanation_pb2.ConceptScore:
    return explanation_pb2.ConceptScore(
        id=score.id,
        label=score.label,
        activation=score.activation,
        peak=score.peak,
        contribution=score.contribution,
        share=score.share,
        maps=[_map_to(kind, values, view, encoding) for kind, values in score.maps.items()],
        class_index=score.class_index,
        class_name=score.class_name,
        parts=[_score_to(part, view, encoding) for part in score.parts],
        weak_label=score.weak_label,
        words=score.words,
    )


def _parts_to(report: PartsReport) -> explanation_pb2.PartsReport:
    return explanation_pb2.PartsReport(
        layer=report.layer,
        contributions_total=report.contributions_total,
        unexplained=report.unexplained,
        faithfulness=_report_to(report.faithfulness),
    )


def _plane_to(report: PlaneReport) -> service_pb2.PlaneReport:
    return service_pb2.PlaneReport(
        accuracy=report.accuracy,
        margin=report.margin,
        swap_rate=report.swap_rate,
        swap_shift=report.swap_shift,
        target_images=report.target_images,
        other_images=report.other_images,
    )


def _map_to(kind: MapKind, found: ConceptMap, view: NDArray[np.uint8], encoding: MapEncoding) -> explanation_pb2.Map:
    height, width = view.shape[:2] if encoding == "overlay" else found.values.shape
    if encoding == "overlay":
        written, data = explanation_pb2.MAP_ENCODING_PNG_OVERLAY, overlay(view, found.values)
    elif encoding == "float16":
        written, data = explanation_pb2.MAP_ENCODING_FLOAT16, _half(found.values)
    else:
        written, data = explanation_pb2.MAP_ENCODING_FLOAT32, found.values.astype("<f4").tobytes()
    return explanation_pb2.Map(
        kind=_MAP_KINDS_OUT[kind],
        height=height,
        width=width,
        encoding=written,
        data=data,
        class_token=found.class_token,
        colours=None if found.colours is None else png(found.colours),
    )


def _half(values: NDArray[np.float32]) -> bytes:
    # Beyond half precision's range the nearest value says more than infinity.
    largest = float(np.finfo(np.float16).max)
    return np.clip(values, -largest, largest).astype("<f2").tobytes()


def _report_to(report: FaithfulnessReport) -> explanation_pb2.FaithfulnessReport:
    return explanation_pb2.FaithfulnessReport(
        relative_error=report.relative_error,
        kl=report.kl,
        top1_agrees=report.top1_agrees,
        completeness_residual=report.completeness_residual,
        constant=report.constant,
        exactness=_EXACTNESSES[report.exactness],
        exactness_reason=report.exactness_reason,
        carried_share=report.carried_share,
        integration_error=report.integration_error,
        code_tolerance=report.code_tolerance,
        explained_logit=report.explained_logit,
        input_maps=None if report.input_maps is None else _input_report_to(report.input_maps),
    )


def _input_report_to(report: InputMapReport) -> explanation_pb2.InputMapReport:
    return explanation_pb2.InputMapReport(
        exactness=_EXACTNESSES[report.exactness],
        reason=report.reason,
        residual=report.residual,
        method=_INPUT_METHODS_OUT[report.method],
        completeness_residual=report.completeness_residual,
    )


def _struct_to(values: Mapping[str, Any]) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(dict(values))
    return struct
