"""What callers of a batch are told: how far it is, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; of a shard, its share of the whole."""

    total: int
    """Images to end, those that had ended before included."""
    finished: int
    """Images that have ended, in results or failures."""
    failed: int
    """Those of them that this run put among the failures."""
    in_flight: int
    """Images that the service is working on."""
    limit: int
    """Images that it is given at a time."""
    rate: float
    """Images per second, lately."""
    remaining_s: float | None
    """Time left at this rate, in seconds; None where nothing has ended yet."""
    waiting: str = ""
    """Why nothing goes on, where the service or the store has to be waited for."""


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """How a run ended, and what the output holds now."""

    source: str
    output: str
    bank: str
    """``model/layer/name``."""
    bank_digest: str
    revision: int
    """Number of the plan: 1 for the first, one more whenever a refresh or a retry found something to do."""
    objects: int
    """In the source, by the plan."""
    bytes: int
    """Their size."""
    chunks: int
    chunks_done: int
    explained: int
    """Images with results, of this run and those before."""
    failed: int
    """Images among the failures, of this run and those before."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Failures by reason."""
    finished_now: int = 0
    """Images that ended in this run."""
    seconds: float = 0.0
    """How long this run took."""
    dry_run: bool = False

    @property
    def complete(self) -> bool:
        """Whether every image has ended."""
        return self.chunks_done == self.chunks
