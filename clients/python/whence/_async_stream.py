"""Many images over one bidirectional stream: bounded, in any order on the wire, each answered exactly once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING

from whence import _async_io as _io
from whence._errors import WhenceError
from whence._explanation import Explanation
from whence._images import Source
from whence._requests import Question
from whence._window import Outcome, Pending, Window
from whence.v1 import explanation_service_pb2 as service_pb2

if TYPE_CHECKING:
    from whence._images import ImageLike


class AsyncStream:
    """The pump between a caller's images and one stream at a time: the window decides, and this waits.

    Parameters
    ----------
    window
        The images on their way.
    greet
        Asks, before the first image, what the server is.
    read
        Takes an image and sees that it can be sent.
    open_exchange
        Opens a stream.
    alone
        Explains one image without a stream.
    """

    def __init__(
        self,
        window: Window,
        *,
        greet: Callable[[], Awaitable[None]],
        read: Callable[[ImageLike], Awaitable[Source]],
        open_exchange: Callable[[], Awaitable[_io.Exchange]],
        alone: Callable[[Source, Question, float], Awaitable[Explanation]],
    ) -> None:
        self._window = window
        self._greet = greet
        self._read = read
        self._open_exchange = open_exchange
        self._alone = alone
        self._exchange: _io.Exchange | None = None

    async def ordered(self, images: Iterable[ImageLike] | AsyncIterable[ImageLike]) -> AsyncGenerator[Outcome, None]:
        """Outcomes in the order of the images."""
        early: dict[int, Outcome] = {}
        following = 0
        async with aclosing(self.as_answered(images)) as outcomes:
            async for outcome in outcomes:
                early[outcome.index] = outcome
                self._window.held += 1
                while following in early:
                    self._window.held -= 1
                    yield early.pop(following)
                    following += 1

    async def as_answered(
        self, images: Iterable[ImageLike] | AsyncIterable[ImageLike]
    ) -> AsyncGenerator[Outcome, None]:
        """Outcomes as they come."""
        exhausted = False
        try:
            await self._greet()
            async with aclosing(_io.numbered(images)) as remaining:
                while self._window or not exhausted:
                    reading = not exhausted and self._window.has_room()
                    if reading:
                        item = await anext(remaining, None)
                        if item is None:
                            exhausted = True
                            continue
                        if (refused := await self._take(*item)) is not None:
                            yield refused
                    for outcome in await self._advance(wait=not reading):
                        yield outcome
        finally:
            await self._end_exchange()

    async def _take(self, index: int, image: ImageLike) -> Outcome | None:
        """Send one image; an outcome if it cannot be sent."""
        try:
            source = await self._read(image)
        except WhenceError as error:
            return Outcome(index, error=error)
        await self._send(self._window.add(index, source))
        return None

    async def _send(self, request: service_pb2.ExplainRequest) -> None:
        if self._exchange is None:
            self._exchange = await self._open_exchange()
        self._exchange.send(request)

    async def _advance(self, wait: bool) -> list[Outcome]:
        """Take in the next thing that happened, waiting for it where there is nothing else to do."""
        window = self._window
        if window.orphans:
            return [await self._ask_alone(window.orphans.popleft())]
        for request in window.due():
            await self._send(request)
        pause_s = window.pause_s() if wait else 0.0
        if self._exchange is None:  # all wait to be sent again
            await _io.sleep(pause_s)
            return window.expire()
        try:
            answer = await self._exchange.receive(pause_s)
        except _io.ExchangeEnded:
            await self._end_exchange()
            window.orphan()
            return []
        if answer is None:
            # Only now: what arrived in time counts, however late the caller asks for it.
            return window.expire()
        outcome = window.settle(answer)
        return [] if outcome is None else [outcome]

    async def _ask_alone(self, item: Pending) -> Outcome:
        """After a stream broke: ask one by one, so that an image that breaks streams fails by itself."""
        remaining_s = item.remaining_s()
        try:
            if remaining_s <= 0:
                raise self._window.late(item)
            explanation = await self._alone(item.source, self._window.question, remaining_s)
        except WhenceError as error:
            return self._window.close(item, error)
        return self._window.close(item, explanation)

    async def _end_exchange(self) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            await exchange.close()
