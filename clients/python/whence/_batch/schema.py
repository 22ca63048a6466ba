"""The three tables of a batch, schema version 1, and how an answer becomes their rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import numpy as np

from whence._batch.sources import Listed
from whence._batch.verdicts import retryable
from whence._errors import WhenceError, missing_extra
from whence._explanation import ClassScore, ConceptScore, Explanation, FaithfulnessReport

try:
    import pyarrow as pa
except ImportError as absent:
    raise missing_extra("batch", "pyarrow") from absent

VERSION = 1

_CLASS = pa.struct(
    [("index", pa.int32()), ("name", pa.string()), ("logit", pa.float32()), ("probability", pa.float32())]
)
_CONCEPT = pa.struct(
    [
        ("id", pa.int32()),
        ("label", pa.string()),
        ("weak_label", pa.bool_()),
        ("class_index", pa.int32()),
        ("activation", pa.float32()),
        ("peak", pa.float32()),
        ("contribution", pa.float32()),
        ("share", pa.float32()),
    ]
)
_REPORT = pa.struct(
    [
        ("explained_logit", pa.float32()),
        ("completeness_residual", pa.float32()),
        ("constant", pa.float32()),
        ("exactness", pa.string()),
        ("exactness_reason", pa.string()),
        ("relative_error", pa.float32()),
        ("kl", pa.float32()),
        ("top1_agrees", pa.bool_()),
        ("carried_share", pa.float32()),
        ("integration_error", pa.float32()),
        ("code_tolerance", pa.float32()),
    ]
)
_CONCEPT_NAMES, _REPORT_NAMES = ([field.name for field in struct] for struct in (_CONCEPT, _REPORT))
_BOX = pa.struct([(side, pa.float32()) for side in ("left", "top", "right", "bottom")])
_INSTANT = pa.timestamp("ms", tz="UTC")

RESULTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("model", pa.string()),
        ("model_digest", pa.string()),
        ("bank", pa.string()),
        ("bank_digest", pa.string()),
        ("prediction", _CLASS),
        ("target", _CLASS),
        ("concepts", pa.list_(_CONCEPT)),
        ("contributions_total", pa.float32()),
        ("unexplained", pa.float32()),
        ("report", _REPORT),
        ("runtime", pa.string()),
        ("explained_at", _INSTANT),
    ]
)
FAILURES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("code", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("retryable", pa.bool_()),
        ("failed_at", _INSTANT),
    ]
)
MAPS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        ("etag", pa.string()),
        ("concept_id", pa.int32()),
        ("kind", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("view", _BOX),
        ("values", pa.list_(pa.float16())),
    ]
)
SCHEMAS = {"results": RESULTS, "failures": FAILURES, "maps": MAPS}


def result(item: Listed, explanation: Explanation) -> dict[str, Any]:
    """The row of an image that was explained."""
    return {
        "key": item.key,
        "etag": item.etag,
        "size": item.size,
        "model": explanation.model,
        "model_digest": explanation.model_digest,
        "bank": explanation.bank,
        "bank_digest": explanation.bank_digest,
        "prediction": _class(explanation.predictions[0] if explanation.predictions else explanation.target),
        "target": _class(explanation.target),
        "concepts": [_concept(concept) for concept in explanation.concepts],
        "contributions_total": explanation.contributions_total,
        "unexplained": explanation.unexplained,
        "report": _report(explanation.faithfulness),
        "runtime": explanation.runtime,
        "explained_at": datetime.now(timezone.utc),
    }


def failure(item: Listed, error: WhenceError) -> dict[str, Any]:
    """The row of an image that was not."""
    return {
        "key": item.key,
        "etag": item.etag,
        "size": item.size,
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "retryable": retryable(error),
        "failed_at": datetime.now(timezone.utc),
    }


def maps(item: Listed, explanation: Explanation) -> Iterator[dict[str, Any]]:
    """The rows of an image's maps; ``values`` is a flat array, row by row."""
    box = explanation.view
    view = {"left": box.left, "top": box.top, "right": box.right, "bottom": box.bottom}
    for concept in explanation.concepts:
        for kind, found in concept.maps.items():
            height, width = found.values.shape
            yield {
                "key": item.key,
                "etag": item.etag,
                "concept_id": concept.id,
                "kind": kind,
                "height": height,
                "width": width,
                "view": view,
                "values": found.values.astype(np.float16).ravel(),
            }


def table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of a schema."""
    schema = SCHEMAS[name]
    if name != "maps":
        return pa.Table.from_pylist(rows, schema=schema)
    # Arrow takes the numbers of maps in one piece; value by value it would take most of a run's time.
    values = [row.pop("values") for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(flat) for flat in values])]).astype(np.int32)
    flat = pa.array(np.concatenate(values) if values else np.empty(0, np.float16))
    rest = pa.Table.from_pylist(rows, schema=schema.remove(schema.get_field_index("values")))
    return rest.append_column(schema.field("values"), pa.ListArray.from_arrays(offsets, flat))


def _class(score: ClassScore) -> dict[str, Any]:
    return {"index": score.index, "name": score.name, "logit": score.logit, "probability": score.probability}


def _concept(concept: ConceptScore) -> dict[str, Any]:
    return {name: getattr(concept, name) for name in _CONCEPT_NAMES}


def _report(report: FaithfulnessReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in _REPORT_NAMES}
