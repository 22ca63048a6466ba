"""From an architecture's name to a network without weights."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from concepts.errors import InvalidModel

TRUSTED_PACKAGES = ("demo",)
"""Packages whose factories may be called unless the caller allows others."""

# Weights ported from inputs in [-1, 1], to which these networks turn torchvision's usual ones. Their own initialisation
# is slow, and overwritten; not to say whether it is wanted makes torchvision warn.
_PORTED = {"init_weights": False, "transform_input": True}
_IMPLIED = {"googlenet": _PORTED, "inception_v3": _PORTED}
"""Options of torchvision's factories that its published weights imply."""


def build(
    architecture: str, options: Mapping[str, Any] | None = None, trusted: Sequence[str] = TRUSTED_PACKAGES
) -> nn.Module:
    """Build a network by name, in evaluation mode, with its parameters frozen.

    Parameters
    ----------
    architecture
        ``torchvision:<name>``, ``bcos:<name>`` (``resnet50``, ``vitc_b_patch1_14``, …), or ``package.module:factory``
        of a package that is installed here.
    options
        Keyword arguments of the factory. What published weights imply is the default: ``transform_input`` of
        GoogLeNet and Inception, and the logit bias of B-cos networks, which is that of 1000 classes.
    trusted
        Packages or modules whose factories may be called. A repository names factories but must not choose what code
        runs, so anything else is refused.

    Raises
    ------
    InvalidModel
        If the name is malformed, unknown or not trusted, or the factory fails or returns no ``torch.nn.Module``.
    """
    build_network = factory(architecture, trusted)
    try:
        module = build_network(**dict(options or {}))
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    except Exception as error:
        # What the error says is for who builds the model, not for callers of a service: it stays in the cause.
        raise InvalidModel(f"architecture {architecture!r}: the factory failed ({type(error).__name__})") from error
    if not isinstance(module, nn.Module):
        raise InvalidModel(f"architecture {architecture!r} returned a {type(module).__name__}, not a torch.nn.Module")
    return module


def factory(architecture: str, trusted: Sequence[str] = TRUSTED_PACKAGES) -> Callable[..., Any]:
    """Return the function that builds an architecture; see ``build`` for what is refused."""
    source, separator, name = architecture.partition(":")
    if not separator or not source or not name:
        raise InvalidModel(
            f"architecture {architecture!r} is not of the form torchvision:NAME, bcos:NAME or package.module:factory"
        )
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
        found = getattr(importlib.import_module(source), name)
    except (ImportError, AttributeError) as error:
        raise InvalidModel(f"no factory {source}:{name} is installed here") from error
    home = getattr(found, "__module__", None) or ""
    # Imported names are not the package's own: a repository must not reach the rest of Python through them.
    if not callable(found) or not any(home == package or home.startswith(package + ".") for package in trusted):
        raise InvalidModel(f"{source}:{name} is not a factory of its own package")
    return found  # type: ignore[no-any-return]


def _torchvision(name: str) -> Callable[..., Any]:
    from torchvision import models

    if name in models.list_models(module=models.quantization):
        raise InvalidModel(
            f"{name!r} is quantised and has no gradients to explain it by: use {name.removeprefix('quantized_')!r}"
        )
    if name not in models.list_models(module=models):
        raise InvalidModel(f"torchvision has no classifier {name!r}")
    implied = _IMPLIED.get(name, {})
    return lambda **options: models.get_model(name, weights=None, **{**implied, **options})


def _bcos(name: str) -> Callable[..., Any]:
    from bcos.models import pretrained

    if name in pretrained.list_available():
        # Through the package's own entry points: they know the published networks' layers, which cannot be named in
        # JSON and are not the defaults of its constructors.
        return partial(_bcos_network, getattr(pretrained, name), {"bcos_args"})
    for family in ("resnet", "densenet"):
        networks = importlib.import_module(f"bcos.models.{family}")
        if name.islower() and name in networks.__all__:
            return partial(_bcos_network, getattr(networks, name), set())
    raise InvalidModel(f"the bcos package has no ResNet, DenseNet, VGG, ConvNeXt or ViT {name!r}")


def _bcos_network(entry: Callable[..., nn.Module], more: set[str], /, **options: Any) -> nn.Module:
    """Call a factory of the bcos package, which ignores options it does not know, and refuse those."""
    network = inner = entry(pretrained=False, **options)
    if isinstance(network, nn.Sequential):  # a B-cos ViT and its logit layer, which no entry point has options for
        inner, logits = network
        for name in ("logit_bias", "logit_temperature"):
            setattr(logits, name, options.pop(name, getattr(logits, name)))
    unknown = sorted(set(options) - set(inspect.signature(type(inner)).parameters) - more)
    if unknown:
        raise TypeError(f"{type(inner).__name__} has no option {', '.join(unknown)}")
    return network
