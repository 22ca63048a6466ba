"""What comes back for one image whose concepts were scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from whence._explanation import ClassScore, Timings


@dataclass(frozen=True, slots=True, repr=False)
class Intervention:
    """What the model answers as it is, and with chosen concepts weaker or stronger.

    ``before`` and ``after`` hold the same classes, the five most probable of either, each sorted by its own
    probabilities.
    """

    request_id: str
    model: str
    model_digest: str
    """sha256 of the weights, hexadecimal."""
    bank: str
    """``model/layer/name``."""
    bank_digest: str
    """sha256 of the bank's ``bank.json``, hexadecimal."""
    scales: Mapping[int, float]
    """Factor for the codes of each scaled concept, by the concept's id."""
    target: ClassScore
    """The class whose concepts were meant, as it was before."""
    before: tuple[ClassScore, ...]
    """The prediction as it is, best first."""
    after: tuple[ClassScore, ...]
    """The prediction with the concepts scaled, best first."""
    timings: Timings
    runtime: str
    """What computed this, e.g. ``torch cpu float32``."""

    @property
    def changed(self) -> bool:
        """Whether the model predicts another class."""
        return self.before[0].index != self.after[0].index

    def describe(self) -> str:
        """What was done and what came of it in words, one statement a line."""
        from whence._words import intervention_lines

        return "\n".join(intervention_lines(self))

    def __repr__(self) -> str:
        from whence._words import intervention_line

        return intervention_line(self)

    def _repr_html_(self) -> str:
        """A table of what was and what came of it, for notebooks."""
        from whence._html import render_intervention

        return render_intervention(self)
