"""How much each concept matters to its class, over images predicted as that class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from concepts.codec import Codec
from concepts.cut import Cut
from offline import sobol
from offline.passes import Explained, masked_target_logits


@dataclass(frozen=True)
class Importance:
    """Means over the images of a class, for its K concepts."""

    total_sobol: Tensor
    """Total Sobol index on the class logit, float64 ``[K]``."""
    contribution: Tensor
    """Contribution to the class logit, in logits, float64 ``[K]``."""
    images: int


def measure(
    cut: Cut, codec: Codec, images: Iterable[Explained], sizes: Mapping[int, int], n_designs: int
) -> dict[int, Importance]:
    """Measure the importance of every concept.

    Per image the total Sobol index of each concept on the logit of the predicted class, averaged over images (CRAFT,
    eq. 3): in closed form where the head is affine, by Jansen's estimator elsewhere.

    Parameters
    ----------
    cut, codec
        Where the model is cut, and the bank's codec.
    images
        Explained batches.
    sizes
        Number of concepts of each class.
    n_designs
        Of Jansen's estimator.
    """
    indices: dict[int, list[Tensor]] = {}
    contributions: dict[int, list[Tensor]] = {}
    for batch in images:
        index = total_indices(cut, codec, batch, n_designs).cpu()
        for row, target in enumerate(batch.targets.tolist()):
            indices.setdefault(target, []).append(index[row])
            contributions.setdefault(target, []).append(batch.contributions[row].cpu())
    return {
        target: Importance(
            total_sobol=torch.stack(rows).mean(0)[: sizes[target]],
            contribution=torch.stack(contributions[target]).double().mean(0)[: sizes[target]],
            images=len(rows),
        )
        for target, rows in indices.items()
    }


def total_indices(cut: Cut, codec: Codec, batch: Explained, n_designs: int) -> Tensor:
    """Return total Sobol indices of each image's concepts on its target logit, float64 ``[R, S]``."""
    if cut.facts.form == "affine":
        return sobol.closed_form(batch.contributions.double())
    slots = batch.codes.ids.shape[1]
    masks = sobol.designs(slots, n_designs).to(batch.a.device)
    rows = masks.flatten(0, 1).expand(len(batch.targets), -1, -1)
    outputs = masked_target_logits(cut, codec, batch.codes, rows, batch.targets)
    return sobol.jansen(outputs.view(-1, slots + 1, n_designs))
