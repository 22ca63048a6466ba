"""Computes explanations in batches: loads banks, keeps their engines, runs them in one thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from concepts.contrast.engine import ContrastEngine
from concepts.contrast.records import Contrast, ContrastRequest
from concepts.cut import Cut
from concepts.engine import Engine, Memory
from concepts.errors import DeadlineExceeded, InvalidModel, Unavailable, UnsupportedOption, WhenceError
from concepts.explanation import EngineRequest, Explanation
from concepts.intervention import Intervention, InterventionRequest
from concepts.kinds.contrast import wrong_kind
from concepts.model import Model
from concepts.repository import BankVersion, Repository
from concepts.runtimes import Runtime, Trunk, open_trunk
from service.batcher import Batcher
from service.batcher import Observer as BatchObserver
from service.cores import use_cores
from service.memo import Memo
from service.priority import Priority

Question = TypeVar("Question", EngineRequest, InterventionRequest, ContrastRequest)
Result = TypeVar("Result")
Value = TypeVar("Value")
AnyEngine = TypeVar("AnyEngine", Engine, ContrastEngine)

_log = logging.getLogger(__name__)


class EngineKey(NamedTuple):
    """What decides which engine computes."""

    version: BankVersion
    model_digest: str
    """``ModelSpec.digest`` of the model as the repository has it now: one that was replaced must not be used."""


@dataclass(frozen=True, slots=True)
class Job(Generic[Question]):
    """One image, and what is asked about it."""

    engine: EngineKey
    view: NDArray[np.uint8]
    """uint8 ``[height, width, 3]``: what the model sees."""
    request: Question
    priority: Priority = "interactive"


class Computed(NamedTuple, Generic[Result]):
    """What came of a job."""

    result: Result
    queue_ms: float
    """Spent waiting for the engine, loading of the bank included."""


class Explains(Protocol):
    """Whoever computes explanations, contrasts and interventions: this process, or a replica elsewhere."""

    async def explain(self, job: Job[EngineRequest], timeout_s: float) -> Computed[Explanation]:
        """Compute one explanation within so many seconds; raises `WhenceError`."""
        ...

    async def contrast(self, job: Job[ContrastRequest], timeout_s: float) -> Computed[Contrast]:
        """Compute one contrast within so many seconds; raises `WhenceError`."""
        ...

    async def intervene(self, job: Job[InterventionRequest], timeout_s: float) -> Computed[Intervention]:
        """Compute one intervention within so many seconds; raises `WhenceError`."""
        ...


class _BatchKey(NamedTuple):
    compute: Callable[[NDArray[np.uint8], Sequence[Any]], list[Any]]
    """A method of the engine itself: a batch that waits keeps its engine when the store drops it."""
    options: Hashable
    """What the requests must share."""


class _SectionKey(NamedTuple):
    model: str
    model_digest: str
    layer: str


class _Section(NamedTuple):
    """A model cut at a layer; engines of all banks of that layer share it."""

    model: Model
    cut: Cut
    trunk: Trunk


class Observer(BatchObserver, Protocol):
    """Told what the explainer does, for metrics."""

    def loaded(self, version: BankVersion, memory: Memory) -> None:
        """Say that a bank is loaded, and what it and its model hold."""


class Explainer:
    """Explains images with the banks of a repository; belongs to one event loop.

    Models run in a single thread of their own, so the event loop stays free for health checks, and hooks on a model
    that several banks share never meet.

    Parameters
    ----------
    repository
        Where models and banks are.
    device
        Where to compute.
    runtime_of
        What computes the trunk of the model of a name.
    threads
        CPU threads for computing.
    batch_limit
        Most images computed together.
    queue_limit
        Most images that wait; see `Batcher`, as for the next.
    background_batch_s
        How long a batch of background images may take, in seconds.
    engines
        Most bank versions held.
    refresh_s
        How long a bank that could not be loaded is not tried again, in seconds.
    observer
        Told of batches and queue lengths.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        device: torch.device,
        runtime_of: Callable[[str], Runtime] = lambda _model: Runtime(),
        threads: int,
        batch_limit: int,
        queue_limit: int,
        background_batch_s: float = 0.25,
        engines: int,
        refresh_s: float = 0.5,
        observer: Observer | None = None,
    ) -> None:
        self._repository = repository
        self._device, self._runtime_of = device, runtime_of
        self._observer, self._batch_limit = observer, batch_limit
        self._thread = ThreadPoolExecutor(1, "engine", initializer=use_cores, initargs=(threads,))
        self._models: Memo[tuple[str, str], Model] = Memo(self._load_model, limit=engines, keep_failure_s=refresh_s)
        # Two for a bank: parts have a layer of their own.
        self._sections: Memo[_SectionKey, _Section] = Memo(
            self._load_section, limit=2 * engines, keep_failure_s=refresh_s
        )
        self._engines: Memo[EngineKey, Engine | ContrastEngine] = Memo(
            self._load_engine, limit=engines, keep_failure_s=refresh_s
        )
        self._batcher: Batcher[_BatchKey, Job[Any], Any] = Batcher(
            self._run,
            batch_limit=batch_limit,
            queue_limit=queue_limit,
            background_batch_s=background_batch_s,
            observer=observer,
        )

    async def explain(self, job: Job[EngineRequest], timeout_s: float) -> Computed[Explanation]:
        """Compute one explanation, together with others that wait.

        Raises
        ------
        Overloaded, DeadlineExceeded
            If too much waits, or the answer is not there after ``timeout_s``.
        CorruptData, WeightsMismatch, InvalidCut, InvalidModel
            If the bank or its model cannot be loaded.
        Unavailable
            If the model is being replaced.
        UnsupportedOption, UnknownClass, NumericalFailure
            What the engine says of this request, or that contrast banks do not answer it.
        """

        def prepare(engine: Engine) -> _BatchKey:
            engine.check(job.request)
            return _BatchKey(engine.explain, engine.batch_key(job.request.options))

        return await self._computed(job, Engine, prepare, timeout_s)

    async def contrast(self, job: Job[ContrastRequest], timeout_s: float) -> Computed[Contrast]:
        """Compute one contrast, together with others that wait; raises as ``explain``.

        Raises
        ------
        InvalidInput
            If both classes are the same.
        """

        def prepare(engine: ContrastEngine) -> _BatchKey:
            engine.check(job.request)
            return _BatchKey(engine.contrast, engine.batch_key(job.request))

        return await self._computed(job, ContrastEngine, prepare, timeout_s)

    async def intervene(self, job: Job[InterventionRequest], timeout_s: float) -> Computed[Intervention]:
        """Compute one intervention, together with others that wait; raises as ``explain``.

        Raises
        ------
        InvalidInput, UnknownConcept
            If a scale cannot be meant, or the bank has no such concept.
        """

        def prepare(engine: Engine) -> _BatchKey:
            engine.check_intervention(job.request)
            return _BatchKey(engine.intervene, engine.scope(job.request.concepts))

        return await self._computed(job, Engine, prepare, timeout_s)

    async def preload(self, references: Iterable[str] | None = None) -> None:
        """Load banks before they are asked for, all current ones by default; what cannot be loaded is logged."""
        for reference in await self._references() if references is None else references:
            try:
                version = self._repository.resolve(reference)
                spec = self._repository.model_spec(version.model)
                await self._engines.get(EngineKey(version, spec.digest))
            except WhenceError as error:
                _log.error("bank %s is not served: %s", reference, error)

    async def close(self) -> None:
        """Let the running batch end, and stop."""
        await self._batcher.close()
        self._thread.shutdown()

    async def _computed(
        self,
        job: Job[Question],
        family: type[AnyEngine],
        prepare: Callable[[AnyEngine], _BatchKey],
        timeout_s: float,
    ) -> Computed[Any]:
        """Have an engine of one family compute a job, together with others of the same batch key."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                engine = await self._engines.get(job.engine)
        except TimeoutError:
            raise DeadlineExceeded("The bank is still being loaded; try again in a moment.") from None
        if not isinstance(engine, family):
            raise wrong_kind(engine.bank.kind)
        key = prepare(engine)
        loaded = time.monotonic()
        answer = await self._batcher.submit(key, job, deadline=started + timeout_s, priority=job.priority)
        return Computed(answer.result, 1e3 * (loaded - started + answer.waited_s))

    async def _references(self) -> list[str]:
        versions = await asyncio.to_thread(self._repository.banks)
        return [version.reference for version in versions]

    async def _load_model(self, key: tuple[str, str]) -> Model:
        name, digest = key
        model = await asyncio.to_thread(self._repository.load_model, name, self._device)
        if model.spec.digest != digest:
            raise Unavailable("The model is being replaced; try again in a moment.", retry_after_s=1.0)
        return model

    async def _load_engine(self, key: EngineKey) -> Engine | ContrastEngine:
        bank = await asyncio.to_thread(self._repository.load, key.version)
        section = await self._sections.get(_SectionKey(bank.model, key.model_digest, bank.layer))
        earlier, obstacle = None, None
        if bank.parts is not None:
            try:
                earlier = await self._sections.get(_SectionKey(bank.model, key.model_digest, bank.parts.layer))
            except (UnsupportedOption, InvalidModel) as error:  # of the runtime, which does compute the concepts
                obstacle = error.message
                _log.warning("parts of bank %s are not served: %s", bank.reference, obstacle)

        def make() -> Engine | ContrastEngine:
            engine: Engine | ContrastEngine
            if bank.kind == "contrast":
                engine = ContrastEngine(section.model, bank, section.cut, section.trunk)
            else:
                of_parts = None
                if bank.parts is not None and earlier is not None:
                    of_parts = Engine(earlier.model, bank.parts, earlier.cut, earlier.trunk)
                engine = Engine(section.model, bank, section.cut, section.trunk, of_parts, obstacle)
            engine.warm_up()
            if self._device.type == "cuda":  # which chooses kernels and takes memory by size
                engine.warm_up(self._batch_limit)
            return engine

        engine = await self._made(f"bank {bank.reference}", make)
        self._report(key.version, engine)
        if isinstance(engine, Engine) and engine.of_parts is not None:
            # By a name that no bank can have.
            self._report(
                key.version._replace(layer=engine.of_parts.bank.layer, name=f"{bank.name}:parts"), engine.of_parts
            )
        return engine

    def _report(self, version: BankVersion, engine: Engine | ContrastEngine) -> None:
        """Tell what an engine holds."""
        _log.info("bank %s is loaded: %s bytes", version.reference, engine.memory)
        if self._observer is not None:
            self._observer.loaded(version, engine.memory)

    async def _load_section(self, key: _SectionKey) -> _Section:
        model = await self._models.get((key.model, key.model_digest))
        runtime = self._runtime_of(key.model)

        def cut() -> _Section:
            section = model.cut(key.layer)
            return _Section(model, section, open_trunk(runtime, model, section))

        return await self._made(f"model {key.model!r} at layer {key.layer!r}", cut)

    async def _made(self, what: str, make: Callable[[], Value]) -> Value:
        """Make something of a model in its thread; whatever goes wrong is of this model, and spares the others."""
        try:
            return await self._in_thread(make)
        except WhenceError:
            raise
        except Exception as error:
            _log.exception("%s cannot be run", what)
            raise InvalidModel(f"{what} cannot be run here with the runtime that its settings choose") from error

    async def _in_thread(self, work: Callable[[], Value]) -> Value:
        """Run what touches a model in the thread that computes: hooks on one model must not meet."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _run(self, key: _BatchKey, jobs: Sequence[Job[Any]]) -> Sequence[Any]:
        views = np.stack([job.view for job in jobs])
        requests = [job.request for job in jobs]
        return await self._in_thread(lambda: key.compute(views, requests))
