"""What each RPC does, free of gRPC: check, look up, decode, compute, convert."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concepts.bank import Bank, Concept
from concepts.contrast.records import Contrast, ContrastRequest
from concepts.errors import DeadlineExceeded, InvalidImage, InvalidInput, Overloaded, UnsupportedOption
from concepts.explanation import EngineRequest, Explanation
from concepts.intervention import Intervention, InterventionRequest
from concepts.kinds.contrast import wrong_kind
from concepts.model import ModelSpec
from concepts.preprocessing import Box
from concepts.repository import BankVersion
from service import convert, images
from service.batcher import Pace
from service.catalogue import Catalogue
from service.explainer import Computed, EngineKey, Explains, Job, Question, Result
from service.priority import PRIORITIES, Priority, is_full
from service.search import Found, Searcher
from service.settings import Settings
from whence.v1 import bank_pb2, explanation_pb2, image_pb2
from whence.v1 import explanation_service_pb2 as pb

DISTRIBUTION = "whence-server"
"""What this is installed as."""

Value = TypeVar("Value")
Asked = TypeVar("Asked", pb.ExplainRequest, pb.ContrastRequest, pb.InterveneRequest)
Reply = TypeVar("Reply", explanation_pb2.Explanation, pb.ContrastResponse, pb.InterveneResponse)


class _Plan(NamedTuple, Generic[Question, Result, Reply]):
    """A request, checked and with everything looked up that it names, and how it is answered."""

    engine: EngineKey
    spec: ModelSpec
    question: Question
    compute: Callable[[Job[Question], float], Awaitable[Computed[Result]]]
    encode: Callable[[Result, NDArray[np.uint8], Box], Reply]
    """From what was computed, the view, and where in the caller's image that is."""
    large: bool
    """Whether the reply takes long to write."""


class Handlers:
    """The use cases of the service; belongs to one event loop.

    Parameters
    ----------
    settings
        For the limits.
    catalogue
        Looks up models and banks.
    explainer
        Computes.
    """

    def __init__(self, settings: Settings, catalogue: Catalogue, explainer: Explains) -> None:
        self._settings = settings
        self._limits = settings.limits
        self._catalogue = catalogue
        self._explainer = explainer
        # Threads of their own, so that no queue of background images is before an interactive one.
        self._pools = {priority: ThreadPoolExecutor(settings.decoder_threads, "decode") for priority in PRIORITIES}
        self._searcher = Searcher(catalogue)
        self._accepted: Counter[Priority] = Counter()
        self._pace = Pace()

    async def explain(self, request: pb.ExplainRequest) -> explanation_pb2.Explanation:
        """Explain one image.

        Raises
        ------
        WhenceError
            Whatever keeps it from being explained.
        """
        return await self._answer(request, self._plan_explanation, convert.priority_from(request))

    async def contrast(self, request: pb.ContrastRequest) -> pb.ContrastResponse:
        """Say why one image is of one class and not of another; the reply has no request id yet.

        Raises
        ------
        WhenceError
            Whatever keeps it from being answered.
        """
        return await self._answer(request, self._plan_contrast)

    async def intervene(self, request: pb.InterveneRequest) -> pb.InterveneResponse:
        """Scale concepts of one image; the reply has no request id yet.

        Raises
        ------
        WhenceError
            Whatever keeps it from being answered.
        """
        return await self._answer(request, self._plan_intervention)

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """List all models."""
        return pb.ListModelsResponse(models=[convert.model_to(spec) for spec in await self._catalogue.models()])

    async def list_banks(self, request: pb.ListBanksRequest) -> pb.ListBanksResponse:
        """List the current version of every bank."""
        summaries = await self._catalogue.banks(request.model)
        return pb.ListBanksResponse(banks=[convert.bank_to(summary) for summary in summaries])

    async def get_bank(self, request: pb.GetBankRequest) -> pb.GetBankResponse:
        """Describe one bank."""
        return pb.GetBankResponse(bank=convert.bank_to(await self._catalogue.summary(request.bank)))

    async def get_concept(self, request: pb.GetConceptRequest) -> pb.GetConceptResponse:
        """Describe one concept, with its exemplars and counterfactuals."""
        version = await self._catalogue.version(request.bank)
        bank = await self._catalogue.bank(version)
        most = request.max_exemplars if request.HasField("max_exemplars") else None
        concept = bank.concept(request.concept_id)
        shown = replace(concept, exemplars=concept.exemplars[:most], counterfactuals=concept.counterfactuals[:most])
        return pb.GetConceptResponse(
            concept=await self._described(version, bank, shown), bank=convert.bank_version_to(version)
        )

    async def search_concepts(self, request: pb.SearchConceptsRequest) -> pb.SearchConceptsResponse:
        """Find concepts by words.

        Raises
        ------
        InvalidInput
            If there is nothing to look for, or the bank is not of the model.
        UnknownModel, UnknownBank
            If there is none of that name.
        UnsupportedOption
            If the exemplars would be too large an answer.
        """
        query = convert.query_from(request, limit=self._limits.top_k)
        allowed_s = self._limits.deadline_s
        try:
            async with asyncio.timeout(allowed_s):
                found = await self._searcher.search(query, await self._searched(request.model, request.bank))
                return await self._found(found, request.max_exemplars)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The answer was not there after {allowed_s:g} s; banks are still being loaded: try again in a moment."
            ) from None

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        """Say what the server is, and what it accepts."""
        return convert.server_info_to(self._settings, version(DISTRIBUTION))

    def close(self) -> None:
        """Stop decoding and searching."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._searcher.close()

    async def _searched(self, model: str, bank: str) -> list[BankVersion]:
        """Return the banks that a search is over."""
        if model:
            await self._catalogue.spec(model)
        if not bank:
            return await self._catalogue.served(model)
        version = await self._catalogue.version(bank)
        if model not in ("", version.model):
            raise InvalidInput(f"bank {version.reference} is not of model {model!r}: name one of the two.")
        return [version]

    async def _found(self, found: Found, most: int) -> pb.SearchConceptsResponse:
        """Return what came of a search as a message, with so many exemplars of each concept."""
        response = pb.SearchConceptsResponse(
            unsearched=[pb.UnsearchedBank(reference=each.reference, reason=each.reason) for each in found.unsearched]
        )
        for bank, concept, score in found.hits:
            version = BankVersion(bank.model, bank.layer, bank.name, bank.digest)
            shown = replace(concept, exemplars=concept.exemplars[:most], counterfactuals=())
            response.concepts.add(
                concept=await self._described(version, bank, shown),
                bank=convert.bank_version_to(version),
                score=score,
            )
            if response.ByteSize() > self._limits.reply_bytes:
                raise UnsupportedOption(
                    f"The exemplars take more than {self._limits.reply_bytes} bytes, the largest answer: ask for fewer "
                    "exemplars or concepts.",
                    reply_bytes_limit=self._limits.reply_bytes,
                )
        return response

    async def _described(self, version: BankVersion, bank: Bank, concept: Concept) -> bank_pb2.Concept:
        """Return a concept with the pictures that it names."""
        pictures = await self._catalogue.pictures(version, concept.pictures) if concept.pictures else {}
        return convert.concept_to(bank, concept, pictures, await self._catalogue.spec(bank.model))

    async def _answer(
        self,
        request: Asked,
        make_plan: Callable[[Asked], Awaitable[_Plan[Question, Result, Reply]]],
        priority: Priority = "interactive",
    ) -> Reply:
        """Answer a request about one image, within its deadline."""
        allowed_s = self._allowed_s(request)
        with self._place(priority):
            try:
                async with asyncio.timeout(allowed_s):
                    return await self._compute(request, make_plan, priority, time.monotonic() + allowed_s)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"The answer was not there after {allowed_s:g} s; allow more time or try when it is quieter."
                ) from None

    async def _compute(
        self,
        request: Asked,
        make_plan: Callable[[Asked], Awaitable[_Plan[Question, Result, Reply]]],
        priority: Priority,
        deadline: float,
    ) -> Reply:
        started = time.monotonic()
        self._check_size(request)
        plan = await make_plan(request)
        preprocessing = plan.spec.preprocessing
        asked = time.monotonic()

        def decode() -> tuple[NDArray[np.uint8], Box]:
            return preprocessing.fit(self._image(request.image))

        view, box = await self._in_pool(priority, decode)
        decoded = time.monotonic()
        job = Job(plan.engine, view, plan.question, priority)
        computed = await plan.compute(job, deadline - time.monotonic())
        explained = time.monotonic()
        encode = partial(plan.encode, computed.result, view, box)
        # Few numbers are written faster than another thread is woken; pictures are not.
        message = await self._in_pool(priority, encode) if plan.large else encode()
        done = time.monotonic()
        timings = message.timings
        timings.decode_ms = 1e3 * (decoded - asked)
        timings.queue_ms = computed.queue_ms
        timings.encode_ms = 1e3 * (done - explained)
        timings.total_ms = 1e3 * (done - started)
        return message

    # Plans: everything that can be checked before the image is touched.

    async def _plan_explanation(
        self, request: pb.ExplainRequest
    ) -> _Plan[EngineRequest, Explanation, explanation_pb2.Explanation]:
        options = convert.options_from(request.options, top_k_limit=self._limits.top_k)
        encoding = convert.encoding_from(request.options)
        engine, spec = await self._named(request.bank)
        most = await self._most_parts(request.bank) if options.parts else 0
        convert.check_reply_size(options, spec, encoding=encoding, limit=self._limits.reply_bytes, parts=most)
        question = EngineRequest(convert.target_from(request.target, spec), options)

        def encode(explanation: Explanation, view: NDArray[np.uint8], box: Box) -> explanation_pb2.Explanation:
            return convert.explanation_to(explanation, view=view, box=box, encoding=encoding)

        large = any(convert.has_image_size(kind, options, encoding) for kind in options.maps)
        return _Plan(engine, spec, question, self._explainer.explain, encode, large)

    async def _plan_contrast(
        self, request: pb.ContrastRequest
    ) -> _Plan[ContrastRequest, Contrast, pb.ContrastResponse]:
        encoding = convert.encoding_from(request.options)
        engine, spec = await self._named(request.bank, contrast=True)
        question = convert.contrast_from(request, spec, top_k_limit=self._limits.top_k)
        options = question.options
        convert.check_reply_size(options, spec, encoding=encoding, limit=self._limits.reply_bytes, planes=1)

        def encode(contrast: Contrast, view: NDArray[np.uint8], box: Box) -> pb.ContrastResponse:
            return convert.contrast_to(contrast, view=view, box=box, encoding=encoding)

        large = any(convert.has_image_size(kind, options, encoding) for kind in options.maps)
        return _Plan(engine, spec, question, self._explainer.contrast, encode, large)

    async def _plan_intervention(
        self, request: pb.InterveneRequest
    ) -> _Plan[InterventionRequest, Intervention, pb.InterveneResponse]:
        engine, spec = await self._named(request.bank)
        question = convert.intervention_from(request, spec, scales_limit=self._limits.scales)

        def encode(intervention: Intervention, _view: NDArray[np.uint8], _box: Box) -> pb.InterveneResponse:
            return convert.intervention_to(intervention)

        return _Plan(engine, spec, question, self._explainer.intervene, encode, large=False)

    async def _named(self, bank: str, *, contrast: bool = False) -> tuple[EngineKey, ModelSpec]:
        """Look up a bank and its model; refuse a contrast bank where none is wanted, and others where one is."""
        version = await self._catalogue.version(bank)
        kind = (await self._catalogue.summary(bank)).manifest["kind"]
        if (kind == "contrast") != contrast:
            raise wrong_kind(kind)
        spec = await self._catalogue.spec(version.model)
        return EngineKey(version, spec.digest), spec

    async def _most_parts(self, bank: str) -> int:
        """Return how many parts a concept of a bank has at most."""
        manifest = (await self._catalogue.summary(bank)).manifest
        return int(manifest["parts"]["most"]) if "parts" in manifest else 0

    def _check_size(self, request: pb.ExplainRequest | pb.ContrastRequest | pb.InterveneRequest) -> None:
        if request.ByteSize() > self._limits.request_bytes:
            raise InvalidInput(
                f"The request is larger than {self._limits.request_bytes} bytes; send a smaller image.",
                request_bytes_limit=self._limits.request_bytes,
            )

    def _image(self, image: image_pb2.Image) -> Image.Image:
        """Read the caller's image."""
        pixels = self._limits.pixels
        match image.WhichOneof("source"):
            case "encoded":
                return images.decode(image.encoded, pixel_limit=pixels, formats=self._limits.image_formats)
            case "raw":
                raw = image.raw
                if raw.pixel_type not in image_pb2.PixelType.values():
                    raise InvalidImage(f"pixel_type has the value {raw.pixel_type}, which this server does not know.")
                floating = raw.pixel_type == image_pb2.PIXEL_TYPE_FLOAT32
                return images.from_raw(
                    raw.data, height=raw.height, width=raw.width, floating=floating, pixel_limit=pixels
                )
            case _:
                raise InvalidImage("The request has no image; set `image.encoded` or `image.raw`.")

    def _allowed_s(self, request: pb.ExplainRequest | pb.ContrastRequest | pb.InterveneRequest) -> float:
        """Return how long the caller will wait, cut to the server's limit."""
        if not request.HasField("deadline"):
            return self._settings.default_deadline_s
        return min(request.deadline.ToNanoseconds() / 1e9, self._limits.deadline_s)

    @contextmanager
    def _place(self, priority: Priority) -> Iterator[None]:
        """Take one of the places for images that are worked on, decoding included."""
        if is_full(priority, self._accepted, self._limits.queued_images):
            raise Overloaded(
                "The server has as much work as it accepts; try again later.",
                retry_after_s=self._pace.wait_s(self._accepted.total()),
            )
        self._accepted[priority] += 1
        started, together = time.monotonic(), self._accepted.total()
        try:
            yield
            self._pace.note(None, together, time.monotonic() - started)
        finally:
            self._accepted[priority] -= 1

    async def _in_pool(self, priority: Priority, work: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._pools[priority], work)
