"""The records: what the domain says of concepts has a field in the contract, and every such field one in the SDK."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import whence
from concepts import bank, explanation
from whence.v1 import bank_pb2, explanation_pb2
from whence.v1 import explanation_service_pb2 as service_pb2


def names(record: Any) -> set[str]:
    """Return the names of the fields of a record, or of a message."""
    if dataclasses.is_dataclass(record):
        return {field.name for field in dataclasses.fields(record)}
    return {field.name for field in record.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("record", "message", "kept"),
    [
        (bank.Word, bank_pb2.Word, set()),
        (bank.Naming, bank_pb2.Naming, set()),
        (bank.Exemplar, bank_pb2.Exemplar, {"file"}),  # the picture itself is sent
        (bank.Concept, bank_pb2.Concept, set()),
        (explanation.ConceptScore, explanation_pb2.ConceptScore, set()),
    ],
)
def test_what_the_domain_says_is_in_the_contract(record: Any, message: Any, kept: set[str]) -> None:
    assert names(record) - names(message) == kept


@pytest.mark.parametrize(
    ("message", "record", "renamed"),
    [
        (bank_pb2.Labelling, whence.Labelling, {}),
        (bank_pb2.Word, whence.Word, {}),
        (bank_pb2.Naming, whence.Naming, {}),
        (bank_pb2.Exemplar, whence.Exemplar, {}),
        (bank_pb2.Bank, whence.Bank, {}),
        (explanation_pb2.ConceptScore, whence.ConceptScore, {}),
        (service_pb2.UnsearchedBank, whence.UnsearchedBank, {}),
        (service_pb2.SearchConceptsResponse, whence.SearchResults, {"concepts": "found"}),
    ],
)
def test_what_is_in_the_contract_is_in_the_sdk(message: Any, record: Any, renamed: dict[str, str]) -> None:
    asked = {"text", "by"} if record is whence.SearchResults else set()
    assert {renamed.get(name, name) for name in names(message)} | asked == names(record)


def test_a_concept_of_the_sdk_knows_its_bank() -> None:
    assert names(whence.Concept) - names(bank_pb2.Concept) == {"bank", "bank_digest"}
    assert names(bank_pb2.Concept) <= names(whence.Concept)
    assert names(service_pb2.FoundConcept) == names(whence.FoundConcept) | {"bank"}  # which is of the concept


def test_every_kind_of_search_has_one_name() -> None:
    values = {name.removeprefix("SEARCH_BY_").lower() for name, _ in service_pb2.SearchBy.items()} - {"unspecified"}
    assert values == {"meaning", "label"}
