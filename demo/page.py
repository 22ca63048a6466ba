"""The demo's page: what was learned, and how it explains."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

import whence

METRICS = {
    "mean.relative_error": "relative error ‖A − Â‖ / ‖A‖",
    "mean.kl": "KL(h(a) ‖ h(â)), nats",
    "mean.top1_agreement": "top-1 agreement with â",
    "mean.accuracy": "accuracy",
    "mean.accuracy_reconstructed": "accuracy with â in place of a",
    "mean.variance_explained": "variance explained",
    "mean.l0_position": "concepts active at a position (L0)",
    "mean.concepts_for_80": "concepts for 80 % of the contribution",
    "mean.dead_share": "dead share",
    "mean.consistency": "consistency (C²)",
    "mean.consistency_of_contributions": "consistency (C²), by contribution",
    "mean.deletion_aopc": "C-Deletion (AOPC)",
    "mean.insertion_auc": "C-Insertion (area)",
    "mean.gini": "C-Gini",
    "localisation.auroc": "best-match AUROC",
    "localisation.pointing_game": "pointing game",
    "localisation.iou": "heatmap IoU",
    "mean.plane_accuracy": "held-out positions on their class's side of the plane",
    "mean.plane_accuracy_min": "… of the pair that is told apart least",
    "mean.image_accuracy": "held-out images on their class's side, in the mean of all positions",
    "mean.swap_rate": "held-out images that a shift turns into the other class",
    "mean.swap_shift": "… at, mean activation norms (median)",
    "mean.cohesion": "mean cosine of a group's crops, to the CLIP",
    "mean.interpretable_share": "groups that are interpretable",
    "mean.active_share": "images in which a group is active",
    "mean.carried_share": "share of ⟨∂y/∂a, a⟩ that active groups carry (median)",
    "parts.attributes.auroc": "AUROC of a concept's best part for what the concept mixes",
    "parts.attributes.auroc_concept": "… of the concept itself",
    "parts.attributes.auroc_random": "… of the best of as many random directions",
}
"""Metrics that the page lists, where a bank has them; means over classes."""


@dataclass(frozen=True)
class Shown:
    """One explained image."""

    bank: str
    image: str
    picture: str
    """File beside the page."""
    explanation: whence.Explanation
    concepts: Sequence[whence.Concept]
    """The first few concepts, with exemplars."""


@dataclass(frozen=True)
class Contrasted:
    """One image of which it was asked why one class and not another."""

    bank: str
    image: str
    picture: str
    """File beside the page."""
    contrast: whence.Contrast
    concepts: Sequence[whence.Concept]
    """The prototypes, with exemplars."""


def write_page(
    out: Path,
    banks: Sequence[whence.Bank],
    shown: Sequence[Shown],
    contrasted: Sequence[Contrasted],
    searched: Sequence[whence.SearchResults],
    refusals: Mapping[str, str],
) -> Path:
    """Write ``index.html`` and return its path."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["data_url"] = lambda webp: "data:image/webp;base64," + base64.b64encode(webp).decode()
    tables = {bank.reference: _metrics(bank) for bank in banks}
    page = out / "index.html"
    html = environment.get_template("page.html").render(
        banks=banks, tables=tables, shown=shown, contrasted=contrasted, searched=searched, refusals=refusals
    )
    page.write_text(html, encoding="utf-8")
    return page


def _metrics(bank: whence.Bank) -> list[tuple[str, str]]:
    rows = []
    for path, words in METRICS.items():
        value: object = bank.metrics
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)):
            rows.append((words, f"{value:.3f}"))
    return rows
