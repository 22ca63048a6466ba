"""From an architecture's name to a network without weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from concepts.errors import InvalidModel

TRUSTED_PACKAGES = ("demo",)
"""Packages whose factories may be called unless the caller allows others."""


def build(
    architecture: str, options: Mapping[str, Any] | None = None, trusted: Sequence[str] = TRUSTED_PACKAGES
) -> nn.Module:
    """Build a network by name, in evaluation mode, with its parameters frozen.

    Parameters
    ----------
    architecture
        ``torchvision:<name>``, ``bcos:<name>`` (``resnet50``, ``densenet121``, …), or ``package.module:factory`` of a
        package that is installed here.
    options
        Keyword arguments of the factory.
    trusted
        Packages or modules whose factories may be called. A repository names factories but must not choose what code
        runs, so anything else is refused.

    Raises
    ------
    InvalidModel
        If the name is malformed, unknown or not trusted, or the factory fails or returns no ``torch.nn.Module``.
    """
    source, separator, name = architecture.partition(":")
    if not separator or not source or not name:
        raise InvalidModel(
            f"architecture {architecture!r} is not of the form torchvision:NAME, bcos:NAME or package.module:factory"
        )
    factory = _factory(source, name, trusted)
    try:
        module = factory(**dict(options or {}))
    except Exception as error:
        # What the error says is for who builds the model, not for callers of a service: it stays in the cause.
        raise InvalidModel(f"architecture {architecture!r}: the factory failed ({type(error).__name__})") from error
    if not isinstance(module, nn.Module):
        raise InvalidModel(f"architecture {architecture!r} returned a {type(module).__name__}, not a torch.nn.Module")
    return module.eval().requires_grad_(False)


def _factory(source: str, name: str, trusted: Sequence[str]) -> Callable[..., Any]:
    if source == "torchvision":
        return _torchvision(name)
    if source == "bcos":
        return _bcos(name)
    if not any(source == package or source.startswith(package + ".") for package in trusted):
        raise InvalidModel(
            f"factories of {source!r} are not trusted here: add it to the trusted packages "
            f"(now {', '.join(trusted) or 'none'})"
        )
    try:
        factory = getattr(importlib.import_module(source), name)
    except (ImportError, AttributeError) as error:
        raise InvalidModel(f"no factory {source}:{name} is installed here") from error
    home = getattr(factory, "__module__", None) or ""
    # Imported names are not the package's own: a repository must not reach the rest of Python through them.
    if not callable(factory) or not any(home == package or home.startswith(package + ".") for package in trusted):
        raise InvalidModel(f"{source}:{name} is not a factory of its own package")
    return factory  # type: ignore[no-any-return]


def _torchvision(name: str) -> Callable[..., Any]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise InvalidModel(f"torchvision has no classifier {name!r}")
    return lambda **options: models.get_model(name, weights=None, **options)


def _bcos(name: str) -> Callable[..., Any]:
    for family in ("resnet", "densenet"):
        networks = importlib.import_module(f"bcos.models.{family}")
        if name.islower() and name in networks.__all__:
            return getattr(networks, name)  # type: ignore[no-any-return]
    raise InvalidModel(f"the bcos package has no ResNet or DenseNet {name!r}")
