"""How many cores a thread computes on."""

from __future__ import annotations

import torch


def use_cores(count: int) -> None:
    """Let PyTorch use so many cores in the calling thread, whatever other threads are told later.

    OpenMP's number is a property of the calling thread: it must be set in the one that computes. PyTorch's own, which a
    thread takes over the first time that it asks, is of all threads: so this one asks at once.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()
