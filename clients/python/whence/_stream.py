"""Many images over one bidirectional stream: bounded, in any order on the wire, each answered exactly once."""
# Made from _async_stream.py by `make sync-client`: change that.

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from whence import _sync_io as _io
from whence._errors import WhenceError
from whence._explanation import Explanation
from whence._images import Source
from whence._requests import Question
from whence._window import Outcome, Pending, Window
from whence.v1 import explanation_service_pb2 as service_pb2

if TYPE_CHECKING:
    from whence._images import ImageLike


class Stream:
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
        greet: Callable[[], None],
        read: Callable[[ImageLike], Source],
        open_exchange: Callable[[], _io.Exchange],
        alone: Callable[[Source, Question, float], Explanation],
    ) -> None:
        self._window = window
        self._greet = greet
        self._read = read
        self._open_exchange = open_exchange
        self._alone = alone
        self._exchange: _io.Exchange | None = None

    def ordered(self, images: Iterable[ImageLike]) -> Generator[Outcome, None, None]:
        """Outcomes in the order of the images."""
        early: dict[int, Outcome] = {}
        following = 0
        with closing(self.as_answered(images)) as outcomes:
            for outcome in outcomes:
                early[outcome.index] = outcome
                self._window.held += 1
                while following in early:
                    self._window.held -= 1
                    yield early.pop(following)
                    following += 1

    def as_answered(self, images: Iterable[ImageLike]) -> Generator[Outcome, None, None]:
        """Outcomes as they come."""
        exhausted = False
        try:
            self._greet()
            with closing(_io.numbered(images)) as remaining:
                while self._window or not exhausted:
                    reading = not exhausted and self._window.has_room()
                    if reading:
                        item = next(remaining, None)
                        if item is None:
                            exhausted = True
                            continue
                        if (refused := self._take(*item)) is not None:
                            yield refused
                    yield from self._advance(wait=not reading)
        finally:
            self._end_exchange()

    def _take(self, index: int, image: ImageLike) -> Outcome | None:
        """Send one image; an outcome if it cannot be sent."""
        try:
            source = self._read(image)
        except WhenceError as error:
            return Outcome(index, error=error)
        self._send(self._window.add(index, source))
        return None

    def _send(self, request: service_pb2.ExplainRequest) -> None:
        if self._exchange is None:
            self._exchange = self._open_exchange()
        self._exchange.send(request)

    def _advance(self, wait: bool) -> list[Outcome]:
        """Take in the next thing that happened, waiting for it where there is nothing else to do."""
        window = self._window
        if window.orphans:
            return [self._ask_alone(window.orphans.popleft())]
        for request in window.due():
            self._send(request)
        pause_s = window.pause_s() if wait else 0.0
        if self._exchange is None:  # all wait to be sent again
            _io.sleep(pause_s)
            return window.expire()
        try:
            answer = self._exchange.receive(pause_s)
        except _io.ExchangeEnded:
            self._end_exchange()
            window.orphan()
            return []
        if answer is None:
            # Only now: what arrived in time counts, however late the caller asks for it.
            return window.expire()
        outcome = window.settle(answer)
        return [] if outcome is None else [outcome]

    def _ask_alone(self, item: Pending) -> Outcome:
        """After a stream broke: ask one by one, so that an image that breaks streams fails by itself."""
        remaining_s = item.remaining_s()
        try:
            if remaining_s <= 0:
                raise self._window.late(item)
            explanation = self._alone(item.source, self._window.question, remaining_s)
        except WhenceError as error:
            return self._window.close(item, error)
        return self._window.close(item, explanation)

    def _end_exchange(self) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.close()
