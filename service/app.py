"""Puts the server together: settings in, a Ray Serve application out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import gRPCOptions
from ray.serve.schema import LoggingConfig

from service.priority import background_limit
from service.replica import EngineReplica, IngressReplica
from service.settings import Settings, load_settings

SERVICERS = (
    "service.wire.add_explanation_service",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)

_SPARE_CALLS = 1_000
"""Calls that a replica takes beyond its limits on images and streams, to refuse them itself and to answer the rest."""


def app(arguments: Mapping[str, str]) -> Application:
    """Build the application for a Serve config file: ``import_path: service.app:app``, ``args: {config: PATH}``."""
    return build(load_settings(Path(arguments["config"])))


def build(settings: Settings) -> Application:
    """Return the application for the connected cluster."""
    limits = settings.limits
    common: dict[str, Any] = {
        "user_config": {"preload": settings.preload},
        "max_ongoing_requests": limits.queued_images
        + background_limit(limits.queued_images)
        + limits.streams
        + _SPARE_CALLS,
        # No answer takes longer, so none is lost when a replica is replaced.
        "graceful_shutdown_timeout_s": limits.deadline_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        # One line a call costs as much as the call.
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
    }
    computing = {"num_cpus": 1, "num_gpus": _gpus(settings)}
    if settings.placement == "together":
        return _deployment(IngressReplica, settings.ingress_replicas, computing, common).bind(settings)
    engines = _deployment(EngineReplica, settings.engine_replicas, computing, common)
    ingress = _deployment(IngressReplica, settings.ingress_replicas, {"num_cpus": 1}, common)
    return ingress.bind(settings, engines.bind(settings))


def grpc_options(settings: Settings) -> gRPCOptions:
    """Return what Serve needs to know to listen for gRPC."""
    return gRPCOptions(port=settings.port, grpc_servicer_functions=list(SERVICERS), enable_reflection=True)


def _deployment(replica: type, replicas: int, resources: Mapping[str, float], common: Mapping[str, Any]) -> Deployment:
    return serve.deployment(num_replicas=replicas, ray_actor_options=dict(resources), **common)(replica)


def _gpus(settings: Settings) -> float:
    if settings.gpus_per_engine is not None:
        return settings.gpus_per_engine
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0  # type: ignore[no-untyped-call]
