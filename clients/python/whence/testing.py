"""A Whence service for the tests of programs that use one: real gRPC on a free port of this machine, canned answers.

>>> import numpy as np, whence
>>> from whence.testing import FakeServer
>>> with FakeServer() as server, whence.Client(server.address) as client:
...     explanation = client.explain(np.zeros((32, 32, 3), np.uint8), bank="any/layer/bank")
...     server.fail_next(whence.NotFound("no such bank", reason="UNKNOWN_BANK"))
...     try:
...         client.explain(np.zeros((32, 32, 3), np.uint8), bank="any/layer/other")
...     except whence.NotFound as error:
...         print(explanation.target.name, error.reason)
tabby UNKNOWN_BANK
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from whence import _fake_answers, _requests, _status
from whence._contrast import Contrast
from whence._errors import NotFound, WhenceError
from whence._explanation import Explanation
from whence._fake_records import (
    make_concept,
    make_contrast,
    make_explanation,
    make_intervention,
    make_search,
    make_server_info,
)
from whence._intervention import Intervention
from whence._inventory import Bank, Concept, Model
from whence._search import SearchResults
from whence._server_info import ServerInfo
from whence.v1 import explanation_pb2
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

__all__ = [
    "Call",
    "FakeServer",
    "make_concept",
    "make_contrast",
    "make_explanation",
    "make_intervention",
    "make_search",
    "make_server_info",
    "serve",
]

A = TypeVar("A", bound=Message)


@contextmanager
def serve(
    servicer: service_grpc.ExplanationServiceServicer,
    *,
    port: int = 0,
    credentials: grpc.ServerCredentials | None = None,
    max_workers: int = 8,
) -> Iterator[str]:
    """Serve any implementation of the contract on this machine; gives the address.

    Parameters
    ----------
    port
        0 for any that is free.
    credentials
        For an encrypted connection.
    max_workers
        How many calls are answered at a time.
    """
    server = grpc.server(
        ThreadPoolExecutor(max_workers),
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    service_grpc.add_ExplanationServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    target = f"localhost:{port}"
    bound = server.add_secure_port(target, credentials) if credentials else server.add_insecure_port(target)
    server.start()
    try:
        yield f"localhost:{bound}"
    finally:
        server.stop(grace=None).wait()


@dataclass(frozen=True, slots=True)
class Call:
    """One call, or one request of a stream, as the fake service saw it."""

    method: str
    """E.g. ``Explain``."""
    request: Any
    metadata: dict[str, str]
    time_remaining_s: float | None
    """Of the caller's gRPC deadline, in seconds."""


class FakeServer:
    """A service with canned answers that remembers what it was asked; a context manager.

    Parameters
    ----------
    explain
        Makes the answer to an `ExplainRequest`; may raise a `WhenceError`, which travels to the caller as the service
        would send it. Default: `make_explanation`.
    intervene
        The same for an `InterveneRequest`. Default: `make_intervention`.
    contrast
        The same for a `ContrastRequest`. Default: `make_contrast`.
    search
        The same for a `SearchConceptsRequest`. Default: `make_search`.
    models, banks, concepts
        What the service holds.
    server_info
        What the service says that it is; a `WhenceError` travels to the caller. Clients ask it before their first call,
        which is neither among ``calls`` nor fails by `fail_next`. Default: `make_server_info`.
    shuffle
        Answer the requests of a stream in groups, each backwards.
    identity
        Files of a private key and a certificate (PEM), for an encrypted connection.
    client_authorities
        File of the authorities (PEM) that must vouch for clients (mutual TLS).
    """

    def __init__(
        self,
        explain: Callable[[service_pb2.ExplainRequest], Explanation] | None = None,
        *,
        intervene: Callable[[service_pb2.InterveneRequest], Intervention] | None = None,
        contrast: Callable[[service_pb2.ContrastRequest], Contrast] | None = None,
        search: Callable[[service_pb2.SearchConceptsRequest], SearchResults] | None = None,
        models: Sequence[Model] = (),
        banks: Sequence[Bank] = (),
        concepts: Sequence[Concept] = (),
        server_info: ServerInfo | WhenceError | None = None,
        shuffle: bool = False,
        identity: tuple[Path, Path] | None = None,
        client_authorities: Path | None = None,
    ) -> None:
        self.address = ""
        """``host:port``, once started."""
        self.calls: list[Call] = []
        """All that was asked, oldest first."""
        self.models = {model.name: model for model in models}
        self.banks = {bank.reference: bank for bank in banks}
        self.concepts = {(concept.bank, concept.id): concept for concept in concepts}
        self.explain = explain or (lambda request: make_explanation())
        self.intervene = intervene or (lambda request: make_intervention())
        self.contrast = contrast or (lambda request: make_contrast())
        self.search = search or (lambda request: make_search())
        self.server_info = server_info or make_server_info()
        self.shuffle = shuffle
        self._failures: deque[WhenceError] = deque()
        self._lock = threading.Lock()
        self._serving = serve(_Servicer(self), credentials=_credentials(identity, client_authorities))

    def __enter__(self) -> FakeServer:
        self.address = self._serving.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._serving.__exit__(kind, error, trace)

    def fail_next(self, error: WhenceError, *, times: int = 1) -> None:
        """Answer the next calls, or requests of a stream, with a failure."""
        with self._lock:
            self._failures.extend([error] * times)

    def note(self, call: Call) -> None:
        """Remember a call, and raise the failure that is due."""
        with self._lock:
            self.calls.append(call)
            failure = self._failures.popleft() if self._failures else None
        if failure is not None:
            raise failure


class _Servicer(service_grpc.ExplanationServiceServicer):
    """The contract, answered by a fake."""

    # ruff: noqa: N802  (the contract names the methods)

    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def Explain(
        self, request: service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> service_pb2.ExplainResponse:
        def answer() -> service_pb2.ExplainResponse:
            return service_pb2.ExplainResponse(request_id=request.request_id, explanation=self._explanation(request))

        return self._answer("Explain", request, context, answer)

    def ExplainStream(
        self, request_iterator: Iterator[service_pb2.ExplainStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ExplainStreamResponse]:
        for group in _groups(request_iterator, wait_s=0.02 if self._fake.shuffle else 0.0):
            for message in reversed(group) if self._fake.shuffle else group:
                request = message.request
                answer = service_pb2.ExplainStreamResponse(request_id=request.request_id)
                try:
                    self._fake.note(_call("ExplainStream", request, context))
                    answer.explanation.CopyFrom(self._explanation(request))
                except WhenceError as error:
                    answer.error.CopyFrom(_failure(error))
                yield answer

    def Intervene(
        self, request: service_pb2.InterveneRequest, context: grpc.ServicerContext
    ) -> service_pb2.InterveneResponse:
        def answer() -> service_pb2.InterveneResponse:
            message = _fake_answers.intervention(self._fake.intervene(request))
            message.request_id = request.request_id
            return message

        return self._answer("Intervene", request, context, answer)

    def Contrast(
        self, request: service_pb2.ContrastRequest, context: grpc.ServicerContext
    ) -> service_pb2.ContrastResponse:
        def answer() -> service_pb2.ContrastResponse:
            record = _fake_answers.contrast_asked_for(self._fake.contrast(request), request)
            message = _fake_answers.contrast(record, request.options.map_encoding)
            message.request_id = request.request_id
            return message

        return self._answer("Contrast", request, context, answer)

    def ListModels(
        self, request: service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> service_pb2.ListModelsResponse:
        def answer() -> service_pb2.ListModelsResponse:
            return service_pb2.ListModelsResponse(models=map(_fake_answers.model, self._fake.models.values()))

        return self._answer("ListModels", request, context, answer)

    def ListBanks(
        self, request: service_pb2.ListBanksRequest, context: grpc.ServicerContext
    ) -> service_pb2.ListBanksResponse:
        def answer() -> service_pb2.ListBanksResponse:
            banks = [bank for bank in self._fake.banks.values() if request.model in ("", bank.model)]
            return service_pb2.ListBanksResponse(banks=map(_fake_answers.bank, banks))

        return self._answer("ListBanks", request, context, answer)

    def GetBank(
        self, request: service_pb2.GetBankRequest, context: grpc.ServicerContext
    ) -> service_pb2.GetBankResponse:
        def answer() -> service_pb2.GetBankResponse:
            bank = self._fake.banks.get(request.bank.partition("@")[0])
            if bank is None:
                raise NotFound(f"There is no bank {request.bank}.", reason="UNKNOWN_BANK")
            return service_pb2.GetBankResponse(bank=_fake_answers.bank(bank))

        return self._answer("GetBank", request, context, answer)

    def GetConcept(
        self, request: service_pb2.GetConceptRequest, context: grpc.ServicerContext
    ) -> service_pb2.GetConceptResponse:
        def answer() -> service_pb2.GetConceptResponse:
            concept = self._fake.concepts.get((request.bank.partition("@")[0], request.concept_id))
            if concept is None:
                raise NotFound(f"{request.bank} has no concept {request.concept_id}.", reason="UNKNOWN_CONCEPT")
            limit = request.max_exemplars if request.HasField("max_exemplars") else None
            return _fake_answers.concept(concept, limit)

        return self._answer("GetConcept", request, context, answer)

    def SearchConcepts(
        self, request: service_pb2.SearchConceptsRequest, context: grpc.ServicerContext
    ) -> service_pb2.SearchConceptsResponse:
        return self._answer(
            "SearchConcepts", request, context, lambda: _fake_answers.search(self._fake.search(request), request)
        )

    def GetServerInfo(
        self, request: service_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> service_pb2.GetServerInfoResponse:
        said = self._fake.server_info
        if isinstance(said, WhenceError):
            _abort(context, said)
        return _fake_answers.server_info(said)

    def _explanation(self, request: service_pb2.ExplainRequest) -> explanation_pb2.Explanation:
        """What the fake answers, as far as it was asked for."""
        record = _fake_answers.asked_for(self._fake.explain(request), request.options)
        return _fake_answers.explanation(record, request.options.map_encoding)

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext, answer: Callable[[], A]) -> A:
        try:
            self._fake.note(_call(method, request, context))
            return answer()
        except WhenceError as error:
            _abort(context, error)


def _credentials(identity: tuple[Path, Path] | None, authorities: Path | None) -> grpc.ServerCredentials | None:
    if identity is None:
        return None
    key, certificate = (file.read_bytes() for file in identity)
    roots = authorities.read_bytes() if authorities else None
    return grpc.ssl_server_credentials([(key, certificate)], roots, require_client_auth=roots is not None)


def _call(method: str, request: Any, context: grpc.ServicerContext) -> Call:
    metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
    return Call(method, request, metadata, context.time_remaining())


def _groups(items: Iterator[A], wait_s: float) -> Iterator[list[A]]:
    """All that has come by now, again and again; ``wait_s`` lets groups grow, in seconds."""
    arrived: queue.SimpleQueue[A | None] = queue.SimpleQueue()

    def listen() -> None:
        try:
            for item in items:
                arrived.put(item)
        except grpc.RpcError:
            pass  # the caller went away
        finally:
            arrived.put(None)

    threading.Thread(target=listen, name="whence-fake", daemon=True).start()
    while True:
        group = [arrived.get()]
        time.sleep(wait_s)
        while not arrived.empty():
            group.append(arrived.get())
        yield [item for item in group if item is not None]
        if None in group:
            return


def _failure(error: WhenceError) -> service_pb2.Failure:
    """A failure as it travels within a stream."""
    return service_pb2.Failure(
        code=grpc.StatusCode[error.code].value[0],
        message=error.message,
        reason=error.reason,
        metadata=error.metadata,
        retry_after=None if error.retry_after_s is None else _requests.duration(error.retry_after_s),
    )


def _abort(context: grpc.ServicerContext, error: WhenceError) -> NoReturn:
    context.set_trailing_metadata(((_status.STATUS_DETAILS_KEY, _packed_status(error)),))
    context.abort(grpc.StatusCode[error.code], error.message)


def _packed_status(error: WhenceError) -> bytes:
    """A failure as it travels in trailing metadata."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=_status.ERROR_DOMAIN, metadata=error.metadata)
    ]
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_requests.duration(error.retry_after_s)))
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=error.message)
    for detail in details:
        status.details.add().Pack(detail)
    packed: bytes = status.SerializeToString()
    return packed
