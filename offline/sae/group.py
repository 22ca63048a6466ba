"""The devices that share every batch: one process each."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from concepts.errors import WhenceError

T = TypeVar("T")

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for another that does not answer."""


@dataclass(frozen=True)
class Group:
    """A process's place among those that train together."""

    device: torch.device
    part: int = 0
    parts: int = 1

    def total(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all parts, in place, and return it; every part is given the same bits."""
        if self.parts > 1:
            dist.all_reduce(tensor)
        return tensor


def run_together(devices: Sequence[torch.device], own: Callable[[Group], T], others: Callable[[Group], Any]) -> T:
    """Run work on several devices at once, one process each, and return this process's result.

    Parameters
    ----------
    devices
        This process works on the first.
    own
        The work of this process.
    others
        That of all others; it must be picklable.

    Raises
    ------
    WhenceError
        What any of the processes raised.
    """
    if len(devices) == 1:
        return own(Group(devices[0]))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    errors = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        processes = [
            context.Process(target=_other, args=(devices, part, meeting, others, errors), daemon=True)
            for part in range(1, len(devices))
        ]
        for process in processes:
            process.start()
        try:
            result = _member(devices, 0, meeting, own)
        except RuntimeError:
            # Another left while this one waited for it: the reason is the other's.
            if not errors.empty():
                raise errors.get() from None
            raise
        else:
            for process in processes:
                process.join()
            return result
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _other(
    devices: Sequence[torch.device], part: int, meeting: str, work: Callable[[Group], Any], errors: SimpleQueue[Any]
) -> None:
    """Be the process of one of the other devices."""
    try:
        _member(devices, part, meeting, work)
    except WhenceError as error:
        errors.put(error)


def _member(devices: Sequence[torch.device], part: int, meeting: str, work: Callable[[Group], T]) -> T:
    """Work as one of the group."""
    device = devices[part]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if all(each.type == "cuda" for each in devices) else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=part, world_size=len(devices), timeout=_PATIENCE)
    try:
        result = work(Group(device, part, len(devices)))
        # Whoever leaves while another still talks can make that one fail.
        dist.barrier(device_ids=[torch.cuda.current_device()] if backend == "nccl" else None)
        return result
    finally:
        dist.destroy_process_group()
