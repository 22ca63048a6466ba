"""What users write, as mypy sees it; `test_typing` asks, and nothing runs this."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import whence
from whence.testing import FakeServer, make_explanation


def token() -> str:
    return "secret"


async def later_token() -> str:
    return "secret"


def photos() -> Iterator[Path]:
    yield Path("photo.jpg")


async def arriving() -> AsyncIterator[NDArray[np.uint8]]:
    yield np.zeros((2, 2, 3), np.uint8)


def ask(client: whence.Client) -> None:
    explanation = client.explain("photo.jpg", bank="a/b/c", maps=("activation", "input"), priority="background")
    assert_type(explanation, whence.Explanation)
    assert_type(explanation.concepts, tuple[whence.ConceptScore, ...])
    assert_type(explanation.concepts[0].maps["activation"].values, NDArray[np.float32])
    assert_type(explanation.faithfulness.relative_error, float | None)
    assert_type(client.explain_many(photos(), bank="a/b/c"), Generator[whence.Outcome, None, None])
    for outcome in client.explain_many([b"", np.zeros((2, 2))], bank="a/b/c", ordered=False, max_in_flight=8):
        assert_type(outcome.error, whence.WhenceError | None)
        assert_type(outcome.result(), whence.Explanation)
    scales = dict.fromkeys(explanation.concepts, 0.0)
    assert_type(client.intervene(b"", bank="a/b/c", scales=scales), whence.Intervention)
    assert_type(client.intervene(b"", bank="a/b/c", scales={3: 0}).before[0].probability, float)
    assert_type(client.contrast(b"", "tabby", 3, bank="a/b/c"), whence.Contrast)
    assert_type(client.models(), tuple[whence.Model, ...])
    assert_type(client.banks("resnet50"), tuple[whence.Bank, ...])
    assert_type(client.bank("a/b/c").labelling, whence.Labelling | None)
    assert_type(client.concept("a/b/c", 3, max_exemplars=2), whence.Concept)
    for found in client.search("stripes", "label"):
        assert_type(found, whence.FoundConcept)
    assert_type(client.server_info().limits.deadline_s, float)


async def ask_later(client: whence.AsyncClient) -> None:
    assert_type(await client.explain("photo.jpg", bank="a/b/c"), whence.Explanation)
    assert_type(client.explain_many(arriving(), bank="a/b/c"), AsyncGenerator[whence.Outcome, None])
    async for outcome in client.explain_many(photos(), bank="a/b/c"):
        assert_type(outcome.explanation, whence.Explanation | None)
    assert_type(await client.intervene(b"", bank="a/b/c", scales={3: 0}), whence.Intervention)
    assert_type(await client.contrast(b"", bank="a/b/c"), whence.Contrast)
    assert_type(await client.models(), tuple[whence.Model, ...])
    assert_type(await client.banks(), tuple[whence.Bank, ...])
    assert_type(await client.bank("a/b/c"), whence.Bank)
    assert_type(await client.concept("a/b/c", 3), whence.Concept)
    assert_type(await client.search("stripes"), whence.SearchResults)
    assert_type(await client.server_info(), whence.ServerInfo)


async def connect() -> None:
    tls = whence.TLS(authorities=Path("ca.pem"), certificate="own.pem", key="own.key")
    async with whence.AsyncClient(token=later_token, tls=tls, check_version=False) as later:
        assert_type(later, whence.AsyncClient)
    with whence.Client("localhost:9000", token=token, tls=True, retry_budget=3) as client:
        assert_type(client, whence.Client)
    try:
        ask(client)
    except whence.Overloaded as error:
        assert_type(error.retry_after_s, float | None)
        assert_type(error.metadata, dict[str, str])
    with FakeServer(lambda request: make_explanation(), server_info=whence.Unavailable("starting")) as server:
        assert_type(server.calls[0].time_remaining_s, float | None)


def mistakes(client: whence.Client, later: whence.AsyncClient) -> None:
    client.explain("photo.jpg")  # type: ignore[call-arg]
    client.explain("photo.jpg", bank="a/b/c", order="size")  # type: ignore[arg-type]
    client.explain("photo.jpg", bank="a/b/c", priority="urgent")  # type: ignore[arg-type]
    client.explain_many(arriving(), bank="a/b/c")  # type: ignore[arg-type]
    whence.Client(token=later_token)  # type: ignore[arg-type]
    client.server_info().version = "2"  # type: ignore[misc]
    len(later.models())  # type: ignore[arg-type]
