"""Tells, in concepts, where a vision model's prediction came from: the client of a Whence service.

>>> import whence
>>> with whence.Client("localhost:9000") as client:  # doctest: +SKIP
...     explanation = client.explain("photo.jpg", bank="resnet50/layer4/craft")
...     explanation.save("why.png")

Names are loaded when they are first used, so that ``import whence`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whence._async_client import AsyncClient
    from whence._batch.api import explain_batch, read_batch
    from whence._batch.records import BatchSummary, Progress
    from whence._channel import TLS
    from whence._client import Client
    from whence._contrast import Contrast, PlaneReport, ShiftPoint
    from whence._errors import (
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        InternalError,
        InvalidArgument,
        MissingExtra,
        NotFound,
        Overloaded,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        WhenceError,
    )
    from whence._explanation import (
        Box,
        ClassScore,
        ConceptMap,
        ConceptScore,
        Explanation,
        FaithfulnessReport,
        InputMapReport,
        PartsReport,
        Timings,
    )
    from whence._handshake import VersionWarning
    from whence._intervention import Intervention
    from whence._inventory import Bank, Concept, Exemplar, Labelling, Model, Naming, Word
    from whence._search import FoundConcept, SearchResults, UnsearchedBank
    from whence._server_info import Limits, ServerInfo
    from whence._window import Outcome

_NAMES_BY_MODULE = {
    "_async_client": ("AsyncClient",),
    "_batch.api": ("explain_batch", "read_batch"),
    "_batch.records": ("BatchSummary", "Progress"),
    "_channel": ("TLS",),
    "_client": ("Client",),
    "_contrast": ("Contrast", "PlaneReport", "ShiftPoint"),
    "_errors": (
        "AlreadyExists",
        "Cancelled",
        "DataLoss",
        "DeadlineExceeded",
        "FailedPrecondition",
        "InternalError",
        "InvalidArgument",
        "MissingExtra",
        "NotFound",
        "Overloaded",
        "PermissionDenied",
        "ResourceExhausted",
        "Unauthenticated",
        "Unavailable",
        "Unimplemented",
        "WhenceError",
    ),
    "_explanation": (
        "Box",
        "ClassScore",
        "ConceptMap",
        "ConceptScore",
        "Explanation",
        "FaithfulnessReport",
        "InputMapReport",
        "PartsReport",
        "Timings",
    ),
    "_handshake": ("VersionWarning",),
    "_intervention": ("Intervention",),
    "_inventory": ("Bank", "Concept", "Exemplar", "Labelling", "Model", "Naming", "Word"),
    "_search": ("FoundConcept", "SearchResults", "UnsearchedBank"),
    "_server_info": ("Limits", "ServerInfo"),
    "_window": ("Outcome",),
}
_HOMES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "AlreadyExists",
    "AsyncClient",
    "Bank",
    "BatchSummary",
    "Box",
    "Cancelled",
    "ClassScore",
    "Client",
    "Concept",
    "ConceptMap",
    "ConceptScore",
    "Contrast",
    "DataLoss",
    "DeadlineExceeded",
    "Exemplar",
    "Explanation",
    "FailedPrecondition",
    "FaithfulnessReport",
    "FoundConcept",
    "InputMapReport",
    "InternalError",
    "Intervention",
    "InvalidArgument",
    "Labelling",
    "Limits",
    "MissingExtra",
    "Model",
    "Naming",
    "NotFound",
    "Outcome",
    "Overloaded",
    "PartsReport",
    "PermissionDenied",
    "PlaneReport",
    "Progress",
    "ResourceExhausted",
    "SearchResults",
    "ServerInfo",
    "ShiftPoint",
    "Timings",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnsearchedBank",
    "VersionWarning",
    "WhenceError",
    "Word",
    "__version__",
    "explain_batch",
    "read_batch",
]


def __getattr__(name: str) -> object:
    """Load a public name from its private module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    value: object = getattr(import_module(f"whence.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
