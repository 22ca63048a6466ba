"""The two Ray Serve deployments: replicas that answer calls, and replicas that compute."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from concepts import devices
from concepts.contrast.records import Contrast, ContrastRequest
from concepts.errors import Overloaded, Unavailable, WhenceError
from concepts.explanation import EngineRequest, Explanation
from concepts.intervention import Intervention, InterventionRequest
from concepts.repository import Repository
from service.catalogue import Catalogue
from service.explainer import Computed, Explainer, Explains, Job
from service.handlers import Handlers
from service.ingress import Ingress
from service.metrics import RayRecorder, Recorder
from service.settings import Settings

Value = TypeVar("Value")

_log = logging.getLogger(__name__)


class EngineReplica:
    """Computes explanations for ingress replicas elsewhere.

    Errors are returned, not raised: Ray would wrap them and add its traces.
    """

    def __init__(self, settings: Settings) -> None:
        self._explainer = _explainer(settings, RayRecorder())

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Load banks; Serve calls this before the first request, and when ``preload`` changes."""
        await self._explainer.preload(config["preload"])

    async def explain(self, job: Job[EngineRequest], timeout_s: float) -> Computed[Explanation] | WhenceError:
        """See `Explainer.explain`."""
        return await _returned(self._explainer.explain(job, timeout_s))

    async def contrast(self, job: Job[ContrastRequest], timeout_s: float) -> Computed[Contrast] | WhenceError:
        """See `Explainer.contrast`."""
        return await _returned(self._explainer.contrast(job, timeout_s))

    async def intervene(self, job: Job[InterventionRequest], timeout_s: float) -> Computed[Intervention] | WhenceError:
        """See `Explainer.intervene`."""
        return await _returned(self._explainer.intervene(job, timeout_s))


class RemoteExplainer:
    """An engine replica, seen from an ingress replica."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # Not by reference: pixels go straight to the replica over gRPC rather than through Ray's object store, which
        # takes twice as long for 150 kB and halves the throughput.
        self._explain = handle.options(method_name="explain", _by_reference=False)
        self._contrast = handle.options(method_name="contrast", _by_reference=False)
        self._intervene = handle.options(method_name="intervene", _by_reference=False)

    async def explain(self, job: Job[EngineRequest], timeout_s: float) -> Computed[Explanation]:
        """See `Explainer.explain`."""
        return await self._computed(self._explain, job, timeout_s)

    async def contrast(self, job: Job[ContrastRequest], timeout_s: float) -> Computed[Contrast]:
        """See `Explainer.contrast`."""
        return await self._computed(self._contrast, job, timeout_s)

    async def intervene(self, job: Job[InterventionRequest], timeout_s: float) -> Computed[Intervention]:
        """See `Explainer.intervene`."""
        return await self._computed(self._intervene, job, timeout_s)

    async def _computed(self, method: DeploymentHandle[Any], job: Job[Any], timeout_s: float) -> Computed[Any]:
        try:
            outcome = await method.remote(job, timeout_s)
        except BackPressureError as error:
            raise Overloaded("The server has too much work; try again later.", retry_after_s=1.0) from error
        except (RayError, RayServeException) as error:
            _log.warning("an engine replica did not answer: %r", error)
            raise Unavailable("The replica that computed this is gone; try again.", retry_after_s=1.0) from error
        if isinstance(outcome, WhenceError):
            raise outcome
        return outcome  # type: ignore[no-any-return]  # handles are not typed


class IngressReplica(Ingress):
    """Answers calls; computes too, unless it is given engine replicas to do that."""

    def __init__(self, settings: Settings, engines: DeploymentHandle[Any] | None = None) -> None:
        recorder = RayRecorder()
        self._local = _explainer(settings, recorder) if engines is None else None
        explainer: Explains = RemoteExplainer(engines) if engines is not None else self._local  # type: ignore[assignment]
        catalogue = Catalogue(_repository(settings), refresh_s=settings.refresh_s)
        super().__init__(settings, Handlers(settings, catalogue, explainer), recorder)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Load banks; Serve calls this before the first call, and when ``preload`` changes."""
        if self._local is not None:
            await self._local.preload(config["preload"])

    async def __call__(self, request: Request) -> PlainTextResponse:
        """Answer plain HTTP, which Serve passes on too, without saying more than is needed."""
        return PlainTextResponse("This server speaks gRPC: whence.v1.ExplanationService.\n", status_code=404)


async def _returned(answer: Awaitable[Value]) -> Value | WhenceError:
    try:
        return await answer
    except WhenceError as error:
        return error


def _explainer(settings: Settings, recorder: Recorder) -> Explainer:
    return Explainer(
        _repository(settings),
        device=devices.choose(),
        runtime_of=settings.runtime_of,
        threads=settings.compute_threads,
        batch_limit=settings.batch_limit,
        queue_limit=settings.limits.queued_images,
        background_batch_s=settings.background_batch_s,
        engines=settings.engines,
        refresh_s=settings.refresh_s,
        observer=recorder,
    )


def _repository(settings: Settings) -> Repository:
    return Repository(settings.repository, settings.model_factories)
