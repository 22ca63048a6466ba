"""The gRPC servicer: convert, call, convert. Nothing that a handler raises passes it untyped."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2

from concepts.errors import InvalidInput, NotFound, Overloaded
from service.convert import priority_from
from service.errors import Fault, fault
from service.handlers import Handlers
from service.metrics import Recorder
from service.settings import Settings
from service.stream import answers
from service.wire import SERVICE_NAME, Malformed
from whence.v1 import explanation_pb2
from whence.v1 import explanation_service_pb2 as pb

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)
Timed = TypeVar("Timed", pb.ContrastResponse, pb.InterveneResponse)

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")
_WATCH_S = 5.0


class Context(Protocol):
    """What the servicer uses of a gRPC call; Ray Serve's context and gRPC's own both fit."""

    def set_code(self, code: grpc.StatusCode, /) -> None: ...

    def set_details(self, details: str, /) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: Any, /) -> None: ...

    def trailing_metadata(self) -> Any: ...


class Ingress:
    """Answers every RPC of the service, and of ``grpc.health.v1``.

    Parameters
    ----------
    settings
        For the limits on streams.
    handlers
        What the RPCs do.
    recorder
        Keeps count.

    Notes
    -----
    Ray Serve sends an exception's trace and paths to the caller, and drops trailing metadata when a handler raises.
    So everything is caught here: code, details and trailing metadata are set, and an empty message is *returned*.
    """

    def __init__(self, settings: Settings, handlers: Handlers, recorder: Recorder) -> None:
        self._limits = settings.limits
        self._handlers = handlers
        self._recorder = recorder
        self._streams = 0

    # whence.v1.ExplanationService; Ray Serve calls methods by the names of the RPCs.

    async def Explain(self, request: pb.ExplainRequest, grpc_context: Context) -> pb.ExplainResponse:  # noqa: N802
        """Explain one image."""

        async def explain(request: pb.ExplainRequest) -> pb.ExplainResponse:
            return pb.ExplainResponse(request_id=request.request_id, explanation=await self._explained(request))

        return await self._unary("Explain", request, grpc_context, explain, pb.ExplainResponse)

    async def ExplainStream(  # noqa: N802
        self, requests: AsyncIterator[pb.ExplainStreamRequest], grpc_context: Context
    ) -> AsyncIterator[pb.ExplainStreamResponse]:
        """Explain many images; a failure is an answer like any other."""
        if self._streams >= self._limits.streams:
            problem = Overloaded("The server has as many streams as it accepts; try again later.", retry_after_s=1.0)
            _fail(grpc_context, fault(problem, _request_id("", grpc_context)))
            self._recorder.request("ExplainStream", "RESOURCE_EXHAUSTED")
            return
        self._streams += 1
        try:
            async for reply in answers(requests, self._stream_answer, in_flight=self._limits.stream_in_flight):
                yield reply
        except Exception as error:  # noqa: BLE001 - as in a single call, nothing may pass
            _fail(grpc_context, fault(error, _request_id("", grpc_context)))
        finally:
            self._streams -= 1

    async def Contrast(self, request: pb.ContrastRequest, grpc_context: Context) -> pb.ContrastResponse:  # noqa: N802
        """Say why one class and not another."""
        return await self._unary(
            "Contrast", request, grpc_context, self._timed(self._handlers.contrast), pb.ContrastResponse
        )

    async def Intervene(self, request: pb.InterveneRequest, grpc_context: Context) -> pb.InterveneResponse:  # noqa: N802
        """Say what the model would answer if chosen concepts were weaker or stronger."""
        return await self._unary(
            "Intervene", request, grpc_context, self._timed(self._handlers.intervene), pb.InterveneResponse
        )

    async def ListModels(self, request: pb.ListModelsRequest, grpc_context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """List all models."""
        return await self._unary("ListModels", request, grpc_context, self._handlers.list_models, pb.ListModelsResponse)

    async def ListBanks(self, request: pb.ListBanksRequest, grpc_context: Context) -> pb.ListBanksResponse:  # noqa: N802
        """List the current version of every bank."""
        return await self._unary("ListBanks", request, grpc_context, self._handlers.list_banks, pb.ListBanksResponse)

    async def GetBank(self, request: pb.GetBankRequest, grpc_context: Context) -> pb.GetBankResponse:  # noqa: N802
        """Describe one bank."""
        return await self._unary("GetBank", request, grpc_context, self._handlers.get_bank, pb.GetBankResponse)

    async def GetConcept(self, request: pb.GetConceptRequest, grpc_context: Context) -> pb.GetConceptResponse:  # noqa: N802
        """Describe one concept, with its exemplars."""
        return await self._unary("GetConcept", request, grpc_context, self._handlers.get_concept, pb.GetConceptResponse)

    async def SearchConcepts(  # noqa: N802
        self, request: pb.SearchConceptsRequest, grpc_context: Context
    ) -> pb.SearchConceptsResponse:
        """Find concepts by words."""
        return await self._unary(
            "SearchConcepts", request, grpc_context, self._handlers.search_concepts, pb.SearchConceptsResponse
        )

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, grpc_context: Context
    ) -> pb.GetServerInfoResponse:
        """Say what the server is, and what it accepts."""
        return await self._unary(
            "GetServerInfo", request, grpc_context, self._handlers.get_server_info, pb.GetServerInfoResponse
        )

    # grpc.health.v1.Health: a replica that is reached at all has loaded its banks, so it is serving.

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Say whether a service is ready."""
        if request.service not in ("", SERVICE_NAME):
            _fail(grpc_context, fault(NotFound("There is no such service here."), _request_id("", grpc_context)))
            return health_pb2.HealthCheckResponse()
        return _SERVING

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, grpc_context: Context
    ) -> health_pb2.HealthListResponse:
        """Say which services are ready."""
        return health_pb2.HealthListResponse(statuses={"": _SERVING, SERVICE_NAME: _SERVING})

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Say whether a service is ready, for as long as the caller listens."""
        known = request.service in ("", SERVICE_NAME)
        yield _SERVING if known else _SERVICE_UNKNOWN
        while True:
            await asyncio.sleep(_WATCH_S)

    # Within

    async def _explained(self, request: pb.ExplainRequest) -> explanation_pb2.Explanation:
        """Explain one image, and note how long its stages took."""
        explanation = await self._handlers.explain(request)
        self._recorder.stages(explanation.timings, priority_from(request))
        return explanation

    def _timed(self, handle: Callable[[Any], Awaitable[Timed]]) -> Callable[[Any], Awaitable[Timed]]:
        """Have a handler's replies carry the request id, and their stages noted."""

        async def timed(request: Any) -> Timed:
            reply = await handle(request)
            self._recorder.stages(reply.timings, "interactive")
            reply.request_id = request.request_id
            return reply

        return timed

    async def _unary(
        self,
        rpc: str,
        request: Request | Malformed,
        context: Context,
        handle: Callable[[Request], Awaitable[Reply]],
        empty: Callable[[], Reply],
    ) -> Reply:
        """Answer one call, whatever happens."""
        request_id = _request_id(getattr(request, "request_id", ""), context)
        outcome = await self._outcome(rpc, request, request_id, handle)
        if isinstance(outcome, Fault):
            _fail(context, outcome)
            return empty()
        return outcome

    async def _stream_answer(self, message: pb.ExplainStreamRequest | Malformed) -> pb.ExplainStreamResponse:
        """Answer one message of a stream, whatever happens."""
        request = message if isinstance(message, Malformed) else message.request
        request_id = _request_id(getattr(request, "request_id", ""), None)
        outcome = await self._outcome("ExplainStream", request, request_id, self._explained)
        if isinstance(outcome, Fault):
            return pb.ExplainStreamResponse(request_id=request_id, error=outcome.failure())
        return pb.ExplainStreamResponse(request_id=request_id, explanation=outcome)

    async def _outcome(
        self, rpc: str, request: Request | Malformed, request_id: str, handle: Callable[[Request], Awaitable[Reply]]
    ) -> Reply | Fault:
        """Return the reply, or what is to be said instead."""
        code = code_pb2.CANCELLED
        try:
            if isinstance(request, Malformed):
                raise InvalidInput(f"The request is not a {request.message}; use stubs of this server's version.")
            if hasattr(request, "request_id"):
                _check_request_id(request.request_id)
                request.request_id = request_id
            reply = await handle(request)
            code = code_pb2.OK
            return reply
        except Exception as error:  # noqa: BLE001 - the one place where nothing may pass
            problem = fault(error, request_id)
            code = problem.code
            return problem
        finally:
            self._recorder.request(rpc, code_pb2.Code.Name(code))


_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)


def _fail(context: Context, problem: Fault) -> None:
    """Have gRPC say what went wrong."""
    context.set_code(_CODES[problem.code])
    context.set_details(problem.message)
    context.set_trailing_metadata(problem.trailers())


def _check_request_id(given: str) -> None:
    if given and _REQUEST_ID.fullmatch(given) is None:
        raise InvalidInput("request_id must be at most 128 printable ASCII characters.")


def _request_id(given: str, context: Context | None) -> str:
    """Return the caller's id if it can be used, or else Ray's, or else a new one."""
    if _REQUEST_ID.fullmatch(given):
        return given
    rays = dict(context.trailing_metadata() or ()).get("request_id") if context is not None else None
    return str(rays) if rays and _REQUEST_ID.fullmatch(str(rays)) else uuid.uuid4().hex
