"""Small sources, outputs and services for the tests of batches."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import whence
from whence import Explanation
from whence._batch.locations import parse
from whence._batch.output import Output
from whence._batch.run import Job, _open, run_job
from whence._batch.service import Explain
from whence._batch.sources import Source, open_source
from whence.testing import make_explanation

BANK = whence.Bank(
    reference="fake/layer/bank",
    digest="b" * 64,
    kind="nmf",
    model="fake",
    layer="layer",
    name="bank",
    concept_count=5,
    channels=8,
    weights_digest="a" * 64,
    created="2026-01-01T00:00:00Z",
)
WITH_MAPS = make_explanation()
ANSWER = replace(WITH_MAPS, concepts=tuple(replace(concept, maps={}) for concept in WITH_MAPS.concepts))


class FakeService:
    """Answers with the size of the image as the sum of contributions and its content as the runtime.

    It remembers what it was asked.

    Parameters
    ----------
    answer
        What to do first for each image; may raise.
    explanation
        What to say of all of them; maps are those of this one.
    """

    def __init__(
        self,
        answer: Callable[[bytes], Awaitable[None]] | None = None,
        delay_s: float = 0.0,
        explanation: Explanation = ANSWER,
    ) -> None:
        self.explanation = explanation
        self.asked: Counter[bytes] = Counter()
        self.in_flight = self.most_in_flight = 0
        self._answer, self._delay_s = answer, delay_s

    async def __call__(self, content: bytes, timeout_s: float) -> Explanation:
        self.asked[content] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self._delay_s)
            if self._answer is not None:
                await self._answer(content)
        finally:
            self.in_flight -= 1
        return replace(
            self.explanation, contributions_total=float(len(content)), runtime=content.decode(errors="replace")
        )


def fill(folder: Path, count: int = 10, start: int = 0) -> dict[str, bytes]:
    """Write small objects, and return them by key."""
    objects = {f"{'ab'[n % 2]}/{n:03d}.jpg": f"image {n}".encode() for n in range(start, start + count)}
    for key, content in objects.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return objects


def a_job(source: Path | str, output: Path | str, **changes: Any) -> Job:
    """A job of small chunks that does not wait long."""
    settings: dict[str, Any] = {"chunk_size": 3, "patience_s": 5.0, **changes}
    return Job(parse(source), parse(output), **settings)


def do(
    job: Job,
    service: Explain | None = None,
    *,
    source: Source | None = None,
    output: Output | None = None,
    bank: whence.Bank = BANK,
    **more: Any,
) -> whence.BatchSummary:
    """Do a job to its end."""
    return asyncio.run(
        run_job(
            job,
            source or open_source(job.source),
            output or _open(job),
            bank,
            service or FakeService(),
            **more,
        )
    )


def ends(output: Path | str) -> Counter[str]:
    """How often each key ended."""
    tables = [whence.read_batch(output, name, ["key"]) for name in ("results", "failures")]  # type: ignore[arg-type]
    return Counter(key for table in tables for key in table["key"].to_pylist())
