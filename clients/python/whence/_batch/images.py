"""One image after another through the service: read, asked about, asked about again, and at last a row.

What is raised here ends the run; what ends an image alone is a value.
"""

from __future__ import annotations

import time

from whence._batch.gate import Gate
from whence._batch.limiter import Limiter
from whence._batch.patience import Patience
from whence._batch.service import Explain
from whence._batch.sources import Content, Listed, Source
from whence._batch.verdicts import Verdict, of_answer, of_reading
from whence._errors import InvalidArgument, NotFound, Overloaded, ResourceExhausted, Unavailable, WhenceError
from whence._explanation import Explanation

_ENVELOPE_BYTES = 4096
"""Room for everything in a request but the image; as in the client."""
_TRIES = 3
"""After so many failures an image is blamed, if others are answered."""
_STRIKES = 3
"""An image that has so often been in flight when the service went away is asked about alone."""
_UNWITNESSED = 32
"""So many images may be blamed before any was answered; then it is the service."""


class Images:
    """Takes images through the service.

    Parameters
    ----------
    explain
        Asks about one image, with no retries of its own.
    timeout_s
        How long to wait for an answer, in seconds.
    patience_s
        How long to wait for a service or store that is away, in seconds.
    request_bytes
        Largest request that the service takes, in bytes; None where it did not say.
    """

    def __init__(
        self, source: Source, explain: Explain, *, timeout_s: float, patience_s: float, request_bytes: int | None
    ) -> None:
        self._source, self._ask_service = source, explain
        self._timeout_s, self._request_bytes = timeout_s, request_bytes
        self._service_patience, self._store_patience = Patience(patience_s), Patience(patience_s)
        self.limiter = Limiter()
        self.gate = Gate(self.limiter)
        self._witness: bytes | None = None
        """An image that the service answered: where it is answered again, the service is not to blame."""
        self._is_looking = False
        """Whether the witness is asked about, to see if the service answers."""
        self._answers = 0
        self._unwitnessed = 0

    @property
    def waiting(self) -> str:
        """Why nothing goes on; empty while all is well."""
        return self._service_patience.reason or self._store_patience.reason

    async def read(self, item: Listed) -> Content | WhenceError:
        """Read an object."""
        if item.refused:
            return InvalidArgument("The name is not UTF-8, so it can be no key: rename the file.", reason="INVALID_KEY")
        if self._request_bytes is not None and (item.size or 0) > self._request_bytes - _ENVELOPE_BYTES:
            return ResourceExhausted(
                f"The object takes {item.size:,} bytes, and the service takes {self._request_bytes:,}: make it "
                "smaller, or raise the service's limit.",
                reason="MESSAGE_TOO_LARGE",
            )
        attempt = 0
        while True:
            attempt += 1
            try:
                content = await self._source.read(item.key)
            except WhenceError as error:
                verdict = of_reading(error)
                if verdict is Verdict.STOP:
                    raise
                if verdict is Verdict.ROW:
                    return NotFound("The object is gone since it was listed.", reason="OBJECT_GONE")
                if await self._store_answers() and (verdict is Verdict.SUSPECT or attempt >= _TRIES):
                    return error
                await self._store_patience.pause(error, attempt)
                continue
            self._store_patience.succeeded()
            if not content.data:
                return InvalidArgument("The object is empty: 0 bytes.", reason="INVALID_IMAGE")
            return content

    async def explain(self, image: bytes) -> Explanation | WhenceError:
        """Ask about an image until it is answered or to blame."""
        attempt = failures = strikes = 0
        answers_at_strike = -1
        while True:
            attempt += 1
            try:
                if strikes >= _STRIKES and self._witness is not None:
                    return await self._explain_alone(image)
                return await self._call(image)
            except WhenceError as error:
                verdict = of_answer(error)
                if verdict is Verdict.STOP:
                    raise
                if verdict is Verdict.ROW:
                    self._service_patience.succeeded()
                    return error
                if verdict is Verdict.SUSPECT:
                    failures += 1
                    if await self._is_to_blame(error, failures):
                        return error
                elif isinstance(error, Unavailable) and self._answers > answers_at_strike:
                    # Only where others were answered in between: an outage strikes everyone, again and again.
                    strikes += 1
                    answers_at_strike = self._answers
                await self._service_patience.pause(error, attempt)
                if self._answers == answers_at_strike:
                    await self._look_for_an_answer()

    async def _call(self, image: bytes) -> Explanation:
        """Ask, as soon as there is room."""
        async with self.gate.shared():
            return await self._timed_call(image)

    async def _timed_call(self, image: bytes) -> Explanation:
        began_s = time.monotonic()
        try:
            explanation = await self._ask_service(image, self._timeout_s)
        except Overloaded:
            now_s = time.monotonic()
            self.limiter.refused(now_s, now_s - began_s)
            raise
        except Unavailable:
            raise
        except WhenceError:
            now_s = time.monotonic()
            self.limiter.answered(now_s, now_s - began_s)
            raise
        now_s = time.monotonic()
        self.limiter.answered(now_s, now_s - began_s)
        self._service_patience.succeeded()
        self._answers += 1
        self._unwitnessed = 0
        if self._witness is None or len(image) < len(self._witness):
            self._witness = image  # the smallest, which costs least to keep and to send
        return explanation

    async def _is_to_blame(self, error: WhenceError, failures: int) -> bool:
        """Whether a failure is this image's own, now that it has failed so often; raises where it is the request's."""
        of_request = isinstance(error, InvalidArgument)
        if of_request and self._witness is not None:
            return True  # others were answered the same request
        if failures < _TRIES:
            return False
        if self._witness is not None:
            return await self._witness_is_answered()
        self._unwitnessed += 1
        if of_request or self._unwitnessed > _UNWITNESSED:
            raise error
        return True

    async def _explain_alone(self, image: bytes) -> Explanation | WhenceError:
        """Ask about an image that may bring the service down, while nothing else can be hurt or blamed."""
        failure: WhenceError | None = None
        async with self.gate.alone():
            for _ in range(_STRIKES):
                await self._until_witness_is_answered()
                try:
                    return await self._timed_call(image)
                except Unavailable as error:
                    failure = error
        return failure or Unavailable("The service went away.")

    async def _until_witness_is_answered(self) -> None:
        attempt = 0
        while True:
            attempt += 1
            try:
                await self._timed_call(self._witness or b"")
            except WhenceError as error:
                if of_answer(error) is Verdict.STOP:
                    raise
                await self._service_patience.pause(error, attempt)
            else:
                return

    async def _look_for_an_answer(self) -> None:
        """Ask about the witness, once for all who wait: they may be those alone that bring the service down."""
        if self._witness is not None and not self._is_looking:
            self._is_looking = True
            try:
                await self._witness_is_answered()
            finally:
                self._is_looking = False

    async def _witness_is_answered(self) -> bool:
        try:
            await self._call(self._witness or b"")
        except WhenceError as error:
            if of_answer(error) is Verdict.STOP:
                raise
            return False
        return True

    async def _store_answers(self) -> bool:
        """Whether the source can be used at all; raises where it cannot, and waiting would not help."""
        try:
            await self._source.check()
        except Unavailable:
            return False
        return True
