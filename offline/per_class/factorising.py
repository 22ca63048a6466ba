"""Factorising the vectors of one class, as several methods do."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from concepts.errors import NotTrainable
from offline import nmf
from offline.metrics import dictionaries
from offline.nmf import Factorisation
from offline.per_class.config import PerClassConfig


def factorise(rows: Tensor, config: PerClassConfig) -> Factorisation:
    """Return the best factorisation of float64 ``[N, C]`` of several starts.

    Raises
    ------
    NotTrainable
        If the vectors cannot be factorised.
    """
    return nmf.best_of(
        rows,
        config.concepts,
        random_starts=config.random_starts,
        seed=config.seed,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )


def metrics(rows: Tensor, places: int, found: Factorisation, config: PerClassConfig) -> dict[str, float]:
    """Return what the factorisation itself says of how good it is.

    Parameters
    ----------
    rows
        What was factorised, ``[images · places, C]``, image by image.
    places
        Rows of an image.
    found
        Its factorisation.
    config
        How it was made.
    """
    values = {
        "training_images": float(len(rows) // places),
        "training_crops": float(len(rows)),
        "training_mse": 2 * float(found.objective) / rows.numel(),
        "training_relative_error": (2 * float(found.objective)) ** 0.5 / float(rows.norm()),
        "iterations": float(found.iterations),
        "projected_gradient": float(found.residual),
    }
    if config.stability_folds > 1:
        with suppress(NotTrainable):  # too little is left without a fold: what was learned stands all the same
            values |= _stability(rows, places, config)
    return values


def _stability(rows: Tensor, places: int, config: PerClassConfig) -> dict[str, float]:
    """Refit without each fold of images in turn, and as often on all of them, every time from another random start."""
    folds = config.stability_folds
    image = torch.arange(len(rows), device=rows.device) // places
    # A row of zeros weighs nothing: the fold is left out without changing shapes.
    kept = image % folds != torch.arange(folds, device=rows.device).unsqueeze(1)
    return {
        "stability": dictionaries.stability(_refits(rows * kept.unsqueeze(2), config, config.seed + 1)),
        "stability_starts": dictionaries.stability(_refits(rows.expand(folds, -1, -1), config, config.seed + 2)),
    }


def _refits(matrices: Tensor, config: PerClassConfig, seed: int) -> list[Tensor]:
    """Return the dictionary of each matrix, learned from a random start of its own."""
    refits = nmf.factorise(
        matrices,
        config.concepts,
        start="random",
        seed=seed,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )
    return list(refits.dictionary)
