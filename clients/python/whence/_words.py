"""Explanations, their reports, and interventions in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from whence import _labels

if TYPE_CHECKING:
    from whence._contrast import Contrast
    from whence._explanation import ClassScore, ConceptScore, Explanation, FaithfulnessReport, InputMapReport
    from whence._intervention import Intervention
    from whence._inventory import Concept

_DIGEST_CHARACTERS = 12


def one_line(explanation: Explanation) -> str:
    """What an explanation says, in a line."""
    shown = explanation.concepts[:3]
    parts = [f"{owner(concept, explanation)}{concept.name} {concept.contribution:+.3g}" for concept in shown]
    if len(explanation.concepts) > len(shown):
        parts.append("…")
    target = explanation.target
    return (
        f"Explanation({target.name or target.index}, p={target.probability:.3f}, {explained_logit(explanation)}; "
        f"{len(explanation.concepts)} concepts of {bank_version(explanation)}: {', '.join(parts) or 'none'})"
    )


def owner(concept: ConceptScore, explanation: Explanation) -> str:
    """The concept's class as the beginning of its name, where concepts of all classes explain."""
    return f"{concept.class_name}: " if explanation.scope == "all" and concept.class_name else ""


def explained_logit(explanation: Explanation) -> str:
    """The logit that the contributions account for, and the model's own where that is another."""
    own = explanation.target.logit
    if not explanation.substitute:
        return f"logit {own:.4g}"
    explained = explanation.faithfulness.explained_logit
    return f"explained logit {explained:.4g} of the reconstruction (the model's own: {own:.4g})"


def bank_version(answer: Explanation | Intervention | Contrast | Concept) -> str:
    """The bank, and the beginning of its digest."""
    return f"{answer.bank}@{answer.bank_digest[:_DIGEST_CHARACTERS]}"


def intervention_line(intervention: Intervention) -> str:
    """What an intervention says, in a line."""
    first, last = intervention.before[0], intervention.after[0]
    return (
        f"Intervention({class_name(first)} p={first.probability:.3f} → {class_name(last)} p={last.probability:.3f}; "
        f"{scaled(intervention)} of {bank_version(intervention)})"
    )


def intervention_lines(intervention: Intervention) -> list[str]:
    """What was done and what came of it, one statement a line."""
    first, last = class_name(intervention.before[0]), class_name(intervention.after[0])
    verdict = f"predicts {last} in place of {first}" if intervention.changed else f"still predicts {first}"
    lines = [f"With {scaled(intervention)} the model {verdict}."]
    after = {score.index: score for score in intervention.after}
    for was in intervention.before:
        now = after[was.index]
        lines.append(
            f"{class_name(was)}: {was.probability:.1%} before, {now.probability:.1%} after "
            f"(logit {was.logit:.3g}, then {now.logit:.3g})."
        )
    return lines


def intervention_table(intervention: Intervention) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the classes before and after."""
    heads = ("class", "before", "after", "logit before", "logit after")
    after = {score.index: score for score in intervention.after}
    rows: list[tuple[str, ...]] = [
        (
            class_name(was),
            f"{was.probability:.1%}",
            f"{after[was.index].probability:.1%}",
            f"{was.logit:.4g}",
            f"{after[was.index].logit:.4g}",
        )
        for was in intervention.before
    ]
    return heads, rows


def scaled(intervention: Intervention) -> str:
    """Which concepts were scaled, and how."""
    return ", ".join(f"concept {concept} × {scale:g}" for concept, scale in intervention.scales.items())


def class_name(score: ClassScore) -> str:
    """The name, or the index where there is none."""
    return score.name or str(score.index)


def report_lines(report: FaithfulnessReport) -> list[str]:
    """A faithfulness report, one statement a line."""
    return list(_statements(report))


def all_lines(explanation: Explanation) -> list[str]:
    """The faithfulness report, that of the parts where there are some, and what else is to be known, by lines."""
    lines = report_lines(explanation.faithfulness) + _labels.note(item for _, item in outline(explanation.concepts))
    if explanation.scope == "all":
        lines.insert(0, "Concepts of all classes explain: codes are of all of them together, and they compete.")
    if explanation.parts is None:
        return lines
    at = f"Parts, at {explanation.parts.layer}"
    return [
        *lines,
        f"{at}, are a statement of their own: their contributions do not add up to those of the concepts.",
        *(f"{at}: {line[0].lower()}{line[1:]}" for line in report_lines(explanation.parts.faithfulness)),
    ]


def table(explanation: Explanation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the contributions: concepts with their parts, and what else there is to the logit."""
    classes = any(concept.class_name for concept in explanation.concepts)
    words = any(item.words for _, item in outline(explanation.concepts))
    heads = ("concept", *(("class",) if classes else ()), "id", *NUMBERS, *(("words",) if words else ()))
    rows: list[tuple[str, ...]] = []
    for name, item in outline(explanation.concepts):
        owner = (item.class_name,) if classes else ()
        gloss = (_labels.gloss(item.label, item.words),) if words else ()
        rows.append((name, *owner, str(item.id), *numbers(item), *gloss))
    rest = {"all other concepts": explanation.unlisted, "unexplained": explanation.unexplained}
    before, after = ("",) * heads.index("contribution"), ("",) * (len(heads) - heads.index("share"))
    rows += [(name, *before[1:], f"{value:+.4g}", *after) for name, value in rest.items() if value is not None]
    return heads, rows


NUMBERS = ("activation", "contribution", "share")
"""Heads of what `numbers` gives."""


def numbers(concept: ConceptScore) -> tuple[str, str, str]:
    """The cells of a concept's numbers."""
    return f"{concept.activation:.4g}", f"{concept.contribution:+.4g}", f"{concept.share:+.1%}"


def outline(concepts: Sequence[ConceptScore]) -> Iterator[tuple[str, ConceptScore]]:
    """Names of concepts, each followed by its parts, indented."""
    for concept in concepts:
        yield concept.name, concept
        for part in concept.parts:
            yield f"  └ {_labels.name(part, 'part')}", part


def _statements(report: FaithfulnessReport) -> Iterator[str]:
    if report.exactness == "exact":
        claim = "Exact: contributions, remainder and constant are the explained logit"
    else:
        claim = "First order: contributions say how the logit changes near this image"
    yield f"{claim} ({report.exactness_reason})." if report.exactness_reason else f"{claim}."
    yield (
        f"Left over of the explained logit {report.explained_logit:.4g} after adding everything up: "
        f"{report.completeness_residual:+.2g} logits (constant {report.constant:+.3g})."
    )
    if report.relative_error is not None:
        yield f"The bank misses {report.relative_error:.1%} of the activation."
    if report.top1_agrees is not None:
        kl = "" if report.kl is None else f" (KL {report.kl:.2g} nats)"
        verb = "predicts the same class" if report.top1_agrees else "predicts another class"
        yield f"From the bank's reconstruction alone the model {verb}{kl}."
    elif report.kl is not None:
        yield f"The reconstruction moves the prediction by KL {report.kl:.2g} nats."
    if report.carried_share is not None:
        yield f"The bank's components carry {report.carried_share:.1%} of the logit's first-order part."
    if report.integration_error is not None:
        yield f"Integration error: {report.integration_error:.2%}."
    if report.code_tolerance is not None:
        yield f"The codes are optimal to {report.code_tolerance:.1g}."
    if report.input_maps is not None:
        yield _input_map_statement(report.input_maps)


def _input_map_statement(report: InputMapReport) -> str:
    reason = f" ({report.reason})" if report.reason else ""
    if report.exactness == "exact":
        return f"Input maps: exact to {report.residual:.1g} of the activation{reason}."
    if report.completeness_residual is not None:
        return (
            "Input maps: first order, their sums off the activation less that at the input that is zero by up to "
            f"{report.completeness_residual:.1%} of the activation{reason}."
        )
    return f"Input maps: first order, their sums off by up to {report.residual:.0%} of the activation{reason}."
