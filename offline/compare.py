"""Banks side by side: the metrics that all of them have, which is best at what, and what to know of the numbers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from concepts.bank import Bank
from concepts.errors import InvalidInput
from concepts.repository import Repository
from offline.config import JudgingConfig
from offline.evaluate import AS_TRAINED, EvaluationSettings, classes_of, evaluate_bank
from offline.judging import CURVE
from offline.progress import Reporter


class Column(NamedTuple):
    """How one metric is shown."""

    title: str
    better: Literal["higher", "lower"] | None
    """None: it says nothing of the bank."""


COLUMNS = {
    "accuracy": Column("accuracy", None),
    "accuracy_reconstructed": Column("reconstructed", "higher"),
    "top1_agreement": Column("top-1 kept", "higher"),
    "kl": Column("KL", "lower"),
    "variance_explained": Column("var. explained", "higher"),
    "relative_error": Column("rel. error", "lower"),
    "mse": Column("MSE", "lower"),
    f"deletion_aopc_{CURVE}": Column(f"C-Del {CURVE}", "higher"),
    f"insertion_auc_{CURVE}": Column(f"C-Ins {CURVE}", "higher"),
    "deletion_aopc": Column("C-Del", "higher"),
    "insertion_auc": Column("C-Ins", "higher"),
    "gini": Column("Gini", "higher"),
    "concepts_for_80": Column("for 80 %", "lower"),
    "l0_position": Column("L0", "lower"),
    "l0_image": Column("L0 image", "lower"),
    "code_density": Column("density", "lower"),
    "dead_share": Column("dead", "lower"),
    "always_on_share": Column("always on", "lower"),
    "hoyer": Column("Hoyer", "higher"),
    "largest_cosine": Column("max cosine", "lower"),
    "cohesion": Column("cohesion", "higher"),
    "interpretable_share": Column("interpretable", "higher"),
    "active_share": Column("images with some", "higher"),
    "carried_share": Column("carried", None),
    "consistency": Column("C²", "higher"),
    "consistency_of_contributions": Column("C² weighted", "higher"),
    "stability": Column("stability", "higher"),
    "stability_starts": Column("of starts", "higher"),
    "auroc": Column("AUROC", "higher"),
    "pointing_game": Column("pointing", "higher"),
    "iou": Column("IoU", "higher"),
    "plane_accuracy": Column("right side", "higher"),
    "plane_accuracy_min": Column("least", "higher"),
    "image_accuracy": Column("images", "higher"),
    "plane_margin": Column("margin", None),
    "swap_rate": Column("swapped", "higher"),
    "swap_shift": Column("by shift", None),
    "masking_target": Column("masked p_i", "lower"),
    "masking_other": Column("masked p_j", "higher"),
}
"""Metrics in the order in which they are shown; what one of these says already is left out."""

_OF_ALL_CONCEPTS = {"deletion_aopc", "insertion_auc", "gini"}
_OF_THE_LAYER = {"variance_explained", "relative_error", "mse", "l0_position", "hoyer", "largest_cosine"}
_OF_REFITS = {"stability", "stability_starts"}


@dataclass(frozen=True)
class Row:
    """One bank."""

    bank: Bank
    metrics: Mapping[str, float]
    held_out: str | None
    """Fingerprint of the images that it was measured on; None where it is not known."""

    @property
    def per_class(self) -> bool:
        """Whether its concepts belong to classes."""
        return any(concept.class_index is not None for concept in self.bank.concepts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many concepts are ranked together: of each class, or in all; every number once."""
        counts: dict[int | None, int] = {}
        for concept in self.bank.concepts:
            counts[concept.class_index] = counts.get(concept.class_index, 0) + 1
        return tuple(sorted(set(counts.values())))


@dataclass(frozen=True)
class Comparison:
    """Banks side by side."""

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    """The metrics that all rows have."""
    best: Mapping[str, tuple[int, ...]]
    """Of each column that can be compared, the rows that are best."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        rows = [
            {
                **identity(row.bank),
                "concepts": len(row.bank.concepts),
                "metrics": {n: row.metrics[n] for n in self.columns},
            }
            for row in self.rows
        ]
        best = {name: [self.rows[place].bank.digest for place in places] for name, places in self.best.items()}
        return {"banks": rows, "columns": self.columns, "best": best, "notes": self.notes}


def identity(bank: Bank) -> dict[str, str]:
    """Return what tells a bank from others."""
    method = str(bank.configuration.get("method", ""))
    return {"bank": bank.reference, "digest": bank.digest, "kind": bank.kind, "method": method, "layer": bank.layer}


def compare_stored(repository: Repository, references: Sequence[str]) -> Comparison:
    """Compare banks by the metrics that they carry.

    Raises
    ------
    UnknownBank, CorruptData, WeightsMismatch
        If there is no such bank, or it cannot be used any more.
    InvalidInput
        If the banks have no metric in common.
    """
    banks = [repository.load(repository.resolve(reference)) for reference in references]
    return side_by_side([_row(bank, bank.metrics) for bank in banks])


def compare_on(
    repository: Repository, references: Sequence[str], settings: EvaluationSettings, report: Reporter
) -> Comparison:
    """Compare banks by what the same images say of them, of the classes that all of them explain.

    Raises
    ------
    InvalidInput
        If there is no such class; and whatever ``evaluate_bank`` refuses.
    """
    banks = [repository.load(repository.resolve(reference)) for reference in references]
    given = settings.model_dump(include=set(AS_TRAINED), exclude_none=True)
    alike = {name: JudgingConfig.model_fields[name].default for name in AS_TRAINED} | given
    settings = settings.model_copy(update={**alike, "classes": _shared_classes(repository, banks, settings.classes)})
    rows, notes = [], []
    for bank in banks:
        found = evaluate_bank(repository, f"{bank.reference}@{bank.digest}", settings, report)
        rows.append(_row(bank, found.metrics))
        if found.unseen:
            notes.append(f"{bank.reference}: no image is predicted as {', '.join(found.unseen)}")
    return side_by_side(rows, notes)


def side_by_side(rows: Sequence[Row], notes: Sequence[str] = ()) -> Comparison:
    """Return a comparison of measured banks."""
    columns = tuple(name for name in COLUMNS if all(name in row.metrics for row in rows))
    if not columns:
        raise InvalidInput("the banks have no metric in common: give --images to measure all of them")
    best = {name: _best(name, rows) for name in columns}
    return Comparison(
        tuple(rows),
        columns,
        {name: places for name, places in best.items() if places},
        (*_notes(rows, columns), *notes),
    )


def _row(bank: Bank, metrics: Mapping[str, Any]) -> Row:
    numbers = {**metrics.get("mean", {}), **metrics.get("localisation", {})}
    known = {name: numbers[name] for name in COLUMNS if isinstance(numbers.get(name), float)}
    return Row(bank, known, metrics.get("held_out_fingerprint"))


def _shared_classes(repository: Repository, banks: Sequence[Bank], asked: Sequence[str]) -> tuple[str, ...]:
    """Return the classes that all banks explain, or those asked for, if all banks explain them."""
    explained = [classes_of(bank, repository.model_spec(bank.model).class_names) for bank in banks]
    shared = tuple(name for name in explained[0] if all(name in names for names in explained))
    missing = [name for name in asked if name not in shared]
    if missing or not shared:
        what = (
            f"class {missing[0]!r} is not one that all these banks explain" if missing else "no class is in all banks"
        )
        raise InvalidInput(f"{what}: compare banks that have classes in common, and name none but these")
    return tuple(asked) or shared


def _best(name: str, rows: Sequence[Row]) -> tuple[int, ...]:
    """Return the rows with the best value; none where the column says nothing of which is better."""
    values, better = [row.metrics[name] for row in rows], COLUMNS[name].better
    if better is None or min(values) == max(values) or len({_rule(name, row) for row in rows}) > 1:
        return ()
    best = max(values) if better == "higher" else min(values)
    return tuple(place for place, value in enumerate(values) if value == best)


def _rule(name: str, row: Row) -> Hashable:
    """Return what must be the same for values of a metric to be compared."""
    if name in _OF_ALL_CONCEPTS:
        return row.per_class, row.sizes
    if name in _OF_THE_LAYER:
        return row.bank.model, row.bank.layer
    return row.per_class if name in _OF_REFITS else None


def _notes(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return what to know of the numbers."""
    notes = []
    if len({row.bank.model for row in rows}) > 1:
        notes.append("the banks are of different models, each measured on the images that it predicts as a class")
    elif len({row.held_out for row in rows} | {None}) > 2 or None in {row.held_out for row in rows}:
        notes.append("the banks were not all measured on the same images, as far as is known: give --images to do so")
    if len({(row.bank.model, row.bank.layer) for row in rows}) > 1:
        notes.append("the layers differ: errors, L0 and what is said of atoms are of different activations")
    if len({row.per_class for row in rows}) > 1:
        notes.append("means are over classes where concepts belong to classes, and over images elsewhere")
    if f"deletion_aopc_{CURVE}" in columns:
        notes.append(
            f"C-Del {CURVE}, C-Ins {CURVE}: the {CURVE} concepts that contribute most to each image; "
            f"Σ (acc_0 − acc_i) / {CURVE + 2}, and area / {CURVE}"
        )
    if "deletion_aopc" in columns:
        notes.append(f"C-Del, C-Ins: all K concepts; Σ (acc_0 − acc_i) / (K + 2), and area / K; {_sizes(rows)}")
    if "stability" in columns and len({row.per_class for row in rows}) > 1:
        notes.append("stability: over folds where concepts belong to classes, over seeds elsewhere")
    return notes


def _sizes(rows: Sequence[Row]) -> str:
    """Say how many concepts are ranked together, and by what."""
    said = []
    for row in rows:
        ranked = "by the importance to the class" if row.per_class else "by the contribution to each image"
        count = "–".join(str(size) for size in dict.fromkeys((row.sizes[0], row.sizes[-1])))
        said.append(f"{row.bank.name} K = {count} {ranked}")
    return ", ".join(dict.fromkeys(said))
