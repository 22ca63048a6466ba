"""What waiting is to `Client`: threads. ``whence._async_io`` has the same names for `AsyncClient`."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeAlias, TypeVar

import grpc

from whence import _images, _status
from whence._channel import ChannelSettings, client_closed
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

T = TypeVar("T")

Token: TypeAlias = str | Callable[[], str]
Lock = threading.Lock
sleep = time.sleep
read_image = _images.read


class Connection:
    """A channel to a service."""

    def __init__(self, settings: ChannelSettings) -> None:
        self._channel = settings.open(grpc.insecure_channel, grpc.secure_channel)
        self.stub: Any = service_grpc.ExplanationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        self._channel.close()

    def invoke(
        self, method: str, request: Any, *, timeout_s: float, metadata: tuple[tuple[str, str], ...], request_id: str
    ) -> Any:
        """Make one call.

        Raises
        ------
        WhenceError
            What it ended with.
        """
        try:
            return getattr(self.stub, method)(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as failure:
            raise _status.from_rpc_error(failure, request_id) from failure
        except ValueError as failure:  # all that gRPC says of a channel that was closed meanwhile
            raise client_closed() from failure


def acquire(lock: threading.Lock, timeout_s: float) -> bool:
    """Take a lock; False if it was not free in time."""
    return lock.acquire(timeout=timeout_s)


def ask(token: Token | None) -> str | None:
    """The token to send now."""
    return token() if callable(token) else token


def numbered(items: Iterable[T]) -> Generator[tuple[int, T], None, None]:
    """Items with their places, from 0."""
    yield from enumerate(items)


class ExchangeEnded(Exception):
    """No more answers will come."""


class Exchange:
    """One open stream; a thread moves its answers into a queue."""

    def __init__(self, method: Callable[..., Any], metadata: tuple[tuple[str, str], ...]) -> None:
        self._inbox: queue.SimpleQueue[service_pb2.ExplainStreamResponse | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[service_pb2.ExplainStreamRequest | None] = queue.SimpleQueue()
        try:
            self._call = method(iter(self._outbox.get, None), metadata=metadata)
        except ValueError as failure:
            raise client_closed() from failure
        self._listener = threading.Thread(target=self._listen, name="whence-stream", daemon=True)
        self._listener.start()

    def send(self, request: service_pb2.ExplainRequest) -> None:
        """Send a request, soon."""
        self._outbox.put(service_pb2.ExplainStreamRequest(request=request))

    def receive(self, timeout_s: float) -> service_pb2.ExplainStreamResponse | None:
        """The next answer; None if there is none in time.

        Raises
        ------
        ExchangeEnded
            If the stream ended.
        """
        try:
            answer = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if answer is None:
            raise ExchangeEnded
        return answer

    def close(self) -> None:
        """End the stream; what was not answered is cancelled."""
        self._outbox.put(None)
        self._call.cancel()
        self._listener.join(timeout=1.0)

    def _listen(self) -> None:
        try:
            for answer in self._call:
                self._inbox.put(answer)
        except grpc.RpcError:
            pass  # what it held is asked again one by one, which tells each image's own failure
        finally:
            self._inbox.put(None)
