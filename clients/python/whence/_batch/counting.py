"""What the results of a batch say together: counted chunk by chunk, in memory that does not grow with the images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence._errors import missing_extra

try:
    import pyarrow as pa
    import pyarrow.compute as pc
except ImportError as absent:
    raise missing_extra("batch", "pyarrow") from absent

COLUMNS = ("key", "etag", "prediction", "concepts", "report", "runtime", "explained_at")
"""Of the results, those that are counted."""
EXAMPLES = 4
"""Of a concept."""

_SUMS = ("images", "active", "share", "contribution", "positive", "negative")
_TRUST = ("top1_agrees", "relative_error", "kl", "carried_share")
"""Fields of the report that say how far an explanation can be trusted, as means."""


@dataclass(frozen=True, slots=True)
class Example:
    """An image in which a concept is strong."""

    chunk: int
    key: str
    etag: str | None
    activation: float
    contribution: float
    prediction: str


@dataclass(frozen=True, slots=True)
class ClassCount:
    """A class that is predicted."""

    index: int
    name: str
    images: int
    confidence: float
    """Mean probability."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How far explanations can be trusted: means over images, None where no image has the number."""

    top1_agrees: float | None
    """Share of images whose reconstruction is predicted as the image is."""
    relative_error: float | None
    kl: float | None
    carried_share: float | None


@dataclass(frozen=True, slots=True)
class ConceptCount:
    """A concept over all images that list it."""

    id: int
    label: str
    weak_label: bool
    class_index: int | None
    images: int
    """That list it."""
    active: int
    """Those of them in which its activation is not zero."""
    share: float
    """Mean |share|."""
    contribution: float
    """Mean."""
    consistency: float | None
    """Of the contributions that are not zero, the share that have the more frequent sign; None without any."""
    trust: Trust
    examples: tuple[Example, ...]
    """Where it is most active, strongest first."""


class Counts:
    """Adds chunks up."""

    def __init__(self) -> None:
        self.images = 0
        self.exactness: Counter[str] = Counter()
        self.runtimes: Counter[str] = Counter()
        self.first: datetime | None = None
        """When the earliest image was explained, and the latest."""
        self.last: datetime | None = None
        self.residual = 0.0
        """Largest |completeness residual|, in logits."""
        self._classes: dict[tuple[int, str], list[float]] = {}
        self._all = _Means(1)
        self._rows: dict[int, int] = {}
        self._facts: list[tuple[str, bool, int | None]] = []
        self._examples: list[list[Example]] = []
        self._sums = {name: np.zeros(0) for name in _SUMS}
        self._means = _Means(0)

    def add(self, chunk: int, table: pa.Table) -> None:
        """Take the results of a chunk, with `COLUMNS`."""
        self.images += len(table)
        prediction, report = _fields(table["prediction"]), _fields(table["report"])
        self._add_classes(prediction)
        self.exactness.update(report["exactness"].to_pylist())
        self.runtimes.update(table["runtime"].to_pylist())
        residuals = np.abs(_numbers(report["completeness_residual"]))
        self.residual = max(self.residual, float(residuals[np.isfinite(residuals)].max(initial=0.0)))
        times = pc.min_max(table["explained_at"]).as_py()
        self.first = min(filter(None, (self.first, times["min"])), default=None)
        self.last = max(filter(None, (self.last, times["max"])), default=None)
        trust = {name: _numbers(report[name]) for name in _TRUST}
        self._all.add(np.zeros(len(table), np.int64), trust)
        self._add_concepts(chunk, table, prediction, trust)

    def classes(self) -> list[ClassCount]:
        """Classes, most frequent first."""
        found = (ClassCount(*names, int(count), total / count) for names, (count, total) in self._classes.items())
        return sorted(found, key=lambda each: (-each.images, each.index, each.name))

    def trust(self) -> Trust:
        """Of all images."""
        return self._all.of(0)

    def concepts(self) -> list[ConceptCount]:
        """Concepts, most prevalent first."""
        found = (self._concept(concept_id, row) for concept_id, row in self._rows.items())
        return sorted(found, key=lambda each: (-each.images, each.id))

    def _add_classes(self, prediction: dict[str, pa.Array]) -> None:
        names = zip(prediction["index"].to_pylist(), prediction["name"].to_pylist(), strict=True)
        for name, probability in zip(names, _numbers(prediction["probability"]), strict=True):
            entry = self._classes.setdefault(name, [0.0, 0.0])
            entry[0] += 1
            entry[1] += float(probability)

    def _add_concepts(
        self, chunk: int, table: pa.Table, prediction: dict[str, pa.Array], trust: dict[str, NDArray[np.float64]]
    ) -> None:
        lists = table["concepts"].combine_chunks()
        images = pc.list_parent_indices(lists).to_numpy()
        listed = _fields(lists.flatten())
        rows = self._rows_of(listed)
        activation, contribution, share = (_numbers(listed[name]) for name in ("activation", "contribution", "share"))
        amounts = {
            "images": np.ones(len(rows)),
            "active": activation != 0,
            "share": np.abs(share),
            "contribution": contribution,
            "positive": contribution > 0,
            "negative": contribution < 0,
        }
        for name, amount in amounts.items():
            self._sums[name] = _sum(self._sums[name], rows, amount.astype(np.float64), len(self._rows))
        self._means.grow(len(self._rows))
        self._means.add(rows, {name: values[images] for name, values in trust.items()})
        for row, place in _strongest(rows, activation):
            image = int(images[place])
            best = prediction["name"][image].as_py() or str(prediction["index"][image].as_py())
            example = Example(
                chunk,
                table["key"][image].as_py(),
                table["etag"][image].as_py(),
                float(activation[place]),
                float(contribution[place]),
                f"{best} {prediction['probability'][image].as_py():.0%}",
            )
            found = [*self._examples[row], example]
            self._examples[row] = sorted(found, key=lambda each: (-each.activation, each.key))[:EXAMPLES]

    def _rows_of(self, listed: dict[str, pa.Array]) -> NDArray[np.int64]:
        """The place of each listed concept in the sums; concepts that are new get one."""
        ids, firsts, inverse = np.unique(listed["id"].to_numpy(), return_index=True, return_inverse=True)
        for concept_id, first in zip(ids.tolist(), firsts.tolist(), strict=True):
            if concept_id not in self._rows:
                self._rows[concept_id] = len(self._rows)
                facts = (listed[name][first].as_py() for name in ("label", "weak_label", "class_index"))
                self._facts.append(tuple(facts))
                self._examples.append([])
        rows = np.array([self._rows[concept_id] for concept_id in ids.tolist()], np.int64)
        return rows[inverse.reshape(-1)]

    def _concept(self, concept_id: int, row: int) -> ConceptCount:
        sums = {name: float(values[row]) for name, values in self._sums.items()}
        label, weak_label, class_index = self._facts[row]
        signed = sums["positive"] + sums["negative"]
        return ConceptCount(
            id=concept_id,
            label=label or "",
            weak_label=bool(weak_label),
            class_index=class_index,
            images=int(sums["images"]),
            active=int(sums["active"]),
            share=sums["share"] / sums["images"],
            contribution=sums["contribution"] / sums["images"],
            consistency=max(sums["positive"], sums["negative"]) / signed if signed else None,
            trust=self._means.of(row),
            examples=tuple(self._examples[row]),
        )


class _Means:
    """Means of the numbers that say how far explanations can be trusted, over the images that have them."""

    def __init__(self, size: int) -> None:
        self._totals = {name: np.zeros(size) for name in _TRUST}
        self._counts = {name: np.zeros(size) for name in _TRUST}

    def grow(self, size: int) -> None:
        for sums in (self._totals, self._counts):
            for name, values in sums.items():
                sums[name] = np.pad(values, (0, size - len(values)))

    def add(self, rows: NDArray[np.int64], values: dict[str, NDArray[np.float64]]) -> None:
        for name, amount in values.items():
            known = np.isfinite(amount)
            size = len(self._totals[name])
            self._totals[name] = _sum(self._totals[name], rows[known], amount[known], size)
            self._counts[name] = _sum(self._counts[name], rows[known], np.ones(known.sum()), size)

    def of(self, row: int) -> Trust:
        counts = {name: self._counts[name][row] for name in _TRUST}
        means = {name: float(self._totals[name][row] / count) if count else None for name, count in counts.items()}
        return Trust(**means)


def _fields(structs: Any) -> dict[str, pa.Array]:
    """The fields of an array of structs."""
    flat = structs.combine_chunks() if isinstance(structs, pa.ChunkedArray) else structs
    return {field.name: pc.struct_field(flat, field.name) for field in flat.type}


def _numbers(values: pa.Array) -> NDArray[np.float64]:
    """Numbers or truth values as float64; NaN where there is none."""
    found: NDArray[np.float64] = pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False)
    return found


def _sum(
    before: NDArray[np.float64], rows: NDArray[np.int64], amounts: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """Sums by row, with more added."""
    more = np.bincount(rows, amounts, minlength=size).astype(np.float64)  # without amounts, it counts in integers
    more[: len(before)] += before
    return more


def _strongest(rows: NDArray[np.int64], activation: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    """Each row's strongest places: pairs of row and place."""
    order = np.lexsort((-activation, rows))
    taken, count = -1, 0
    for place in order.tolist():
        row = int(rows[place])
        taken, count = (row, 1) if row != taken else (row, count + 1)
        if count <= EXAMPLES and activation[place] > 0 and math.isfinite(activation[place]):
            yield row, place
