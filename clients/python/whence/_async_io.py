"""What waiting is to `AsyncClient`: an event loop. ``whence._sync_io`` has the same names for `Client`."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from whence import _images, _status
from whence._channel import ChannelSettings, client_closed
from whence._errors import Cancelled, FailedPrecondition
from whence.v1 import explanation_service_pb2 as service_pb2
from whence.v1 import explanation_service_pb2_grpc as service_grpc

if TYPE_CHECKING:
    from whence._images import ImageLike

T = TypeVar("T")

Token: TypeAlias = str | Callable[[], str | Awaitable[str]]
Lock = asyncio.Lock
sleep = asyncio.sleep


async def read_image(image: ImageLike) -> _images.Source:
    """Take an image in any of its forms; files are read and pictures packed beside the loop."""
    if isinstance(image, bytes):
        return _images.read(image)
    return await asyncio.to_thread(_images.read, image)


class Connection:
    """A channel to a service, opened in the loop that first uses it."""

    def __init__(self, settings: ChannelSettings) -> None:
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._closed = False

    @property
    def stub(self) -> Any:
        """The service's methods."""
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._loop = loop
            self._channel = self._settings.open(grpc.aio.insecure_channel, grpc.aio.secure_channel)
            self._stub = service_grpc.ExplanationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        elif self._loop is not loop:
            raise FailedPrecondition(
                "The client is used in another event loop than before: make one in each loop.", reason="OTHER_LOOP"
            )
        return self._stub

    async def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def invoke(
        self, method: str, request: Any, *, timeout_s: float, metadata: tuple[tuple[str, str], ...], request_id: str
    ) -> Any:
        """Make one call.

        Raises
        ------
        WhenceError
            What it ended with.
        """
        try:
            return await getattr(self.stub, method)(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as failure:
            raise _status.from_rpc_error(failure, request_id) from failure
        except grpc.aio.UsageError as failure:  # the channel was closed meanwhile
            raise client_closed() from failure
        except asyncio.CancelledError as failure:
            if not self._closed or _is_task_cancelled():
                raise
            # gRPC's way to say that the channel was closed.
            raise Cancelled("The client was closed before the answer came.", request_id=request_id) from failure


def _is_task_cancelled() -> bool:
    """Whether somebody cancelled the running task; Python 3.10 cannot tell, and is taken to say no."""
    task = asyncio.current_task()
    return sys.version_info >= (3, 11) and task is not None and task.cancelling() > 0


async def acquire(lock: asyncio.Lock, timeout_s: float) -> bool:
    """Take a lock; False if it was not free in time."""
    try:
        return await asyncio.wait_for(lock.acquire(), timeout_s)
    except asyncio.TimeoutError:
        return False


async def ask(token: Token | None) -> str | None:
    """The token to send now."""
    value = token() if callable(token) else token
    return await value if inspect.isawaitable(value) else value


async def numbered(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[tuple[int, T], None]:
    """Items with their places, from 0."""
    if isinstance(items, AsyncIterable):
        index = 0
        async for item in items:
            yield index, item
            index += 1
    else:
        for numbered_item in enumerate(items):
            yield numbered_item


class ExchangeEnded(Exception):
    """No more answers will come."""


class Exchange:
    """One open stream; one task sends, another moves answers into a queue."""

    def __init__(self, method: Callable[..., Any], metadata: tuple[tuple[str, str], ...]) -> None:
        self._inbox: deque[service_pb2.ExplainStreamResponse] = deque()
        self._outbox: asyncio.Queue[service_pb2.ExplainRequest] = asyncio.Queue()
        self._ended = False
        self._news: asyncio.Future[None] | None = None
        try:
            self._call = method(metadata=metadata)
        except grpc.aio.UsageError as failure:
            raise client_closed() from failure
        self._speaker = asyncio.create_task(self._speak(), name="whence-stream-out")
        self._listener = asyncio.create_task(self._listen(), name="whence-stream-in")

    def send(self, request: service_pb2.ExplainRequest) -> None:
        """Send a request, soon."""
        self._outbox.put_nowait(request)

    async def receive(self, timeout_s: float) -> service_pb2.ExplainStreamResponse | None:
        """The next answer; None if there is none in time.

        Raises
        ------
        ExchangeEnded
            If the stream ended.
        """
        if not self._inbox and not self._ended:
            self._news = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._news,), timeout=timeout_s)
        if self._inbox:
            return self._inbox.popleft()
        if self._ended:
            raise ExchangeEnded
        return None

    async def close(self) -> None:
        """End the stream; what was not answered is cancelled."""
        self._call.cancel()
        self._speaker.cancel()
        self._listener.cancel()
        await asyncio.wait((self._speaker, self._listener))

    async def _speak(self) -> None:
        while True:
            request = await self._outbox.get()
            try:
                await self._call.write(service_pb2.ExplainStreamRequest(request=request))
            except (grpc.RpcError, asyncio.InvalidStateError):
                return  # the listener hears of it, too

    async def _listen(self) -> None:
        try:
            async for answer in self._call:
                self._inbox.append(answer)
                self._wake()
        except (grpc.RpcError, asyncio.CancelledError):
            pass  # what it held is asked again one by one, which tells each image's own failure
        finally:
            self._ended = True
            self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
