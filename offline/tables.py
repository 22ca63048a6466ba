"""What commands print: tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape
from rich.table import Table

from concepts.bank import Bank, Concept
from concepts.cut import CutLayer
from concepts.model import ModelSpec
from concepts.preprocessing import Preprocessing
from concepts.repository import BankSummary
from offline.compare import COLUMNS, Comparison, identity
from offline.contrast.audit import Audit
from offline.contrast.insertion import VARIANTS
from offline.evaluate import Evaluated
from offline.store.plan import in_words
from offline.store.reading import Store
from offline.trainers import Outcome

_OF_TRAINING = {"training_images": "images", "training_crops": "crops"}
_CLASS_COLUMNS = (
    *_OF_TRAINING,
    "relative_error",
    "kl",
    "top1_agreement",
    "deletion_aopc",
    "insertion_auc",
    "gini",
    "stability",
)
_BANK_COLUMNS = (
    "accuracy",
    "accuracy_reconstructed",
    "cohesion",
    "interpretable_share",
    "active_share",
    "carried_share",
    "variance_explained",
    "kl",
    "l0_position",
    "l0_image",
    "concepts_for_80",
    "dead_share",
    "always_on_share",
    "consistency",
    "consistency_of_contributions",
    "stability",
)
_PLANE_COLUMNS = ("plane_accuracy", "plane_accuracy_min", "image_accuracy", "plane_margin", "swap_rate", "swap_shift")
_NAME_WIDTH = 20
_CONCEPTS_SHOWN = 50
_WORDS_SHOWN = 4
_COUNTS = {"images", *_OF_TRAINING}


def outcome(result: Outcome, class_names: tuple[str, ...]) -> Table:
    """Return what a training came to: one row a class, or a bank where concepts belong to no class."""
    if result.bank.kind == "contrast":
        return _planes(result)
    return _by_class(result, class_names) if "classes" in result.bank.metrics else _by_bank(result)


def _by_bank(result: Outcome) -> Table:
    """Return one row a bank: size, and metrics on held-out images."""
    table = Table("bank", "digest", "concepts", title_justify="left")
    names = [name for name in _BANK_COLUMNS if any(name in bank.metrics["mean"] for bank in result.banks)]
    for name in names:
        table.add_column(COLUMNS[name].title, justify="right")
    for bank in result.banks:
        cells = [_number(bank.metrics["mean"].get(name)) for name in names]
        table.add_row(bank.reference, bank.digest[:12], str(len(bank.concepts)), *cells)
    return table


def _planes(result: Outcome) -> Table:
    """Return what planes between classes came to: size, and metrics on held-out images; classes without planes."""
    bank = result.bank
    notes = [escape(f"{name} has no planes: {reason}") for name, reason in result.skipped_classes.items()]
    if bank.configuration["prototypes"] != "nmf":
        notes.append(f"prototypes: {bank.configuration['prototypes']}")
    names = [name for name in _PLANE_COLUMNS if name in bank.metrics["mean"]]
    table = Table("bank", "digest", "planes", "prototypes", caption="\n".join(notes) or None, caption_justify="left")
    for name in names:
        table.add_column(COLUMNS[name].title, justify="right")
    cells = [_number(bank.metrics["mean"][name]) for name in names]
    planes = f"{bank.metrics['pairs']['planes']:,}"
    table.add_row(bank.reference, bank.digest[:12], planes, f"{len(bank.concepts):,}", *cells)
    return table


def _by_class(result: Outcome, class_names: tuple[str, ...]) -> Table:
    """Return one row a class: size, metrics on held-out images, the most important concepts."""
    table = Table(title=f"{result.bank.reference} @ {result.bank.digest[:12]}", title_justify="left")
    table.add_column("class", no_wrap=True)
    for name in _CLASS_COLUMNS:
        table.add_column(_title(name), justify="right")
    table.add_column("most important", no_wrap=True)
    metrics = result.bank.metrics
    for name, row in metrics["classes"].items():
        table.add_row(name, *_cells(row), _best(result.bank, class_names.index(name)))
    table.add_section()
    table.add_row("mean", *_cells(metrics["mean"]), "")
    for name, reason in result.skipped_classes.items():
        table.add_row(name, *[""] * len(_CLASS_COLUMNS), f"[yellow]skipped:[/] {reason}")
    return table


def evaluated(found: Evaluated) -> Table:
    """Return what images say of a bank: one row a metric."""
    table = Table("metric", "value", title=f"{found.bank.reference} @ {found.bank.digest[:12]}", title_justify="left")
    for name, value in found.metrics["mean"].items():
        table.add_row(name, *_cells({name: value}, [name]))
    for name, value in found.metrics.get("localisation", {}).items():
        if isinstance(value, float):
            table.add_row(f"localisation {name}", _number(value))
    return table


def evaluated_classes(found: Evaluated) -> Table:
    """Return what images say of the concepts of each class: one row a class."""
    rows = found.metrics["classes"]
    names = [name for name in ("images", *_CLASS_COLUMNS) if all(name in row for row in rows.values())]
    table = Table()
    table.add_column("class", no_wrap=True)
    for name in names:
        table.add_column(_title(name), justify="right")
    for title, row in rows.items():
        table.add_row(escape(title), *_cells(row, names))
    return table


def compared(found: Comparison) -> Table:
    """Return one row a bank, the best of each column marked."""
    table = Table(caption="\n".join(_notes_of(found)), caption_justify="left")
    table.add_column("bank", no_wrap=True)
    for title in ("digest", "kind", "method", "layer", "concepts"):
        table.add_column(title)
    for name in found.columns:
        table.add_column(COLUMNS[name].title, justify="right")
    for place, row in enumerate(found.rows):
        known = identity(row.bank)
        marks = ["*" if place in found.best.get(name, ()) else "" for name in found.columns]
        cells = [_number(row.metrics[name]) + mark for name, mark in zip(found.columns, marks, strict=True)]
        table.add_row(
            known["bank"], known["digest"][:12], known["kind"], known["method"], known["layer"],
            f"{len(row.bank.concepts):,}", *cells,
        )  # fmt: skip
    return table


def _notes_of(found: Comparison) -> list[str]:
    marked = ["* best of its column; no mark where values are not comparable"] if found.best else []
    return marked + [escape(note) for note in found.notes]


def audited_classes(found: Audit) -> Table:
    """Return one row a class: its strongest prototype, and what that does to images of all other classes."""
    table = Table(title=f"{found.bank.reference} @ {found.bank.digest[:12]}", title_justify="left")
    table.add_column("class", no_wrap=True)
    table.add_column("strongest against", no_wrap=True)
    for title in ("concept", "beyond patches", "flips of all", "blank", "random", "images", "classes flipped"):
        table.add_column(title, justify="right")
    table.add_column("", no_wrap=True)
    for spread in found.spreads:
        flips = spread.flips()
        table.add_row(
            escape(found.class_names[spread.target]),
            escape(found.class_names[spread.finding.insertion.other]),
            str(spread.finding.concept.id),
            _number(spread.finding.excess),
            *[_number(flips.get(variant)) for variant in VARIANTS],
            str(spread.images),
            f"{len(spread.flipped)} of {len(spread.effects)}",
            "[red]suspicious[/]" if spread.suspicious else "",
        )
    return table


def audited(found: Audit) -> Table:
    """Return one row a prototype, the strongest first: what it does to images of the class it is contrasted with."""
    shown = found.findings[: found.settings.top]
    note = f"the {len(shown)} strongest of {len(found.findings):,} prototypes"
    table = Table(caption=note, caption_justify="left")
    table.add_column("class", no_wrap=True)
    table.add_column("pasted into", no_wrap=True)
    for title in ("concept", "flips", "blank", "random", "gain", "blank gain", "random gain", "images"):
        table.add_column(title, justify="right")
    for finding in shown:
        one, effect = finding.insertion, finding.effect
        table.add_row(
            escape(found.class_names[one.target]),
            escape(found.class_names[one.other]),
            str(finding.concept.id),
            *[_number(effect.flips(variant)) for variant in VARIANTS],
            *[_number(effect.gain(variant)) for variant in VARIANTS],
            str(len(effect.keys)),
        )
    return table


def store(found: Store) -> Table:
    """Return what was harvested: one row a fact."""
    plan = found.plan
    positions = f"{plan.positions} an image, {plan.sampling}"
    if plan.positions < plan.positions_wanted:
        positions += f" ({plan.positions_wanted} would not fit the disk budget)"
    table = Table(
        "fact", "value", title=f"{plan.model}/{plan.layer} @ {plan.weights_digest[:12]}", title_justify="left"
    )
    rows = {
        "vectors": f"{len(found):,} of {found.channels} channels, {plan.dtype}",
        "positions": positions,
        "images": f"{found.images:,}",
        "skipped": f"{len(found.skipped):,}",
        "bytes": f"{found.bytes:,} ({in_words(found.bytes)})",
        "data": found.data_fingerprint,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def banks(summaries: Iterable[BankSummary]) -> Table:
    """Return one row a bank."""
    table = Table("bank", "digest", "kind", "concepts", "top-1 kept", "published")
    for summary in summaries:
        manifest = summary.manifest
        kept = manifest["metrics"].get("mean", {}).get("top1_agreement")
        table.add_row(
            summary.version.reference,
            summary.version.digest[:12],
            manifest["kind"],
            str(manifest["concept_count"]),
            "" if kept is None else f"{kept:.3f}",
            _time(summary.published),
        )
    return table


def models(specs: Iterable[ModelSpec]) -> Table:
    """Return one row a model."""
    table = Table("model", "architecture", "input", "classes", "weights")
    for spec in specs:
        size = f"{spec.preprocessing.height}×{spec.preprocessing.width}"
        table.add_row(spec.name, spec.architecture, size, str(len(spec.class_names)), spec.weights_digest[:12])
    return table


def model(spec: ModelSpec, source: str) -> Table:
    """Return what a model is and where its preset comes from: one row a fact."""
    title = f"{spec.name} @ {spec.weights_digest[:12]}, {len(spec.class_names)} classes"
    table = Table("fact", "value", title=title, title_justify="left")
    view = spec.preprocessing
    first = ", ".join(spec.class_names[:3]) + (", …" if len(spec.class_names) > 3 else "")
    rows = {
        "architecture": spec.architecture,
        "options": json.dumps(dict(spec.options)) if spec.options else "",
        "weights": spec.weights_digest,
        "exported": f"ONNX file {spec.exported.digest}, {len(spec.exported.values)} layers" if spec.exported else "",
        "input": f"{view.height}×{view.width} pixels, {view.channels} channels",
        "preprocessing": _in_words(view),
        "classes": first,
        "preset": source,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    return table


def layers(found: Iterable[CutLayer]) -> Table:
    """Return one row a layer."""
    numbers = ("shape", "grid", "tokens", "parameters before", "after")
    table = Table()
    table.add_column("layer", overflow="fold", min_width=_NAME_WIDTH)  # to be copied
    for title in numbers:
        table.add_column(title, justify="right")
    table.add_column("non-negative")
    table.add_column("head")
    for layer in found:
        rows, columns = layer.layout.grid
        table.add_row(
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{rows}×{columns}",
            str(layer.layout.tokens or ""),
            f"{layer.parameters_before:,}",
            f"{layer.parameters_after:,}",
            "yes" if layer.non_negative else "no",
            layer.head.replace("_", " "),
        )
    return table


def facts(bank: Bank, published: float) -> Table:
    """Return what a bank is, how it was learned and how good it is: one row a fact."""
    table = Table("fact", "value", title=f"{bank.reference} @ {bank.digest}", title_justify="left")
    rows: dict[str, Any] = {
        "kind": bank.kind,
        "concepts": len(bank.concepts),
        **({} if bank.parts is None else {"parts": f"{len(bank.parts.concepts)} at {bank.parts.layer}"}),
        "channels": bank.channels,
        "published": _time(published),
        "weights": bank.weights_digest,
        "data": bank.data_fingerprint,
        **{f"configuration: {name}": value for name, value in bank.configuration.items()},
        **{f"mean {name}": _number(value) for name, value in bank.metrics.get("mean", {}).items()},
        **{
            f"{part} {name}": _number(value)
            for part in ("training", "localisation")
            for name, value in bank.metrics.get(part, {}).items()
            if isinstance(value, float)
        },
        **{f"pairs {name}": count for name, count in bank.metrics.get("pairs", {}).items()},
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def concepts(bank: Bank, class_names: tuple[str, ...]) -> Table:
    """Return one row a concept; of a bank with very many, the most important ones, best first."""
    names = sorted({name for concept in bank.concepts for name in concept.statistics})
    shown, note = list(bank.concepts), None
    if len(shown) > _CONCEPTS_SHOWN:
        shown = sorted(shown, key=lambda concept: -concept.statistics.get("importance", 0.0))[:_CONCEPTS_SHOWN]
        note = f"the {_CONCEPTS_SHOWN} most important of {len(bank.concepts):,} concepts"
    contrasted = any(concept.other_index is not None for concept in shown)
    owners = ("class", "against") if contrasted else ("class",)
    table = Table("id", *owners, "label", *names, "exemplars", caption=note, caption_justify="left")
    for concept in shown:
        owned = [concept.class_index, concept.other_index][: len(owners)]
        classes = ["" if index is None else escape(class_names[index]) for index in owned]
        numbers = [_number(concept.statistics.get(name)) for name in names]
        table.add_row(str(concept.id), *classes, _label(concept), *numbers, str(len(concept.exemplars)))
    return table


def named(bank: Bank) -> Table:
    """Return what naming found: one row a concept, surest labels first."""
    found = [(concept, concept.naming) for concept in bank.all_concepts if concept.naming is not None]
    weak = sum(naming.weak for _, naming in found)
    note = f"{bank.reference}@{bank.digest[:12]}: {len(found):,} of {len(bank.all_concepts):,} concepts are named"
    note += f", {weak:,} weakly" if weak else ""
    if len(found) > _CONCEPTS_SHOWN:
        note += f"; the {_CONCEPTS_SHOWN} surest are shown"
    table = Table("id", "label", "score", "words", "phrases", "counterfactuals", caption=note, caption_justify="left")
    for concept, naming in sorted(found, key=lambda one: (one[1].weak, -one[1].score))[:_CONCEPTS_SHOWN]:
        said = [escape(", ".join(word.text for word in kind[:_WORDS_SHOWN])) for kind in (naming.words, naming.phrases)]
        table.add_row(str(concept.id), _label(concept), _number(naming.score), *said, str(naming.counterfactuals))
    return table


def _label(concept: Concept) -> str:
    """Return a concept's label; one that is weak as a question, as the SDK shows it."""
    return escape(f"{concept.label}?" if concept.weak else concept.label)


def _title(name: str) -> str:
    return COLUMNS[name].title if name in COLUMNS else _OF_TRAINING.get(name, name)


def _cells(row: Mapping[str, float], names: Iterable[str] = _CLASS_COLUMNS) -> list[str]:
    return [f"{row[n]:.0f}" if n in row and n in _COUNTS else _number(row.get(n)) for n in names]


def _best(bank: Bank, class_index: int, count: int = 3) -> str:
    own = [concept for concept in bank.concepts if concept.class_index == class_index]
    own.sort(key=lambda concept: -concept.statistics["importance"])
    return " ".join(f"#{concept.id} ({concept.statistics['importance']:.2f})" for concept in own[:count])


def _in_words(view: Preprocessing) -> str:
    """Say what happens to an image, in order."""
    size = f"{view.height}×{view.width}"
    words = [
        f"stretch to {size} ({view.interpolation})"
        if view.resize is None
        else f"shorter side to {view.resize} ({view.interpolation}), centre {size}",
        "BGR in [0, 1]" if view.bgr else "RGB in [0, 1]",
    ]
    if any(view.mean):
        words.append(f"minus {_triple(view.mean)}")
    if view.std != (1.0, 1.0, 1.0):
        words.append(f"divided by {_triple(view.std)}")
    if view.inverse:
        words.append("then 1 − x as three more channels")
    return ", ".join(words)


def _triple(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
