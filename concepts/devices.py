"""Choosing where to compute."""

from __future__ import annotations

import torch

from concepts.errors import InvalidInput


def choose(name: str = "auto") -> torch.device:
    """Return the device of a name; ``auto`` is a GPU where there is one.

    On a GPU, convolutions compute in full float32 from then on. Their default, TF32, has 10 bits of mantissa: what is
    called float32 would depend on the batch.

    Raises
    ------
    InvalidInput
        If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"there is no device {name!r} here: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return device
