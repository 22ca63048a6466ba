"""What callers ask for, made into messages of the wire contract."""

from __future__ import annotations

import math
import numbers
import operator
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from whence._errors import InvalidArgument
from whence._explanation import ConceptScope, ConceptScore, Estimator, InputMethod, MapKind, MapSize, Order, Priority
from whence._images import Source
from whence._inventory import Concept
from whence._search import SearchBy
from whence._status import REQUEST_ID_KEY
from whence.v1 import explanation_pb2
from whence.v1 import explanation_service_pb2 as service_pb2

T = TypeVar("T")
Scalable = TypeVar("Scalable", bound="int | Concept | ConceptScore")

_LONGEST_S = 1e9
"""More than that is no time to wait, and overflows in gRPC."""

ORDERS: dict[str, explanation_pb2.Order] = {
    "contribution": explanation_pb2.ORDER_CONTRIBUTION,
    "activation": explanation_pb2.ORDER_ACTIVATION,
}
ESTIMATORS: dict[str, explanation_pb2.Estimator] = {
    "gradient": explanation_pb2.ESTIMATOR_GRADIENT,
    "integrated": explanation_pb2.ESTIMATOR_INTEGRATED,
    "ablation": explanation_pb2.ESTIMATOR_ABLATION,
}
MAP_KINDS: dict[str, explanation_pb2.MapKind] = {
    "activation": explanation_pb2.MAP_KIND_ACTIVATION,
    "contribution": explanation_pb2.MAP_KIND_CONTRIBUTION,
    "input": explanation_pb2.MAP_KIND_INPUT,
}
MAP_SIZES: dict[str, explanation_pb2.MapSize] = {
    "grid": explanation_pb2.MAP_SIZE_GRID,
    "image": explanation_pb2.MAP_SIZE_IMAGE,
}
INPUT_METHODS: dict[str, explanation_pb2.InputMethod] = {
    "gradient": explanation_pb2.INPUT_METHOD_GRADIENT,
    "smoothgrad": explanation_pb2.INPUT_METHOD_SMOOTHGRAD,
    "integrated": explanation_pb2.INPUT_METHOD_INTEGRATED,
}
CONCEPT_SCOPES: dict[str, explanation_pb2.ConceptScope] = {
    "target": explanation_pb2.CONCEPT_SCOPE_TARGET,
    "all": explanation_pb2.CONCEPT_SCOPE_ALL,
}
PRIORITIES: dict[str, service_pb2.Priority] = {
    "interactive": service_pb2.PRIORITY_INTERACTIVE,
    "background": service_pb2.PRIORITY_BACKGROUND,
}
SEARCHES: dict[str, service_pb2.SearchBy] = {
    "meaning": service_pb2.SEARCH_BY_MEANING,
    "label": service_pb2.SEARCH_BY_LABEL,
}

_LONGEST_TEXT = 1000
_LARGEST_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask about an image: everything in a request but the image, its id and its deadline."""

    bank: str
    target: explanation_pb2.Target | None
    options: explanation_pb2.ExplainOptions
    priority: service_pb2.Priority

    def request(self, source: Source, request_id: str, remaining_s: float) -> service_pb2.ExplainRequest:
        """The request about one image."""
        message = service_pb2.ExplainRequest(
            request_id=request_id,
            bank=self.bank,
            target=self.target,
            options=self.options,
            deadline=duration(remaining_s),
            priority=self.priority,
        )
        source.write(message.image)
        return message


def question(
    *,
    bank: str,
    target: int | str | None,
    top_k: int,
    order: Order,
    estimator: Estimator,
    maps: MapKind | Sequence[MapKind],
    map_size: MapSize,
    substitute: bool | None,
    colours: bool,
    parts: bool,
    input_method: InputMethod,
    concepts: ConceptScope,
    priority: Priority,
) -> Question:
    """Check a caller's options.

    Raises
    ------
    InvalidArgument
        If an option cannot be valid for any bank or model; the message names the choices.
    """
    kinds = _kinds(maps)
    on_input = explanation_pb2.MAP_KIND_INPUT in kinds
    if colours and not on_input:
        raise InvalidArgument("colours are those of input maps: ask for maps='input', too.")
    if input_method != "gradient" and not on_input:
        raise InvalidArgument("input_method is that of input maps: ask for maps='input', too.")
    if colours and input_method != "gradient":
        raise InvalidArgument("colours are those of one gradient: leave input_method at 'gradient', or colours out.")
    options = explanation_pb2.ExplainOptions(
        top_k=uint32("top_k", top_k),
        order=_choice("order", ORDERS, order),
        estimator=_choice("estimator", ESTIMATORS, estimator),
        maps=kinds,
        map_size=_choice("map_size", MAP_SIZES, map_size),
        # The pixels of input maps add up to the activation; half precision would hide it.
        map_encoding=explanation_pb2.MAP_ENCODING_FLOAT32 if on_input else explanation_pb2.MAP_ENCODING_FLOAT16,
        substitute=substitute,
        colours=colours,
        parts=parts,
        input_method=_choice("input_method", INPUT_METHODS, input_method),
        concepts=_choice("concepts", CONCEPT_SCOPES, concepts),
    )
    return Question(reference(bank), _target(target), options, _choice("priority", PRIORITIES, priority))


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Which concepts to scale: everything in a request but the image, its id and its deadline."""

    bank: str
    target: explanation_pb2.Target | None
    scales: dict[int, float]
    concepts: explanation_pb2.ConceptScope

    def request(self, source: Source, request_id: str, remaining_s: float) -> service_pb2.InterveneRequest:
        """The request about one image."""
        message = service_pb2.InterveneRequest(
            request_id=request_id,
            bank=self.bank,
            scales=self.scales,
            deadline=duration(remaining_s),
            target=self.target,
            concepts=self.concepts,
        )
        source.write(message.image)
        return message


def what_if(*, bank: str, scales: Mapping[Scalable, float], target: int | str | None, concepts: ConceptScope) -> WhatIf:
    """Check which concepts a caller would scale, and by how much.

    Raises
    ------
    InvalidArgument
        If that cannot be valid for any bank or model.
    """
    if not isinstance(scales, Mapping) or not scales:
        raise InvalidArgument("scales names at least one concept and its factor: scales={12: 0} removes concept 12.")
    checked: dict[int, float] = {}
    for concept, scale in scales.items():
        concept_id = uint32("a concept's id", concept.id if isinstance(concept, (Concept, ConceptScore)) else concept)
        if not isinstance(scale, numbers.Real) or isinstance(scale, bool) or not math.isfinite(scale):
            raise InvalidArgument(f"The scale of concept {concept_id} is a finite number, not {scale!r}.")
        if concept_id in checked:
            raise InvalidArgument(f"scales names concept {concept_id} twice.")
        checked[concept_id] = float(scale)
    return WhatIf(reference(bank), _target(target), checked, _choice("concepts", CONCEPT_SCOPES, concepts))


@dataclass(frozen=True, slots=True)
class Pair:
    """Which two classes to contrast, and how: everything in a request but the image, its id and its deadline."""

    bank: str
    target: explanation_pb2.Target | None
    other: explanation_pb2.Target | None
    options: explanation_pb2.ExplainOptions
    shift: bool

    def request(self, source: Source, request_id: str, remaining_s: float) -> service_pb2.ContrastRequest:
        """The request about one image."""
        message = service_pb2.ContrastRequest(
            request_id=request_id,
            bank=self.bank,
            target=self.target,
            other=self.other,
            options=self.options,
            deadline=duration(remaining_s),
            without_shift=not self.shift,
        )
        source.write(message.image)
        return message


def pair(
    *,
    bank: str,
    target: int | str | None,
    other: int | str | None,
    top_k: int,
    order: Order,
    maps: MapKind | Sequence[MapKind],
    map_size: MapSize,
    shift: bool,
) -> Pair:
    """Check which classes a caller would contrast, and how.

    Raises
    ------
    InvalidArgument
        If that cannot be valid for any bank or model.
    """
    classes = _target(target), _target(other, "other")
    if classes[0] is not None and classes[0] == classes[1]:
        raise InvalidArgument(f"A contrast is between two classes, not {target!r} and itself: name another.")
    options = explanation_pb2.ExplainOptions(
        top_k=uint32("top_k", top_k),
        order=_choice("order", ORDERS, order),
        maps=_kinds(maps),
        map_size=_choice("map_size", MAP_SIZES, map_size),
        map_encoding=explanation_pb2.MAP_ENCODING_FLOAT16,
    )
    return Pair(reference(bank), *classes, options, shift)


def search(
    *, text: str, by: SearchBy, model: str | None, bank: str | None, limit: int, max_exemplars: int
) -> service_pb2.SearchConceptsRequest:
    """Check what a caller looks for.

    Raises
    ------
    InvalidArgument
        If that cannot be valid for any service.
    """
    if not isinstance(text, str) or not 1 <= len(text.strip()) <= _LONGEST_TEXT:
        raise InvalidArgument(f"text holds words to look for, at most {_LONGEST_TEXT} characters.")
    if any("\ud800" <= character <= "\udfff" for character in text):  # halves of characters, which UTF-8 does not have
        raise InvalidArgument("text holds what is no text: it was read from bytes that are not UTF-8.")
    return service_pb2.SearchConceptsRequest(
        text=text.strip(),
        by=_choice("by", SEARCHES, by),
        model=model or "",
        bank="" if bank is None else reference(bank),
        limit=uint32("limit", limit),
        max_exemplars=uint32("max_exemplars", max_exemplars),
    )


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


def reference(bank: str) -> str:
    """Check that this can name a bank."""
    if not isinstance(bank, str) or not bank.strip():
        raise InvalidArgument("bank names one bank: model/layer/name, or model/layer/name@digest.")
    return bank


def uint32(name: str, value: int) -> int:
    """Check that this is a whole number that the wire can carry."""
    try:
        whole = operator.index(value)  # takes numpy's integers too
    except TypeError:
        raise InvalidArgument(f"{name} is a whole number, not {value!r}.") from None
    if not 0 <= whole <= _LARGEST_UINT32:
        raise InvalidArgument(f"{name} must be between 0 and {_LARGEST_UINT32}, not {whole}.")
    return whole


def timeout(value: float) -> float:
    """Check that this is a time to wait, in seconds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value <= _LONGEST_S:
        raise InvalidArgument(f"timeout_s is a positive number of seconds, at most {_LONGEST_S:g}; not {value!r}.")
    return float(value)


def at_least_one(name: str, value: int) -> int:
    """Check that this is a whole number above zero."""
    whole = uint32(name, value)
    if whole < 1:
        raise InvalidArgument(f"{name} must be at least 1, not {value}.")
    return whole


def metadata(application: str, request_id: str, token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call; Ray Serve routes by the application's name."""
    pairs = (("application", application), (REQUEST_ID_KEY, request_id))
    if not token:
        return pairs
    if not (token.isascii() and token.isprintable()):
        raise InvalidArgument("The token holds what no header can carry, such as a line break: strip it.")
    return (*pairs, ("authorization", f"Bearer {token}"))


def duration(seconds: float) -> Duration:
    """Seconds as the wire carries them."""
    nanos = round(seconds * 1e9)
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def _target(choice: int | str | None, name: str = "target") -> explanation_pb2.Target | None:
    """A class as the wire carries it; ``name`` is the argument's."""
    if choice is None:
        return None
    if isinstance(choice, str):
        return explanation_pb2.Target(name=choice)
    return explanation_pb2.Target(index=uint32(name, choice))


def _kinds(maps: MapKind | Sequence[MapKind]) -> list[explanation_pb2.MapKind]:
    """Kinds of maps, each once."""
    return [_choice("maps", MAP_KINDS, kind) for kind in dict.fromkeys((maps,) if isinstance(maps, str) else maps)]


def _choice(name: str, table: Mapping[str, T], value: object) -> T:
    if not isinstance(value, str) or value not in table:
        choices = ", ".join(map(repr, table))
        raise InvalidArgument(f"{name} must be one of {choices}; not {value!r}.")
    return table[value]
