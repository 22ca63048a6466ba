"""How long each stage of answering a batch took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from concepts.contrast.records import Contrast
from concepts.errors import WhenceError
from concepts.explanation import Explanation, StageTimes
from concepts.intervention import Intervention

Answer = TypeVar("Answer", Explanation, Intervention, Contrast)


def timed(answered: Sequence[Answer | WhenceError], clock: Stopwatch) -> list[Answer | WhenceError]:
    """Return the answers of a batch with the times of its stages."""
    clock.lap("explain")
    stages = StageTimes(**clock.times_ms, batch_size=len(answered))
    return [each if isinstance(each, WhenceError) else replace(each, stages=stages) for each in answered]


class Stopwatch:
    """Milliseconds between laps, with the device's queue emptied at each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times_ms: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.times_ms[f"{stage}_ms"] = 1e3 * (now - self._since)
        self._since = now
