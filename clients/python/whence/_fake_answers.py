"""The SDK's records, made into messages: the way back of ``whence._answers``, for the fake service."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from whence import _answers, _requests
from whence._explanation import Box, ClassScore, ConceptMap, ConceptScore, Explanation, MapKind
from whence._intervention import Intervention
from whence._inventory import Bank, Concept, Model
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as service_pb2

_EXACTNESS = {name: number for number, name in _answers.EXACTNESS.items()}
_BANK_KINDS = {name: number for number, name in _answers.BANK_KINDS.items()}


def explanation(record: Explanation, kinds: Collection[MapKind] | None = None) -> explanation_pb2.Explanation:
    """The message of an explanation, with maps of these kinds only (None: all)."""
    report = asdict(record.faithfulness)
    report["exactness"] = _EXACTNESS[record.faithfulness.exactness]
    return explanation_pb2.Explanation(
        model=explanation_pb2.ModelVersion(name=record.model, digest=record.model_digest),
        bank=explanation_pb2.BankVersion(reference=record.bank, digest=record.bank_digest),
        predictions=[_class_score(score) for score in record.predictions],
        target=_class_score(record.target),
        concepts=[_concept_score(score, kinds) for score in record.concepts],
        unexplained=record.unexplained,
        contributions_total=record.contributions_total,
        faithfulness=explanation_pb2.FaithfulnessReport(**report),
        timings=explanation_pb2.Timings(**asdict(record.timings)),
        view=_box(record.view),
        runtime=record.runtime,
        estimator=_requests.ESTIMATORS[record.estimator],
        substitute=record.substitute,
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


def model(record: Model) -> bank_pb2.Model:
    """The message of a model."""
    return bank_pb2.Model(**asdict(record))


def bank(record: Bank) -> bank_pb2.Bank:
    """The message of a bank."""
    fields = asdict(record)
    metrics, configuration = fields.pop("metrics"), fields.pop("configuration")
    message = bank_pb2.Bank(**{**fields, "kind": _BANK_KINDS[record.kind]})
    _fill(message.metrics, metrics)
    _fill(message.configuration, configuration)
    return message


def concept(record: Concept, max_exemplars: int | None = None) -> service_pb2.GetConceptResponse:
    """The message of a concept."""
    exemplars = [
        bank_pb2.Exemplar(
            picture=exemplar.picture,
            source=exemplar.source,
            box=_box(exemplar.box),
            activation=exemplar.activation,
        )
        for exemplar in record.exemplars[:max_exemplars]
    ]
    message = bank_pb2.Concept(
        id=record.id,
        label=record.label,
        class_index=record.class_index,
        class_name=record.class_name,
        statistics=dict(record.statistics),
        exemplars=exemplars,
        parent=record.parent,
    )
    version = explanation_pb2.BankVersion(reference=record.bank, digest=record.bank_digest)
    return service_pb2.GetConceptResponse(concept=message, bank=version)


def _class_score(record: ClassScore) -> explanation_pb2.ClassScore:
    return explanation_pb2.ClassScore(**asdict(record))


def _concept_score(record: ConceptScore, kinds: Collection[MapKind] | None) -> explanation_pb2.ConceptScore:
    return explanation_pb2.ConceptScore(
        id=record.id,
        label=record.label,
        activation=record.activation,
        peak=record.peak,
        contribution=record.contribution,
        share=record.share,
        maps=[_map(kind, item) for kind, item in record.maps.items() if kinds is None or kind in kinds],
    )


def _map(kind: MapKind, record: ConceptMap) -> explanation_pb2.Map:
    height, width = record.values.shape
    return explanation_pb2.Map(
        kind=_requests.MAP_KINDS[kind],
        height=height,
        width=width,
        encoding=explanation_pb2.MAP_ENCODING_FLOAT16,
        data=np.ascontiguousarray(record.values, "<f2").tobytes(),
        class_token=record.class_token,
    )


def _box(record: Box) -> image_pb2.Box:
    return image_pb2.Box(**asdict(record))


def _fill(message: Any, values: Mapping[str, Any]) -> None:
    """Fill a Struct; ``update`` takes nested mappings and lists."""
    message.update(dict(values))
