"""How gRPC bytes become requests: as generated, except that malformed bytes get a typed answer.

A request that is not valid protobuf would end in gRPC's own INTERNAL before any of our code runs. Here it becomes a
`Malformed` instead, which the ingress answers like every other bad input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from whence.v1 import explanation_service_pb2

APPLICATION = "whence"
"""Name of the Serve application: what clients send as ``application`` metadata."""

SERVICE = explanation_service_pb2.DESCRIPTOR.services_by_name["ExplanationService"]
SERVICE_NAME: str = SERVICE.full_name


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a request whose bytes are not the message that they should be."""

    message: str
    """Full name of the message that was expected."""


def add_explanation_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Register all RPCs of the service on a server; Ray Serve takes this function by its name."""
    handlers = {method.name: _handler(method, getattr(servicer, method.name)) for method in SERVICE.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


def _handler(method: Any, behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    kind = (
        grpc.stream_stream_rpc_method_handler
        if method.client_streaming and method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return kind(
        behaviour,
        request_deserializer=_tolerant(GetMessageClass(method.input_type)),
        response_serializer=_serialize,
    )


def _tolerant(message: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return message.FromString(data)
        except DecodeError:
            return Malformed(message.DESCRIPTOR.full_name)

    return parse


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
