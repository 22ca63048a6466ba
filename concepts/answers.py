"""From a batch's tensors to each image's explanation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from concepts.bank import Bank
from concepts.codec import EMPTY, Codes
from concepts.estimators import Contributions
from concepts.explanation import (
    ClassScore,
    ConceptMap,
    ConceptScope,
    ConceptScore,
    Estimator,
    Exactness,
    ExplainOptions,
    Explanation,
    FaithfulnessReport,
    InputMapReport,
    MapKind,
    StageTimes,
)
from concepts.layout import Layout
from concepts.model import ModelSpec

PREDICTIONS = 5
"""How many classes an explanation lists."""

PARTIAL = "concepts are parts of the activation, which may overlap and leave some out: they do not add up to it"
"""Of banks that do not reconstruct."""

UNTIMED = StageTimes(0.0, 0.0, 0.0, 0.0, 0)
"""Of an explanation whose batch is still being timed."""

Maps = dict[tuple[MapKind, int, int], ConceptMap]
"""By kind, image and slot."""


@dataclass(frozen=True)
class Findings:
    """What was computed for a batch, on the device: B images, S concept slots."""

    logits: Tensor
    """``[B, n_classes]``, the model's own."""
    explained: Tensor
    """``[B, n_classes]``: the logits that are explained; those of the reconstruction where it is substituted."""
    targets: Tensor
    """int64 ``[B]``."""
    codes: Codes
    contributions: Contributions
    constant: Tensor
    """``[B]``: the head's constant for the target."""
    head_form: str
    substitute: bool
    """Whether the reconstruction stands in for the activation."""
    scope: ConceptScope
    relative_error: Tensor | None
    """``[B]``, as are the next three."""
    kl: Tensor | None
    top1_agrees: Tensor | None
    carried_share: Tensor | None


class Listed(NamedTuple):
    """The part of the findings that answers list, on the CPU."""

    findings: Findings
    ids: Tensor
    """Of the codes, as are the next three: int64 ``[B, S]``."""
    tolerance: Tensor | None
    """``[B]``."""
    totals: Tensor
    """``[B, S]``."""
    peaks: Tensor
    """``[B, S]``."""
    probabilities: NDArray[np.float64]
    """``[B, n_classes]``."""
    slots: NDArray[np.int64]
    """``[B, L]``: slots in the requested order, L the largest top_k; empty slots come last."""
    maps: Maps
    input_maps: Sequence[InputMapReport | None]
    """One an image."""


def chosen_slots(codes: Codes, contributions: Tensor, options: Sequence[ExplainOptions]) -> Tensor:
    """Choose what each image's answer lists: int64 ``[B, L]``, best first, L the largest top_k; empty slots come last.

    Parameters
    ----------
    codes
        Of the batch.
    contributions
        Their totals, ``[B, S]``.
    options
        One an image.
    """
    by_activation = torch.tensor([o.order == "activation" for o in options], device=codes.ids.device)
    score = torch.where(by_activation.unsqueeze(1), codes.total(), contributions.abs())
    score = score.masked_fill(codes.ids == EMPTY, -torch.inf)
    # Sorted stably, so that equal scores come in the same order in any batch.
    return score.argsort(dim=1, descending=True, stable=True)[:, : max(o.top_k for o in options)]


def layer_maps(
    findings: Findings, slots: Tensor, options: Sequence[ExplainOptions], layout: Layout, view_size: tuple[int, int]
) -> Maps:
    """Make the requested maps on the layer's positions.

    Parameters
    ----------
    findings
        Of the batch.
    slots, options
        From ``chosen_slots``, and as it was given.
    layout
        Of the layer.
    view_size
        Height and width of the model's view, in pixels: the size of image maps.
    """
    maps: Maps = {}
    for kind, source in (("activation", findings.codes), ("contribution", findings.contributions.maps)):
        pairs = [
            (row, slot, o.map_size)
            for row, o in enumerate(options)
            if kind in o.maps
            for slot in slots[row, : o.top_k].tolist()
        ]
        if pairs and source is not None:
            maps |= {(kind, *key): m for key, m in concept_maps(source, pairs, layout, view_size).items()}  # type: ignore[misc]
    return maps


def listed(findings: Findings, slots: Tensor, maps: Maps, input_maps: Sequence[InputMapReport | None]) -> Listed:
    """Bring all numbers that answers need to the CPU, in few transfers; parameters as of ``Listed``."""
    codes = findings.codes
    return Listed(
        _to_cpu(findings),
        codes.ids.cpu(),
        None if codes.tolerance is None else codes.tolerance.cpu(),
        codes.total().cpu(),
        codes.peak().cpu(),
        torch.softmax(findings.logits.double(), 1).cpu().numpy(),
        slots.cpu().numpy(),
        maps,
        input_maps,
    )


def explanation(
    spec: ModelSpec, bank: Bank, runtime: str, listed: Listed, row: int, options: ExplainOptions
) -> Explanation:
    """Return one image's explanation, ``UNTIMED``."""
    found = listed.findings
    target = int(found.targets[row])
    contributions = found.contributions
    total = float(contributions.total[row].sum())
    unexplained = None if contributions.unexplained is None else float(contributions.unexplained[row])
    logits, probabilities = found.logits[row], listed.probabilities[row]
    best = np.argsort(-probabilities, kind="stable")[:PREDICTIONS]
    return Explanation(
        model=spec.name,
        model_digest=spec.weights_digest,
        bank=bank.reference,
        bank_digest=bank.digest,
        predictions=tuple(class_score(spec, logits, probabilities, int(index)) for index in best),
        target=class_score(spec, logits, probabilities, target),
        concepts=_concept_scores(spec, bank, listed, row, options, abs(unexplained or 0.0)),
        contributions_total=total,
        unexplained=unexplained,
        faithfulness=_report(listed, row, target, total, unexplained, options.estimator),
        stages=UNTIMED,
        runtime=runtime,
        estimator=options.estimator,
        substitute=found.substitute,
        scope=found.scope,
    )


def class_score(spec: ModelSpec, logits: Tensor, probabilities: NDArray[np.float64], index: int) -> ClassScore:
    """Return one class of one image; logits and probabilities ``[n_classes]``."""
    return ClassScore(index, spec.class_names[index], float(logits[index]), float(probabilities[index]))


def _concept_scores(
    spec: ModelSpec, bank: Bank, listed: Listed, row: int, options: ExplainOptions, unexplained: float
) -> tuple[ConceptScore, ...]:
    ids, totals = listed.ids[row].tolist(), listed.findings.contributions.total[row].tolist()
    activations, peaks = listed.totals[row].tolist(), listed.peaks[row].tolist()
    whole = sum(map(abs, totals)) + unexplained
    return tuple(
        ConceptScore(
            id=ids[slot],
            label=(concept := bank.concepts[ids[slot]]).label,
            activation=activations[slot],
            peak=peaks[slot],
            contribution=totals[slot],
            share=totals[slot] / whole if whole > 0 else 0.0,
            maps={kind: listed.maps[kind, row, slot] for kind in options.maps if (kind, row, slot) in listed.maps},
            class_index=concept.class_index,
            class_name="" if concept.class_index is None else spec.class_names[concept.class_index],
            weak_label=concept.weak,
            words=concept.words,
        )
        for slot in listed.slots[row, : options.top_k].tolist()
        if ids[slot] != EMPTY
    )


def _report(
    listed: Listed, row: int, target: int, total: float, unexplained: float | None, estimator: Estimator
) -> FaithfulnessReport:
    found = listed.findings
    explained, constant = float(found.explained[row, target]), float(found.constant[row])
    exactness, reason = exactness_of(found.head_form, estimator)
    if found.relative_error is None:
        exactness, reason = "first_order", f"{reason}; {PARTIAL}"

    def at(values: Tensor | None) -> float | None:
        return None if values is None else float(values[row])

    return FaithfulnessReport(
        explained_logit=explained,
        completeness_residual=explained - constant - total - (unexplained or 0.0),
        constant=constant,
        exactness=exactness,
        exactness_reason=reason,
        relative_error=at(found.relative_error),
        kl=at(found.kl),
        top1_agrees=None if found.top1_agrees is None else bool(found.top1_agrees[row]),
        carried_share=at(found.carried_share),
        integration_error=at(found.contributions.integration_error),
        code_tolerance=at(listed.tolerance),
        input_maps=listed.input_maps[row],
    )


def exactness_of(head_form: str, estimator: Estimator) -> tuple[Exactness, str]:
    """Return whether contributions add up to the logit, and why."""
    if head_form == "affine":
        return "exact", "the head is affine: its gradient is the same everywhere"
    if estimator == "integrated":
        return "exact", "integrated gradients add up for any head, up to the stated integration error"
    if estimator == "ablation":
        return "first_order", "concepts were taken out one at a time: how they act together is not in the sum"
    if head_form == "dynamic_linear":
        return "exact", "the head is linear for each input, and its gradient is that map"
    return "first_order", "the head is not linear: gradients tell how the logit changes near this activation"


def concept_maps(
    source: Codes, pairs: Sequence[tuple[int, int, str]], layout: Layout, view_size: tuple[int, int]
) -> dict[tuple[int, int], ConceptMap]:
    """Make maps of (row, slot, size) triples of codes, or of contributions of them, by row and slot."""
    device = source.values.device
    rows = torch.tensor([row for row, _, _ in pairs], dtype=torch.int64, device=device)
    slots = torch.tensor([slot for _, slot, _ in pairs], dtype=torch.int64, device=device)
    values = source.maps(rows, slots).float()
    tokens = values[:, : layout.tokens].sum(1).tolist() if layout.tokens else [None] * len(pairs)
    grid = values[:, layout.tokens :].reshape(len(pairs), *layout.grid)
    large = [i for i, (_, _, size) in enumerate(pairs) if size == "image"]
    resized = {}
    if large:
        up = functional.interpolate(grid[large].unsqueeze(1), size=view_size, mode="bilinear", align_corners=False)
        resized = dict(zip(large, up.squeeze(1).cpu().numpy(), strict=True))
    small = grid.cpu().numpy()
    return {(row, slot): ConceptMap(resized.get(i, small[i]), tokens[i]) for i, (row, slot, _) in enumerate(pairs)}


def _to_cpu(findings: Findings) -> Findings:
    """Bring everything to the CPU but what has a value for each position."""

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().cpu()

    c = findings.contributions
    return Findings(
        logits=findings.logits.cpu(),
        explained=findings.explained.cpu(),
        targets=findings.targets.cpu(),
        codes=findings.codes,
        contributions=Contributions(c.total.detach().cpu(), None, move(c.unexplained), move(c.integration_error)),
        constant=findings.constant.cpu(),
        head_form=findings.head_form,
        substitute=findings.substitute,
        scope=findings.scope,
        relative_error=move(findings.relative_error),
        kl=move(findings.kl),
        top1_agrees=move(findings.top1_agrees),
        carried_share=move(findings.carried_share),
    )
