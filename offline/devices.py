"""Choosing where to compute."""

from __future__ import annotations

import torch

from concepts.errors import InvalidInput


def choose(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is a GPU where there is one.

    Raises
    ------
    InvalidInput
        If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"there is no device {name!r} here: use auto, cpu, cuda or cuda:N") from error
    return device
