"""Timing side by side, and the form of a result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured number beside its baseline."""

    name: str
    value: float
    unit: str
    higher_is_better: bool
    baseline: str
    """What it is compared with."""
    baseline_value: float
    ratio: float
    """Larger is better, whichever way the value goes."""
    target: float | None
    """The ratio to reach."""
    machine: str


def row(
    name: str,
    value: float,
    unit: str,
    *,
    baseline: str,
    baseline_value: float,
    higher_is_better: bool = True,
    target: float | None = None,
) -> Row:
    """Return a row with its ratio."""
    ratio = value / baseline_value if higher_is_better else baseline_value / value
    numbers = (round(value, 4), round(baseline_value, 4), round(ratio, 3))
    return Row(name, numbers[0], unit, higher_is_better, baseline, numbers[1], numbers[2], target, machine())


def interleaved(work: Mapping[Name, Callable[[], object]], repeats: int = 7) -> dict[Name, float]:
    """Return the median seconds of each piece of work, run in turn after one run to warm up."""
    times: dict[Name, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def publish(benchmark: str, rows: Sequence[Row], **notes: Any) -> None:
    """Print the result as one JSON object on the last line, and record it."""
    result = {**asdict(rows[0])} if len(rows) == 1 else {"rows": [asdict(r) for r in rows]}
    result |= notes
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def machine() -> str:
    """Say what was measured on: processor, cores, accelerator, library."""
    import torch

    processor = platform.processor() or "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    parts = [processor, f"{len(os.sched_getaffinity(0))} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name(0))
    return ", ".join([*parts, f"torch {torch.__version__.partition('+')[0]}"])
