"""Reading a model's weights from files, without ever unpickling code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from concepts.errors import InvalidInput

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under which keys training scripts put the state dictionary."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dictionary from a ``.safetensors`` file, or a ``.pth`` or ``.pt`` file of tensors alone.

    Wrappers that training scripts add (a ``state_dict`` entry, the prefix ``module.``) are taken off.

    Raises
    ------
    InvalidInput
        If the file is not there, is damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise InvalidInput(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise InvalidInput(f"weights file {path} cannot be read: {_first_line(error)}") from error
    except Exception as error:  # torch raises pickle's own error classes for refused content
        raise InvalidInput(f"weights file {path} holds more than tensors and is not read: save a state_dict") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidInput(f"weights file {path} is not a state dictionary: save model.state_dict()")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
