"""One page about what a batch found: classes, concepts, how far to trust them, and failures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whence import _labels
from whence._batch.counting import COLUMNS, ConceptCount, Counts
from whence._batch.reader import BatchOutput
from whence._batch.thumbnails import Thumbnail, Wanted, draw
from whence._errors import InvalidArgument, WhenceError, missing_extra
from whence._inventory_words import counted

try:
    import jinja2
except ImportError as absent:
    raise missing_extra("batch", "jinja2") from absent

CLASSES, CONCEPTS, KEYS = 50, 60, 5
"""How many classes, concepts, and keys of each reason of failure a page shows."""

_REMEDIES = {
    "INVALID_IMAGE": "These are no images that the service can decode: look at the files.",
    "MESSAGE_TOO_LARGE": "Make them smaller, or raise the service's largest request.",
    "NUMERICAL_FAILURE": "The model's numbers overflow on them: look at the images, and ask for another estimator.",
    "INVALID_KEY": "Rename the files: their names are not UTF-8.",
    "OBJECT_GONE": "They were deleted after they were listed: nothing is to be done, or --refresh drops them.",
    "UNREADABLE_OBJECT": "See whether the store lets these objects be read, then run again with --retry-failed.",
    "STORE_DENIED": "See whether the store lets these objects be read, then run again with --retry-failed.",
}
_RETRY = "They may pass: run the same command again with --retry-failed."
_LOOK = "They will fail again as they are: look at the message."


@dataclass(slots=True)
class Reason:
    """Failures of one kind."""

    name: str
    remedy: str
    message: str
    """Of the first."""
    images: int = 0
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What a page was made of."""

    page: str
    explained: int
    failed: int
    concepts: int
    pictures: int
    """Examples that are shown."""


def write_report(
    output: str | os.PathLike[str], to: str | os.PathLike[str], *, source: str | None = None, pictures: bool = True
) -> ReportSummary:
    """Make the page.

    Parameters
    ----------
    output
        What `explain_batch` wrote; it may not be finished yet.
    to
        The file to write.
    source
        Where the images are now. Default: where they were.
    pictures
        Whether to show examples.

    Raises
    ------
    FailedPrecondition
        If there is no batch output.
    InvalidArgument
        If the file cannot be written.
    """
    batch = BatchOutput(output)
    counts = Counts()
    for chunk, table in batch.numbered("results", COLUMNS):
        counts.add(chunk, table)
    reasons = _reasons(batch)
    concepts = counts.concepts()
    shown = concepts[:CONCEPTS]
    wanted = [(concept.id, example) for concept in shown for example in concept.examples] if pictures else []
    thumbnails, note = _thumbnails(batch, source or batch.manifest["source"], wanted)
    page = _render(batch, str(output), counts, shown, len(concepts), reasons, thumbnails, note)
    try:
        Path(to).write_text(page, encoding="utf-8")
    except OSError as exc:
        raise InvalidArgument(f"Cannot write {to}: {exc.strerror or exc}.", reason="UNWRITABLE_FILE") from exc
    drawn = sum(bool(thumbnail.picture) for thumbnail in thumbnails.values())
    failed = sum(reason.images for reason in reasons)
    return ReportSummary(str(to), counts.images, failed, len(concepts), drawn)


def _reasons(batch: BatchOutput) -> list[Reason]:
    """Failures by reason, most frequent first."""
    found: dict[str, Reason] = {}
    for _, table in batch.numbered("failures", ("key", "reason", "message", "retryable")):
        for row in table.to_pylist():
            name = row["reason"]
            if name not in found:
                remedy = _REMEDIES.get(name, _RETRY if row["retryable"] else _LOOK)
                found[name] = Reason(name, remedy, row["message"])
            reason = found[name]
            reason.images += 1
            reason.keys = sorted([*reason.keys, row["key"]])[:KEYS]
    return sorted(found.values(), key=lambda reason: (-reason.images, reason.name))


def _thumbnails(batch: BatchOutput, source: str, wanted: Sequence[Wanted]) -> tuple[dict[Wanted, Thumbnail], str]:
    """Pictures of the examples, and what is to be said of them all."""
    if not wanted:
        return {}, ""
    try:
        drawn = draw(batch, source, wanted)
    except WhenceError as failure:
        return {}, f"There are no pictures: {failure.message}"
    missing = Counter(thumbnail.note for thumbnail in drawn.values() if thumbnail.note)
    if not any(thumbnail.picture for thumbnail in drawn.values()):
        return drawn, f"There are no pictures: none of the images could be read from {source}."
    return drawn, f"Of the examples, {sum(missing.values())} could not be shown as they were." if missing else ""


def _render(
    batch: BatchOutput,
    place: str,
    counts: Counts,
    shown: Sequence[ConceptCount],
    concept_count: int,
    reasons: Sequence[Reason],
    thumbnails: Mapping[Wanted, Thumbnail],
    note: str,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, number=_number, option=_option, counted=counted)
    classes = counts.classes()
    failed = sum(reason.images for reason in reasons)
    return environment.get_template("report.html").render(
        place=place,
        manifest=batch.manifest,
        planned=batch.planned(),
        counts=counts,
        failed=failed,
        trust=counts.trust(),
        classes=classes[:CLASSES],
        other_classes=classes[CLASSES:],
        names={row.index: row.name for row in classes},
        concepts=shown,
        concept_count=concept_count,
        classed=any(concept.class_index is not None for concept in shown),
        weak=any(concept.weak_label for concept in shown),
        reasons=reasons,
        thumbnails=thumbnails,
        note=note,
        name_of=_labels.numbered,
    )


def _percent(value: float | None) -> str:
    """A share; a dash where there is none."""
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _option(value: Any) -> str:
    """An option of the run."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)
