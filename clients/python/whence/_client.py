"""The client: convert, call, convert."""
# Made from _async_client.py by `make sync-client`: change that.

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from whence import _answers, _handshake, _images, _requests, _retry
from whence import _sync_io as _io
from whence._channel import TLS, channel_settings, client_closed
from whence._contrast import Contrast
from whence._errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable, WhenceError
from whence._explanation import ConceptScope, Estimator, Explanation, InputMethod, MapKind, MapSize, Order, Priority
from whence._intervention import Intervention
from whence._inventory import Bank, Concept, Model
from whence._search import SearchBy, SearchResults
from whence._server_info import ServerInfo
from whence._stream import Stream
from whence._window import Outcome, Window
from whence.v1 import explanation_service_pb2 as service_pb2

if TYPE_CHECKING:
    from whence._images import ImageLike

# Room for everything in a request but the image.
_ENVELOPE_BYTES = 4096
# What an image may take where neither the caller nor the service set a limit.
_DEFAULT_MESSAGE_BYTES = 64 * 2**20


class Client:
    """A connection to a Whence service; safe to share between threads, and to be made once and kept.

    Parameters
    ----------
    address
        ``host:port``.
    timeout_s
        How long to wait for an answer, in seconds, retries included; each call may name its own.
    token
        Sent as a bearer token. A callable is asked before every attempt, so it can renew.
        A token that is refused is not tried again. Without ``tls`` it travels in clear: use that only where the network
        is your own.
    tls
        None for plain text, True for an encrypted connection with the usual authorities, or a `TLS`.
    max_message_bytes
        Largest message in either direction, in bytes. Default: what the service says that it takes.
    max_attempts
        How often a call is tried where the service cannot be reached or is busy; 1 turns retries off.
    retry_budget
        How many retries all calls together may take; ten calls that succeed give one back. Where none is left, a
        failure is raised at once: a service in trouble is not asked ``max_attempts`` times as often.
    check_version
        Ask the service, once and before the first call, what it is: one of another major version is refused, and a
        `VersionWarning` says if it may ignore newer options.
    application
        Name of the Ray Serve application behind the address.

    Raises
    ------
    InvalidArgument
        If an argument cannot be right.

    Examples
    --------
    >>> with whence.Client("localhost:9000") as client:  # doctest: +SKIP
    ...     (client.explain("photo.jpg", bank="resnet50/layer4/craft")).concepts[0].label
    'pointed ear'
    """

    def __init__(
        self,
        address: str = "localhost:9000",
        *,
        timeout_s: float = 30.0,
        token: _io.Token | None = None,
        tls: TLS | bool | None = None,
        max_message_bytes: int | None = None,
        max_attempts: int = 5,
        retry_budget: int = 20,
        check_version: bool = True,
        application: str = "whence",
    ) -> None:
        self.address = address
        self._timeout_s = _requests.timeout(timeout_s)
        self._token = token
        self._max_message_bytes = (
            None if max_message_bytes is None else _requests.at_least_one("max_message_bytes", max_message_bytes)
        )
        self._application = application
        self._policy = _retry.RetryPolicy(max_attempts=_requests.at_least_one("max_attempts", max_attempts))
        self._budget = _retry.RetryBudget(_requests.uint32("retry_budget", retry_budget))
        self._handshake = _handshake.Handshake(enabled=check_version)
        self._greeting = _io.Lock()
        self._connection = _io.Connection(channel_settings(address, tls, self._max_message_bytes))
        self._closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._closed = True
        self._connection.close()

    def explain(
        self,
        image: ImageLike,
        *,
        bank: str,
        target: int | str | None = None,
        top_k: int = 10,
        order: Order = "contribution",
        estimator: Estimator = "gradient",
        maps: MapKind | Sequence[MapKind] = ("activation",),
        map_size: MapSize = "grid",
        substitute: bool | None = None,
        colours: bool = False,
        parts: bool = False,
        input_method: InputMethod = "gradient",
        concepts: ConceptScope = "target",
        priority: Priority = "interactive",
        timeout_s: float | None = None,
    ) -> Explanation:
        """Explain one image.

        Parameters
        ----------
        image
            A path, the bytes of an image file, a Pillow image, or an array: uint8 or floating ``[H, W, 3]`` or
            ``[H, W]``; floating values in [0, 1].
        bank
            ``model/layer/name``, or ``model/layer/name@digest`` for one version.
        target
            Index or name of the class to explain. Default: the predicted class.
        top_k
            How many concepts to list, best first.
        order
            Largest absolute contribution to the target's logit first, or largest activation.
        estimator
            How contributions are computed: ``gradient`` (one backward pass), ``integrated`` (adds up for any head) or
            ``ablation`` (the logit's change when the concept is taken out).
        maps
            Which maps to return for every listed concept, one kind or more: ``activation``, ``contribution``, or
            ``input`` (the part of every pixel in the activation; SAE and NMF banks); ``()`` for none.
        map_size
            ``grid``: the layer's own; ``image``: the image as the model saw it, bilinear. Input maps always have the
            latter.
        substitute
            Run the head on the bank's reconstruction in place of the activation. Default: what the bank is made for.
        colours
            Render input maps in the colours that the concepts looked for, too (B-cos models).
        parts
            Return the parts of every listed concept, too: its sub-concepts at an earlier layer (banks trained with
            parts).
        input_method
            How input maps are computed: ``gradient`` (at the image), ``smoothgrad`` (mean of gradients at noisy copies)
            or ``integrated`` (integrated gradients from the input that is zero); each times the input.
        concepts
            Where the bank holds concepts per class: those of the ``target``'s class, or those of ``all`` classes, which
            then compete for the activation; the target may then be any class of the model.
        priority
            ``interactive``: somebody waits. ``background``: takes only what interactive requests leave.
        timeout_s
            How long to wait, in seconds, in place of the client's own.

        Raises
        ------
        WhenceError
            One of its subclasses, by what went wrong.
        """
        question = _requests.question(
            bank=bank,
            target=target,
            top_k=top_k,
            order=order,
            estimator=estimator,
            maps=maps,
            map_size=map_size,
            substitute=substitute,
            colours=colours,
            parts=parts,
            input_method=input_method,
            concepts=concepts,
            priority=priority,
        )
        return self._explain(_io.read_image(image), question, self._patience(timeout_s))

    def explain_many(
        self,
        images: Iterable[ImageLike],
        *,
        bank: str,
        target: int | str | None = None,
        top_k: int = 10,
        order: Order = "contribution",
        estimator: Estimator = "gradient",
        maps: MapKind | Sequence[MapKind] = ("activation",),
        map_size: MapSize = "grid",
        substitute: bool | None = None,
        colours: bool = False,
        parts: bool = False,
        input_method: InputMethod = "gradient",
        concepts: ConceptScope = "target",
        priority: Priority = "interactive",
        timeout_s: float | None = None,
        max_in_flight: int = 32,
        ordered: bool = True,
    ) -> Generator[Outcome, None, None]:
        """Explain many images over one stream; every image gets exactly one outcome, and a failure is one of them.

        ``images`` may be endless: it is read, in the caller's thread, only as far as answers are taken. Options are
        those of `explain`. Who stops early closes the generator (``contextlib.closing``), which ends the stream.

        Parameters
        ----------
        images
            Images in any form that `explain` takes. An outcome that is there is given when the next image is.
        timeout_s
            How long to wait for each image, in seconds, from when it is sent.
        max_in_flight
            How many images may be sent, or answered and not yet taken, at a time.
        ordered
            Outcomes in the order of the images, or as they come.

        Raises
        ------
        InvalidArgument
            At once, if an option cannot be right.
        FailedPrecondition
            With the first outcome, if the service cannot be understood, or the client is closed.
        """
        question = _requests.question(
            bank=bank,
            target=target,
            top_k=top_k,
            order=order,
            estimator=estimator,
            maps=maps,
            map_size=map_size,
            substitute=substitute,
            colours=colours,
            parts=parts,
            input_method=input_method,
            concepts=concepts,
            priority=priority,
        )
        if isinstance(images, (str, bytes, bytearray, os.PathLike)):
            raise InvalidArgument("images holds many: pass a list of images, or use explain for one.")
        self._check_open()
        patience_s = self._patience(timeout_s)
        window = Window(
            question,
            policy=self._policy,
            budget=self._budget,
            timeout_s=patience_s,
            size=_requests.at_least_one("max_in_flight", max_in_flight),
        )
        stream = Stream(
            window,
            greet=lambda: self._greet_if_there(patience_s),
            read=self._read,
            open_exchange=self._open_exchange,
            alone=self._explain,
        )
        return stream.ordered(images) if ordered else stream.as_answered(images)

    def intervene(
        self,
        image: ImageLike,
        *,
        bank: str,
        scales: Mapping[_requests.Scalable, float],
        target: int | str | None = None,
        concepts: ConceptScope = "target",
        timeout_s: float | None = None,
    ) -> Intervention:
        """Ask what the model would answer for one image if chosen concepts were weaker or stronger.

        Parameters
        ----------
        image
            As for `explain`.
        bank
            ``model/layer/name``, or ``model/layer/name@digest`` for one version.
        scales
            Factor for each concept (its id, or a `Concept` or `ConceptScore`): 0 removes it, 1 leaves it, 2 doubles
            it, a negative one puts in its opposite.
        target
            Index or name of the class whose concepts are meant, where the bank holds concepts per class. Default: the
            predicted class.
        concepts
            As for `explain`: with ``all``, concepts of any class can be scaled.
        timeout_s
            How long to wait, in seconds, in place of the client's own.

        Raises
        ------
        WhenceError
            One of its subclasses, by what went wrong.
        """
        what_if = _requests.what_if(bank=bank, scales=scales, target=target, concepts=concepts)
        source = _io.read_image(image)
        answer = self._ask("Intervene", source, what_if, self._patience(timeout_s))
        return _answers.intervention(answer, answer.request_id, what_if.scales)

    def contrast(
        self,
        image: ImageLike,
        target: int | str | None = None,
        other: int | str | None = None,
        *,
        bank: str,
        top_k: int = 10,
        order: Order = "contribution",
        maps: MapKind | Sequence[MapKind] = ("activation", "contribution"),
        map_size: MapSize = "grid",
        shift: bool = True,
        timeout_s: float | None = None,
    ) -> Contrast:
        """Ask why the model says one class of an image and not another.

        Parameters
        ----------
        image
            As for `explain`.
        target
            Index or name of the one class. Default: the predicted class.
        other
            Index or name of the class to contrast it with. Default: of those between which and the target the bank has
            a plane, the most probable one.
        bank
            A bank of kind ``contrast``: ``model/layer/name``, or ``model/layer/name@digest`` for one version.
        top_k
            How many contrastive prototypes to list, best first.
        order
            Largest absolute contribution first, or largest activation.
        maps
            Which maps to return of the plane and of every listed prototype: ``activation`` (of the plane, signed
            distances to it), ``contribution``, or both; ``()`` for none.
        map_size
            ``grid``: the layer's own; ``image``: the image as the model saw it, bilinear.
        shift
            Look for the shift along the plane's normal at which the image would turn into the other class.
        timeout_s
            How long to wait, in seconds, in place of the client's own.

        Raises
        ------
        WhenceError
            One of its subclasses, by what went wrong.
        """
        pair = _requests.pair(
            bank=bank,
            target=target,
            other=other,
            top_k=top_k,
            order=order,
            maps=maps,
            map_size=map_size,
            shift=shift,
        )
        source = _io.read_image(image)
        answer = self._ask("Contrast", source, pair, self._patience(timeout_s))
        return _answers.contrast(answer, answer.request_id, source)

    def models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """The models that the service explains."""
        answer = self._fetch("ListModels", service_pb2.ListModelsRequest(), timeout_s)
        return tuple(map(_answers.model, answer.models))

    def banks(self, model: str | None = None, *, timeout_s: float | None = None) -> tuple[Bank, ...]:
        """The banks that the service holds, or those of one model."""
        answer = self._fetch("ListBanks", service_pb2.ListBanksRequest(model=model or ""), timeout_s)
        return tuple(map(_answers.bank, answer.banks))

    def bank(self, reference: str, *, timeout_s: float | None = None) -> Bank:
        """One bank, by ``model/layer/name`` or ``model/layer/name@digest``."""
        request = service_pb2.GetBankRequest(bank=_requests.reference(reference))
        return _answers.bank((self._fetch("GetBank", request, timeout_s)).bank)

    def concept(
        self, reference: str, concept_id: int, *, max_exemplars: int | None = None, timeout_s: float | None = None
    ) -> Concept:
        """One concept of a bank, with its statistics and what was found to say of it.

        Of exemplars and counterfactuals come all that are stored, or the first ``max_exemplars`` of either.
        """
        request = service_pb2.GetConceptRequest(
            bank=_requests.reference(reference),
            concept_id=_requests.uint32("concept_id", concept_id),
            max_exemplars=None if max_exemplars is None else _requests.uint32("max_exemplars", max_exemplars),
        )
        return _answers.concept(self._fetch("GetConcept", request, timeout_s))

    def search(
        self,
        text: str,
        by: SearchBy = "meaning",
        *,
        model: str | None = None,
        bank: str | None = None,
        limit: int = 10,
        max_exemplars: int = 0,
        timeout_s: float | None = None,
    ) -> SearchResults:
        """Find concepts by words.

        Parameters
        ----------
        text
            Words, a phrase or a sentence; at most 1000 characters.
        by
            ``meaning``: by what concepts look like, to the CLIP that their bank was named with. ``label``: by the
            label, words and phrases that hold the text, whatever the case.
        model
            Only concepts of this model.
        bank
            Only concepts of this bank: ``model/layer/name``, or ``model/layer/name@digest`` for one version. Default:
            the current version of all.
        limit
            How many concepts to return, best first.
        max_exemplars
            How many exemplars to return of each.
        timeout_s
            How long to wait, in seconds, in place of the client's own. The first search may take some seconds: the
            service then loads a CLIP.

        Raises
        ------
        WhenceError
            One of its subclasses, by what went wrong.

        Examples
        --------
        >>> with whence.Client("localhost:9000") as client:  # doctest: +SKIP
        ...     [found.concept.name for found in client.search("striped fur", limit=3)]
        ['striped fur', 'zebra?', 'bars']
        """
        request = _requests.search(text=text, by=by, model=model, bank=bank, limit=limit, max_exemplars=max_exemplars)
        return _answers.search(self._fetch("SearchConcepts", request, timeout_s), request.text, by)

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """The service's version and limits; asked anew, and of any version."""
        request = service_pb2.GetServerInfoRequest()
        answer = self._call(
            "GetServerInfo", lambda _: request, _requests.new_request_id(), self._patience(timeout_s), greet=False
        )
        return _answers.server_info(answer)

    def _explain(self, source: _images.Source, question: _requests.Question, timeout_s: float) -> Explanation:
        """Ask to explain one image."""
        answer = self._ask("Explain", source, question, timeout_s)
        return _answers.explanation(answer.explanation, answer.request_id, source)

    def _ask(
        self,
        method: str,
        source: _images.Source,
        question: _requests.Question | _requests.WhatIf | _requests.Pair,
        timeout_s: float,
    ) -> Any:
        """Ask anything about one image; the answer has the request's id, whatever the service made of it."""
        request_id = _requests.new_request_id()

        def request(remaining_s: float) -> Any:
            self._check_size(source)
            return question.request(source, request_id, remaining_s)

        answer = self._call(method, request, request_id, timeout_s)
        answer.request_id = answer.request_id or request_id
        return answer

    def _fetch(self, method: str, request: Any, timeout_s: float | None) -> Any:
        """Ask anything that carries neither id nor deadline in the message."""
        return self._call(method, lambda _: request, _requests.new_request_id(), self._patience(timeout_s))

    def _call(
        self,
        method: str,
        request: Callable[[float], Any],
        request_id: str,
        timeout_s: float,
        *,
        greet: bool = True,
    ) -> Any:
        """Call until there is an answer, a final error, or no time left; ``request`` is made of the time left, in s."""
        attempts = _retry.Attempts(self._policy, self._budget, timeout_s)
        while True:
            try:
                if greet:
                    self._greet(attempts.remaining_s())
                answer = self._attempt(method, request(attempts.remaining_s()), request_id, attempts.remaining_s())
            except WhenceError as error:
                pause_s = attempts.pause_s(error)
                if pause_s is None:
                    raise
            else:
                self._budget.give_back()
                return answer
            _io.sleep(pause_s)

    def _attempt(self, method: str, request: Any, request_id: str, remaining_s: float) -> Any:
        metadata = self._metadata(request_id)
        return self._connection.invoke(method, request, timeout_s=remaining_s, metadata=metadata, request_id=request_id)

    def _greet(self, remaining_s: float) -> None:
        """Ask what the service is, unless that is known; who comes meanwhile waits for the answer."""
        if not self._handshake.due():
            return
        if not _io.acquire(self._greeting, remaining_s):
            raise DeadlineExceeded("The service did not say in time what it is.")
        try:
            if self._handshake.due():
                # Half: one that never says what it is may answer all the same.
                self._shake_hands(min(remaining_s / 2, _handshake.PATIENCE_S))
        finally:
            self._greeting.release()

    def _shake_hands(self, timeout_s: float) -> None:
        request = service_pb2.GetServerInfoRequest()
        try:
            answer = self._attempt("GetServerInfo", request, _requests.new_request_id(), timeout_s)
        except WhenceError as error:
            self._handshake.fail(error)
        else:
            self._handshake.learn(_answers.server_info(answer))

    def _greet_if_there(self, remaining_s: float) -> None:
        """Before a stream, whose images tell themselves that the service cannot be reached."""
        with suppress(DeadlineExceeded, Unavailable):
            self._greet(remaining_s)

    def _open_exchange(self) -> _io.Exchange:
        metadata = self._metadata(_requests.new_request_id())
        return _io.Exchange(self._connection.stub.ExplainStream, metadata)

    def _metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """What goes with a call, as long as the client is open."""
        self._check_open()
        return _requests.metadata(self._application, request_id, _io.ask(self._token))

    def _read(self, image: ImageLike) -> _images.Source:
        """Take an image and see that it can be sent, so that one too large never breaks a stream."""
        source = _io.read_image(image)
        self._check_size(source)
        return source

    def _check_size(self, source: _images.Source) -> None:
        """Refuse to send what the service would not take."""
        info = self._handshake.info
        set_limits = [limit for limit in (self._max_message_bytes, info and info.limits.request_bytes) if limit]
        limit = max(min(set_limits, default=_DEFAULT_MESSAGE_BYTES) - _ENVELOPE_BYTES, 0)
        if len(source.content) > limit:
            raise ResourceExhausted(
                f"The image takes {len(source.content):,} bytes, and {limit:,} can be sent: make it smaller, or raise "
                "the service's limit (and max_message_bytes here, where it is given).",
                reason="MESSAGE_TOO_LARGE",
            )

    def _patience(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else _requests.timeout(timeout_s)

    def _check_open(self) -> None:
        if self._closed:
            raise client_closed()
