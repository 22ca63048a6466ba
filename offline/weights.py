"""Reading a model's weights from files, without ever unpickling code."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from concepts.errors import InvalidInput

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under which keys training scripts put the state dictionary."""
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""What torch's wrappers for parallel training and compilation put before every name."""

_RENAMED = {
    # What torchvision does itself when it loads them (torchvision.models.densenet._load_state_dict,
    # torchvision.models.vision_transformer.MLPBlock).
    "torchvision:densenet": [(re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2")],
    "torchvision:vit_": [
        (re.compile(r"(mlp)\.linear_1\."), r"\1.0."),
        (re.compile(r"(mlp)\.linear_2\."), r"\1.3."),
    ],
}
"""Old names in published files, and what they are called now, by the beginning of the architecture's name."""


def read_weights(path: Path, architecture: str = "") -> dict[str, Tensor]:
    """Read a state dictionary from a ``.safetensors`` file, or a ``.pth`` or ``.pt`` file of tensors alone.

    Wrappers that training scripts add (a ``state_dict`` entry, the prefix ``module.``) are taken off, and names that
    the architecture's published files had before are changed to those it has now.

    Raises
    ------
    InvalidInput
        If the file is not there, is damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise InvalidInput(f"there is no weights file {path}")
    try:
        content: Any = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise InvalidInput(f"weights file {path} cannot be read: {_first_line(error)}") from error
    except Exception as error:  # torch raises pickle's own error classes for refused content
        raise InvalidInput(f"weights file {path} holds more than tensors and is not read: save a state_dict") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidInput(f"weights file {path} is not a state dictionary: save model.state_dict()")
    return _renamed(content, architecture)


def fetch_weights(version: Any, architecture: str) -> dict[str, Tensor]:
    """Download one of torchvision's published weights, or take it from torch's cache.

    Parameters
    ----------
    version
        A ``WeightsEnum``.
    architecture
        Whose weights they are.

    Raises
    ------
    InvalidInput
        If they cannot be had from here.
    """
    try:
        content = version.get_state_dict(
            check_hash=True, weights_only=True, map_location="cpu", progress=sys.stderr.isatty()
        )
    except Exception as error:  # no network, or not the bytes that were published: torch raises pickle's errors, too
        raise InvalidInput(
            f"{version!r} cannot be fetched here ({_first_line(error)}): fetch {version.url} elsewhere and pass the "
            "file with --weights"
        ) from error
    return _renamed(content, architecture)


def _renamed(weights: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    rules = [rule for start, rules in _RENAMED.items() if architecture.startswith(start) for rule in rules]
    result = {}
    for key, value in weights.items():
        name = _PREFIX.sub("", str(key))
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        result[name] = value
    return result


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
