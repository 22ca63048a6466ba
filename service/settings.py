"""Every setting of the server: read once, from a YAML file and the environment; unknown keys are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from concepts.errors import InvalidInput
from concepts.runtimes import Precision, Runtime, RuntimeName

ENVIRONMENT_PREFIX = "WHENCE_SERVE_"
"""``WHENCE_SERVE_PORT=9001`` sets ``port``; ``WHENCE_SERVE_LIMITS__TOP_K=50`` sets ``limits.top_k``."""

ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]


class SettingsError(Exception):
    """The settings cannot be used; the message says which and why, in plain words."""


class Limits(BaseModel):
    """What a caller may ask for; checked before any work is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_bytes: int = Field(16 * 2**20, ge=1024, le=2**30)
    """Largest request, in bytes."""
    reply_bytes: int = Field(64 * 2**20, ge=1024, le=2**30)
    """Largest answer, in bytes; what would exceed it is refused before it is computed."""
    pixels: int = Field(50_000_000, ge=1)
    """Largest image, in pixels (width × height), read from its header before it is decoded."""
    image_formats: tuple[ImageFormat, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    """Accepted encodings."""
    top_k: int = Field(100, ge=1)
    """Most concepts listed in one answer."""
    scales: int = Field(1000, ge=1)
    """Most concepts scaled in one intervention."""
    queued_images: int = Field(256, ge=1)
    """Most images that one replica decodes, holds waiting and computes at a time; more are told to come back.
    Background images are told so as soon as all are half as many, and take no place from the others."""
    streams: int = Field(64, ge=1)
    """Most streams open on one replica at a time."""
    stream_in_flight: int = Field(64, ge=1)
    """Most images of one stream that are worked on at a time; further ones stay with the caller."""
    deadline_s: float = Field(60.0, gt=0)
    """Longest that any answer may take, in seconds, whatever the caller allows."""


class ModelSettings(BaseModel):
    """What may differ from model to model; None: as for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtime: RuntimeName | None = None
    """As ``Settings.runtime``."""
    precision: Precision | None = None
    """As ``Settings.precision``."""
    compile: bool | None = None
    """As ``Settings.compile``."""


class Settings(BaseSettings):
    """How the server runs.

    Values given to the constructor come before the environment, and the environment before the file.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__"
    )

    repository: str
    """Root of the repository that holds models and banks: a path."""
    model_factories: tuple[str, ...] = ("demo",)
    """Packages whose functions may build models (``package.module:factory``)."""
    preload: tuple[str, ...] | None = None
    """Banks loaded before the server reports ready, as ``model/layer/name``; None: every current bank."""

    host: str = "0.0.0.0"  # noqa: S104 - a server is there to be reached
    """Address to listen on (mode ``haproxy``; Ray's own proxy always listens on all). The replicas behind it listen on
    all addresses, on ports from 20000 to 29999 (on a cluster from 40000 on): let only this machine and the cluster
    reach those."""
    port: int = Field(9000, ge=1, le=65535)
    """gRPC port."""
    metrics_port: int = Field(9090, ge=1, le=65535)
    """Port of the Prometheus metrics, path ``/metrics``."""
    ingress_mode: Literal["haproxy", "proxy"] = "haproxy"
    """``haproxy``: HAProxy passes calls straight to the replicas; ``proxy``: Ray's Python proxy does (slower)."""
    ray_address: str = "local"
    """``local`` starts Ray on this machine; anything else is the address of a running cluster."""

    placement: Literal["together", "apart"] = "together"
    """``together``: each replica decodes and computes (least latency). ``apart``: ingress replicas decode and hand
    pixels to engine replicas (many decoders feed one GPU)."""
    ingress_replicas: int = Field(1, ge=1)
    """Replicas that answer calls; with placement ``together`` each one computes too."""
    engine_replicas: int = Field(1, ge=1)
    """Replicas that compute (placement ``apart`` only)."""
    gpus_per_engine: float | None = Field(None, ge=0)
    """GPUs of each computing replica; None: one where the cluster has any, otherwise none."""
    runtime: RuntimeName = "torch"
    """What computes trunks: ``torch``, or ``onnx`` (ONNX Runtime), the faster of the two in float32 on processors."""
    precision: Precision = "float32"
    """What trunks compute in; ``bfloat16`` is about twice as fast where the processor has it."""
    compile: bool = False
    """Have PyTorch compile trunks: faster answers, but each takes a minute or so to load. Needs a C++ compiler."""
    models: dict[str, ModelSettings] = Field(default_factory=dict)
    """Runtime, precision and compile of single models, by name, where they differ from the above."""
    threads: int = Field(0, ge=0)
    """CPU threads for computing in each replica; 0: one per core."""
    decoders: int = Field(0, ge=0)
    """Threads that decode images in each ingress replica; 0: one per core, at most 8."""

    batch_limit: int = Field(32, ge=1)
    """Most images computed together."""
    background_batch_s: float = Field(0.25, gt=0)
    """How long a batch of background images may take, in seconds, judging by recent ones: about the longest that the
    others wait for one. Four times that when there were no others for ten seconds: larger batches are faster
    altogether."""
    engines: int = Field(16, ge=1)
    """Most bank versions that a computing replica holds; the least recently used is dropped first."""
    refresh_s: float = Field(0.5, ge=0)
    """How long the server trusts what it last read of the repository, in seconds: a bank published or rolled back is
    served after at most this long."""
    default_deadline_s: float = Field(20.0, gt=0)
    """Deadline of a request that names none, in seconds."""
    shutdown_s: float = Field(2.0, ge=0)
    """How long a replica that is being replaced keeps answering, in seconds, so that no call is lost."""
    limits: Limits = Limits()
    """What a caller may ask for."""

    @property
    def compute_threads(self) -> int:
        """CPU threads for computing, with 0 replaced by the number of cores."""
        return self.threads or _cores()

    @property
    def decoder_threads(self) -> int:
        """Threads that decode, with 0 replaced by the number of cores, at most 8."""
        return self.decoders or min(_cores(), 8)

    def runtime_of(self, model: str) -> Runtime:
        """Return what computes a model's trunk."""
        own = self.models.get(model, ModelSettings())
        return Runtime(
            self.runtime if own.runtime is None else own.runtime,
            self.precision if own.precision is None else own.precision,
            self.compile if own.compile is None else own.compile,
        )

    @field_validator("repository")
    @classmethod
    def _absolute(cls, root: str) -> str:
        # Replicas run in other folders than the command.
        return root if "://" in root else str(Path(root).expanduser().resolve())

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.default_deadline_s > self.limits.deadline_s:
            raise ValueError("default_deadline_s must not exceed limits.deadline_s")
        if self.port == self.metrics_port:
            raise ValueError("port and metrics_port must differ")
        try:
            for model in ("", *self.models):
                self.runtime_of(model)
        except InvalidInput as error:
            raise ValueError(error.message) from error
        return self


def load_settings(path: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings from a YAML file, the environment and ``overrides``, the later winning.

    Parameters
    ----------
    path
        YAML file; relative paths inside it are relative to the working directory.
    **overrides
        Values given on the command line; None means not given.

    Raises
    ------
    SettingsError
        If the file cannot be read, a key is unknown, or a value does not fit.
    """
    _refuse_unknown_environment()
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Settings(**_merge(_read(path) if path else {}, EnvSettingsSource(Settings)(), given))
    except (ValidationError, PydanticSettingsError) as error:
        raise SettingsError(_plain(error)) from error


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold settings as `key: value` lines")
    return values


def _merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Each layer on top of those before, nested dictionaries included."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _refuse_unknown_environment() -> None:
    # pydantic-settings looks only for the variables it knows, so a misspelt one would be ignored in silence.
    known = {name.upper() for name in Settings.model_fields}
    known |= {f"LIMITS__{name.upper()}" for name in Limits.model_fields}
    names = (name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX))
    unknown = sorted(name for name in names if name.removeprefix(ENVIRONMENT_PREFIX) not in known)
    if unknown:
        raise SettingsError(f"unknown settings in the environment: {', '.join(unknown)}")


def _plain(error: ValidationError | PydanticSettingsError) -> str:
    """Every complaint on one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    complaints = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = {"extra_forbidden": "unknown setting", "missing": "is required"}.get(item["type"], item["msg"])
        complaints.append(f"{key}: {message}" if key else message)
    return "; ".join(complaints)
