"""Judging a bank on held-out images: one pass over them, then every metric that applies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from concepts.codec import Codec
from concepts.cut import Cut
from offline.metrics import curves, dictionaries, fidelity, sparsity, usage
from offline.metrics.reconstruction import ReconstructionError
from offline.passes import Explained, masked_targets


@dataclass
class Evidence:
    """What was seen on the held-out images of one class; N images, K concepts. Grows batch by batch."""

    concepts: int
    positions: int
    error: ReconstructionError = field(default_factory=ReconstructionError)
    keys: list[str] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        """Take in tensors ``[R, …]`` by name."""
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value.cpu())

    def __getitem__(self, name: str) -> Tensor:
        """Return all rows of a name, ``[N, …]``."""
        return torch.cat(self.rows[name])


def collect(
    cut: Cut, codec: Codec, images: Iterable[Explained], importance: Mapping[int, Tensor]
) -> dict[int, Evidence]:
    """Look at held-out images, class by predicted class.

    Parameters
    ----------
    cut, codec
        Where the model is cut, and the bank's codec.
    images
        Explained batches.
    importance
        Of each class's concepts, ``[K]``: the order of deletion and insertion.
    """
    found: dict[int, Evidence] = {}
    for batch in images:
        with torch.no_grad():
            reconstructed = cut.head(batch.reconstruction)
        reconstruction = cut.positions(batch.reconstruction)
        deletion = _deletion_masks(batch, importance)
        # Empty slots have no code, so that inserting them changes nothing.
        masks = torch.cat([deletion, 1 - deletion], dim=1)
        _, kept = masked_targets(cut, codec, batch.codes, masks, batch.targets)
        active = batch.codes.active()
        positions = cut.positions(batch.a)
        for target in batch.targets.unique().tolist():
            rows = (batch.targets == target).nonzero().squeeze(1)
            k = len(importance[target])
            evidence = found.setdefault(target, Evidence(k, positions.shape[1]))
            evidence.keys += [batch.keys[row] for row in rows.tolist()]
            evidence.error.add(positions[rows], reconstruction[rows])
            evidence.add(
                logits=batch.logits[rows],
                reconstructed=reconstructed[rows],
                contributions=batch.contributions[rows, :k],
                active=active[rows, :k],
                deletion=kept[rows, : k + 1],
                insertion=kept[rows, deletion.shape[1] : deletion.shape[1] + k + 1],
            )
    return found


def class_metrics(
    evidence: Evidence, importance: Tensor, dictionary: Tensor, labels: Tensor | None
) -> dict[str, float]:
    """Return the metrics of one class's concepts by name (methods section 6).

    Parameters
    ----------
    evidence
        From ``collect``.
    importance
        ``[K]``.
    dictionary
        ``[K, C]``.
    labels
        True classes of the images, int64 ``[N]``, or None where they are not known.
    """
    logits, reconstructed, active = evidence["logits"], evidence["reconstructed"], evidence["active"]
    known = {}
    if labels is not None:
        known["accuracy"] = fidelity.accuracy(logits, labels)
        known["accuracy_reconstructed"] = fidelity.accuracy(reconstructed, labels)
    return {
        "images": float(len(logits)),
        "relative_error": evidence.error.relative_error(),
        "mse": evidence.error.mse(),
        "variance_explained": evidence.error.variance_explained(),
        "kl": float(fidelity.kl_divergence(logits, reconstructed).mean()),
        "top1_agreement": fidelity.agreement(logits, reconstructed),
        **known,
        "deletion_aopc": curves.deletion_aopc(evidence["deletion"].double().mean(0)),
        "insertion_auc": curves.insertion_auc(evidence["insertion"].double().mean(0)),
        "gini": sparsity.gini(importance),
        "code_density": sparsity.density(active, evidence.positions),
        "l0_position": sparsity.l0_per_position(active, evidence.positions),
        "l0_image": sparsity.l0_per_image(active),
        "concepts_for_80": float(sparsity.concepts_for_share(evidence["contributions"]).double().mean()),
        "alive_share": sparsity.alive_share(active),
        "dead_share": 1.0 - sparsity.alive_share(active),
        "always_on_share": sparsity.always_on_share(active),
        "hoyer": dictionaries.hoyer(dictionary),
        "largest_cosine": dictionaries.largest_cosine(dictionary),
    }


def concept_statistics(evidence: Evidence, labels: Tensor | None) -> list[dict[str, float]]:
    """Return statistics of each concept of a class on its held-out images; parameters as of ``class_metrics``."""
    contributions = evidence["contributions"]
    columns = {
        "active_share": sparsity.active_share(evidence["active"]),
        "prevalence": usage.prevalence(contributions),
    }
    if labels is not None:
        columns["reliability"] = usage.reliability(contributions, evidence["logits"].argmax(1) == labels)
    return [
        {name: float(column[k]) for name, column in columns.items() if not column[k].isnan()}
        for k in range(evidence.concepts)
    ]


def mean_metrics(classes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the unweighted mean over classes of every metric that all of them have."""
    rows = list(classes)
    shared = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared if name != "images"}


def _deletion_masks(batch: Explained, importance: Mapping[int, Tensor]) -> Tensor:
    """Return each image's masks ``[R, S + 1, S]``; the empty slots of a class with fewer concepts come last."""
    slots = batch.codes.ids.shape[1]
    masks = {}
    for target in batch.targets.unique().tolist():
        padded = torch.full((slots,), -1.0, dtype=torch.float64)
        padded[: len(importance[target])] = importance[target]
        masks[target] = curves.deletion_masks(padded)
    return torch.stack([masks[target] for target in batch.targets.tolist()]).to(batch.a.device)
